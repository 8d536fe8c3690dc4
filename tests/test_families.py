"""Each family keeps what its interface promises to the code that builds and plans a run."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastlm.data import WordPiece
from fastlm.engine import Engine
from fastlm.registry import Spec
from fastlm.train.families import FAMILIES
from fastlm.train.family import AUDIT_ROWS, Facts
from fastlm.train.presets import PRESETS
from fastlm.train.validate import LABELLED, MODELS, presets_of, recompute_kinds, validate

WORDS = [f"word{i}" for i in range(40)]
CASES = [(model, task) for model, choices in MODELS.items() for task in choices.tasks]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    lines = [" ".join(WORDS[(i * 7 + k) % 40] for k in range(5 + i % 20)) for i in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join(lines[i : i + 9]) for i in range(0, 400, 9)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    (tmp_path / "text.tsv").write_text("\n".join(["text\tlabel", *(f"{t}\t{'ab'[i % 2]}" for i, t in enumerate(lines))]))
    tags = "\n\n".join("\n".join(f"{w} {'O' if w < 'word3' else 'B-X'}" for w in t.split()) for t in lines)
    (tmp_path / "tags.conll").write_text(tags)
    asked = [{"id": str(i), "question": "who", "answers": [{"text": t.split()[1], "answer_start": t.index(t.split()[1])}]}
             for i, t in enumerate(lines)]  # fmt: skip
    pairs = "\n".join(["source\ttarget", *(f"{t}\t{' '.join(reversed(t.split()))}" for t in lines)])
    (tmp_path / "pairs.tsv").write_text(pairs)
    paragraphs = [{"context": t, "qas": [q]} for t, q in zip(lines, asked, strict=True)]
    (tmp_path / "answers.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return tmp_path


def _config(home: Path, model: str, task: str):
    files = {
        "classification": "text.tsv", "tagging": "tags.conll", "span-qa": "answers.json",
        "sequence-to-sequence": "pairs.tsv",
    }  # fmt: skip
    config = presets_of(model)["tiny"]
    data = {"data": (str(home / files.get(task, "text.txt")),), "task": task, "seq_len": 48, "validation_fraction": 0.2}
    if task in LABELLED:
        data["tokenizer"] = str(home / "vocab.txt")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    validate(config)
    return config


def _specs(batch) -> dict[str, Spec]:
    return {name: Spec(tuple(t.shape), t.dtype) for name, t in batch.items()}


@pytest.mark.parametrize(("model", "task"), CASES)
def test_the_plan_is_told_the_widest_batch(home, model, task):
    """Of all that are trained on one has that very shape, and none is wider; the audit's is as it was told."""
    family, config = FAMILIES[model], _config(home, model, task)
    data = family.read(config, Console(file=io.StringIO()))
    told = family.batch(config, data.facts, config.optimizer.batch_size)
    seen = [_specs(batch) for batch in itertools.islice(data.loader, 100)] + [_specs(b) for b in data.held_out]
    assert told in seen
    assert max(spec["input_ids"].shape for spec in seen) == told["input_ids"].shape
    forecast = family.audit_batches(config, data.facts)
    assert len(data.audit_batches) == len(forecast) == AUDIT_ROWS
    for audited, spec in zip(map(_specs, data.audit_batches), forecast, strict=True):
        assert audited.keys() == spec.keys()
        assert all(a <= b for n in audited for a, b in zip(audited[n].shape, spec[n].shape, strict=True))
    assert data.facts.held > 0 and Facts(**json.loads(json.dumps(dataclasses.asdict(data.facts)))).width == data.facts.width


@pytest.mark.parametrize(("model", "task"), CASES)
def test_facts_are_enough_for_a_model_and_its_batches(home, model, task):
    """With every kind of recomputation that the options offer, the numbers of a step are the same."""
    family, config = FAMILIES[model], _config(home, model, task)
    facts = Facts(300, ("a", "b", "c"))
    batch = family.task(config, facts).random(4, 32, torch.Generator().manual_seed(0))
    losses = []
    for kind in recompute_kinds(config):
        torch.manual_seed(1)
        own = family.model(config, facts)
        if kind != "none":
            own.recompute = kind
        losses.append(Engine(own).step([batch]).loss.item())
    assert losses and losses[0] > 0 and len(set(losses)) == 1
    assert family.longest(config) is None


def test_every_model_has_a_family_and_every_preset_is_valid():
    assert FAMILIES.keys() == MODELS.keys()
    for choices in MODELS.values():
        assert len(choices.presets) > 1 and choices.recompute[0] == "none"
        for name, preset in choices.presets.items():
            assert preset.preset == name
            has_data = dataclasses.replace(preset.data, data=("text.txt",))
            validate(dataclasses.replace(preset, data=has_data))
    assert next(iter(presets_of("gpt").values())) == PRESETS["small"]


def test_weights_to_begin_with_and_their_longest_row(home, tmp_path):
    """--init: a plan makes the shape alone, a run takes the weights too."""
    family, config = FAMILIES["bert"], _config(home, "bert", "classification")
    size = WordPiece.load(home / "vocab.txt").vocab_size
    kept = family.model(_config(home, "bert", "masked-lm"), Facts(size))
    kept.save_pretrained(tmp_path / "init")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(tmp_path / "init"), n_layer=1))
    facts = Facts(size, ("x", "y", "z"))
    fresh, started = family.model(config, facts), family.started(config, facts)
    assert fresh.config == started.config and fresh.config.num_hidden_layers == 2 and fresh.config.labels == facts.labels
    table = "encoder.embeddings.word_embeddings.weight"
    assert torch.equal(started.get_parameter(table), kept.get_parameter(table))
    assert not torch.equal(fresh.get_parameter(table), kept.get_parameter(table))
    assert family.longest(config) == 48
