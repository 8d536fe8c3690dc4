"""Generation: distributions against their definitions, greedy and beam search beside transformers, work per step."""

from __future__ import annotations

import functools
import itertools
import math
import re
import tempfile

import pytest
import torch
from conftest import BACKENDS_HERE
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.generate import (
    beam_search,
    choose,
    constrain,
    generate,
    probabilities,
    stream,
    stream_text,
    unpadded,
)
from fastlm.models import GPT, GPTConfig


def by_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """In plain Python: softmax, then the k first, then the shortest prefix that reaches p."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    p = [w / math.fsum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = order[:top_k]
    total = math.fsum(p[i] for i in order)
    if top_p is not None:
        reached, kept = 0.0, []
        for i in order:
            kept.append(i)
            reached += p[i] / total
            if reached >= top_p:
                break
        order, total = kept, math.fsum(p[i] for i in kept)
    return [p[i] / total if i in order else 0.0 for i in range(len(p))]


LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


@given(LOGITS, st.floats(0.1, 5), st.none() | st.integers(1, 15), st.none() | st.floats(0.01, 1))
@settings(max_examples=300, deadline=None)
def test_against_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    found = probabilities(values, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = torch.tensor(by_definition(logits, temperature, top_k, top_p), dtype=torch.float64)
    assert found.dtype == torch.float64 and abs(found.sum() - 1) <= 1e-12
    if top_p is not None:  # where the sum comes within rounding of p, one token more or less is right
        full = torch.tensor(by_definition(logits, temperature, top_k, None), dtype=torch.float64)
        reached = torch.cumsum(full.sort(descending=True).values, 0)
        if ((reached - top_p).abs() < 1e-12).any():
            return
    assert (found.sort().values - expected.sort().values).abs().max() <= 1e-12
    differ = (found - expected).abs() > 1e-12
    if differ.any():  # of tokens as likely as each other, to the last bit, any may be the last that is kept
        likely = torch.tensor(by_definition(logits, temperature, None, None), dtype=torch.float64)[differ]
        assert likely.max() - likely.min() <= 1e-12


def test_sets_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = {
        (1, None): [1],
        (2, None): [1, 3],
        (9, None): [0, 1, 2, 3],
        (None, 0.4): [1],
        (None, 0.41): [1, 3],
        (None, 0.69): [1, 3],
        (None, 0.8): [1, 2, 3],
        (None, 1.0): [0, 1, 2, 3],
        (2, 0.5): [1],  # 0.4 / 0.7 > 0.5: renormalised before top_p
        (3, 0.5): [1, 3],  # 0.4 / 0.9 < 0.5
    }
    for (top_k, top_p), expected in kept.items():
        found = probabilities(logits, top_k=top_k, top_p=top_p)
        assert found.nonzero().flatten().tolist() == expected, (top_k, top_p)
    ties = torch.zeros(5)
    assert probabilities(ties, top_k=2).tolist() == [0.5, 0.5, 0, 0, 0]
    assert probabilities(ties, top_p=0.5).nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(ties, temperature=0).tolist() == [1, 0, 0, 0, 0]
    assert probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]  # 0.25 + 0.25 reaches 0.5
    many = torch.arange(6000) % 3
    assert probabilities(many.float(), top_k=900).nonzero().flatten().tolist() == list(range(2, 2700, 3))


def test_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    assert torch.allclose(probabilities(logits, temperature=0.5), torch.softmax(2 * logits.double(), 0))
    assert probabilities(logits, temperature=0, top_k=2, top_p=0.5).tolist() == [0, 0, 1]
    assert probabilities(logits, temperature=1e-30).tolist() == [0, 0, 1]
    assert probabilities(torch.tensor([-math.inf, 0.0, 0.0])).tolist() == [0, 0.5, 0.5]
    assert probabilities(torch.tensor([1e4, -1e4], dtype=torch.bfloat16)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, allowed: finite numbers from 0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0, allowed: None or 1 and more"),
        ({"top_p": 0.0}, "top_p: got 0.0, allowed: None or 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_p": math.nan}, "top_p: got nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        probabilities(torch.zeros(3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits(bad: float) -> None:
    for values in ([0.0, bad], [bad, bad]):
        with pytest.raises(ValueError, match="logits: got NaN, \\+inf or nothing but -inf"):
            probabilities(torch.tensor(values))
    with pytest.raises(ValueError, match="logits: got NaN"):
        probabilities(torch.full((3,), -math.inf))
    with pytest.raises(ValueError, match=r"logits: got shape \(1, 3\), allowed: \(vocab,\)"):
        probabilities(torch.zeros(1, 3))


def test_choices_follow_the_distribution() -> None:
    """Pearson's chi-square over 20,000 draws; with 4 degrees of freedom 23.5 is exceeded once in 10,000."""
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.08, 0.02, 0.0], dtype=torch.float64)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(p), dtype=torch.float64)
    for _ in range(draws):
        counts[choose(p, generator)] += 1
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 23.5


def test_choice_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    for uniform, expected in ((0.0, 1), (0.25, 3), (math.nextafter(0.25, 0), 1), (math.nextafter(1, 0), 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor(u, dtype=torch.float64))
        assert choose(p) == expected, uniform


class Recorder:
    """A model whose logits say: after token t comes t + 1. It holds `context` tokens a row and notes its work."""

    continues = True

    def __init__(self, vocab: int, context: int | None = None, scale: float = 50.0) -> None:
        self.vocab, self.context, self.scale = vocab, context, scale
        self.prefills: list[list[list[int]]] = []
        self.steps: list[list[int]] = []

    def _logits(self, last: list[int]) -> torch.Tensor:
        ids = (torch.tensor(last) + 1) % self.vocab
        return self.scale * torch.nn.functional.one_hot(ids, self.vocab)

    def prefill(self, prompts, capacity):
        assert self.context is None or max(map(len, prompts)) <= capacity <= self.context
        self.prefills.append([list(p) for p in prompts])
        return self._logits([p[-1] for p in prompts]), Moves()

    def step(self, state, tokens: torch.Tensor) -> torch.Tensor:
        self.steps.append(tokens.tolist())
        return self._logits(tokens.tolist())


class Moves:
    def reorder(self, rows: torch.Tensor) -> None:
        pass


def test_context_is_the_last_tokens() -> None:
    model = Recorder(10, context=4)
    assert generate(model, [[3, 4]], 5, temperature=0) == [[5, 6, 7, 8, 9]]
    assert model.prefills == [[[3, 4]], [[4, 5, 6, 7]], [[5, 6, 7, 8]]] and model.steps == [[5], [6]]
    model = Recorder(10, context=3)
    assert generate(model, [list(range(9))], 1) == [[9]] and model.prefills == [[[6, 7, 8]]]
    model = Recorder(10, context=4)  # a row that is not full yet is read anew with the one that is
    assert generate(model, [[3, 4, 5], [0]], 3, temperature=0) == [[6, 7, 8], [1, 2, 3]]
    assert model.prefills == [[[3, 4, 5], [0]], [[4, 5, 6, 7], [0, 1, 2]]] and model.steps == [[6, 1]]


def test_stop_and_limits() -> None:
    model = Recorder(10)
    assert generate(model, [[3], [5], [9]], 9, stop={7, 2}) == [[4, 5, 6], [6], [0, 1]]
    assert model.steps == [[4, 6, 0], [5, 1], [6]]  # rows at their end are no longer work
    assert generate(Recorder(10), [[3]], 0) == [[]]
    assert list(stream(Recorder(10), [[3], [6]], 3, stop={7})) == [{0: 4}, {0: 5}, {0: 6}]
    # 9 would come next, but only ids below 8 may be chosen: the rest are all equal
    chosen = generate(Recorder(10), [[7]], 50, temperature=1e9, vocab_size=8)[0]
    assert max(chosen) <= 7 and len(set(chosen)) > 4
    late = generate(Recorder(10), [[3]], 6, temperature=0, stop={5}, min_new_tokens=4)[0]
    assert late[0] == 4 and len(late) >= 4 and 5 not in late
    for prompts, options, message in (
        ([], {}, "prompts: got none"),
        ([[1], []], {}, r"prompts\[1\]: got no token"),
        ([[1, 11]], {"vocab_size": 10}, r"prompts\[0\]: got ids 1 to 11; allowed: 0 to 9"),
        ([[1]], {"generators": []}, "generators: got 0; allowed: one for each of 1 prompts"),
        ([[1]], {"no_repeat_ngram": -1}, "no_repeat_ngram: got -1; allowed: 0 and more"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(Recorder(10), prompts, 1, **options)
    with pytest.raises(ValueError, match="context: got 0; allowed: 1 and more"):
        generate(Recorder(10, context=0), [[1]], 1)


def test_constraints_by_hand() -> None:
    sequences = [[1, 2, 3, 1, 2], [4, 4], [1], []]
    found = constrain(torch.zeros(4, 6), sequences, no_repeat_ngram=3, banned=[5])
    assert [(row == -math.inf).nonzero().flatten().tolist() for row in found] == [[3, 5], [5], [5], [5]]
    found = constrain(torch.zeros(4, 6), sequences, no_repeat_ngram=2)
    assert [(row == -math.inf).nonzero().flatten().tolist() for row in found] == [[3], [4], [], []]
    found = constrain(torch.zeros(4, 6), sequences, no_repeat_ngram=1)
    assert [(row == -math.inf).nonzero().flatten().tolist() for row in found] == [[1, 2, 3], [4], [1], []]


def test_padding_on_either_side() -> None:
    ids = torch.tensor([[0, 0, 1, 2], [3, 4, 0, 0], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert unpadded(ids, mask) == [[1, 2], [3, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="attention_mask: got padding inside of row 0"):
        unpadded(ids[:1], torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 3\) for input_ids \(1, 4\)"):
        unpadded(ids[:1], mask[:1, :3])


def test_each_rows_generator_decides_alone() -> None:
    def run(*seeds: int) -> list[list[int]]:
        model = Recorder(100, context=8, scale=0.0)
        return generate(model, [[0]] * len(seeds), 20, generators=[torch.Generator().manual_seed(s) for s in seeds])

    one, two = run(1), run(2)
    assert run(1) == one != two
    assert run(2, 1, 2) == [two[0], one[0], two[0]]


# --- models


def _random(model: GPT) -> GPT:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


SHAPE = {"vocab_size": 61, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 4}
LLAMA = {"norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2,
         "tie_word_embeddings": False}  # fmt: skip
MODELS = {"gpt2": {}, "llama": LLAMA, "qwen3": LLAMA | {"qk_norm": True, "head_dim": 8}}
PROMPTS = [[5, 9, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8], [44, 44, 17, 5, 60]]
STOPS = [2, 13, 20, 30, 41, 55]


@functools.cache
def _model(name: str) -> GPT:
    return _random(GPT(GPTConfig(**(SHAPE | MODELS[name]))))


@functools.cache
def _theirs(name: str):
    """The same model in transformers, by way of its files."""
    transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")
    with tempfile.TemporaryDirectory() as directory:
        _model(name).save_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.pad_token_id = 0
    return model


def _by_transformers(name: str, prompts: list[list[int]], stop: bool = True, **options) -> list[list[list[int]]]:
    """New tokens of each prompt and hypothesis, from a batch padded on the left."""
    longest, each = max(map(len, prompts)), options.get("num_return_sequences", 1)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = _theirs(name).generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=STOPS if stop else None, pad_token_id=0, **options
    )
    rows = [row[longest:].tolist() for row in out]
    ends = [next((i for i, t in enumerate(row) if stop and t in STOPS), None) for row in rows]
    new = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return [new[i : i + each] for i in range(0, len(new), each)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers(name: str) -> None:
    expected = _by_transformers(name, PROMPTS, stop=False, max_new_tokens=20)
    assert [[row] for row in generate(_model(name), PROMPTS, 20, temperature=0)] == expected
    stopped = _by_transformers(name, PROMPTS, max_new_tokens=20, min_new_tokens=3)
    found = generate(_model(name), PROMPTS, 20, temperature=0, stop=STOPS, min_new_tokens=3)
    assert [[row] for row in found] == stopped
    for prompt in PROMPTS:  # n-grams reach into the prompt, where transformers counts padding
        found = generate(_model(name), [prompt], 30, temperature=0, no_repeat_ngram=2)
        assert [found] == _by_transformers(name, [prompt], stop=False, max_new_tokens=30, no_repeat_ngram_size=2)


BEAMS = {
    "two": {"num_beams": 2},
    "five best of five": {"num_beams": 5, "num_return_sequences": 5},
    "long": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    "short": {"num_beams": 4, "length_penalty": -1.0},
    "no penalty, never": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "num_return_sequences": 3},
    "never": {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 3},
    "early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    "late": {"num_beams": 3, "min_new_tokens": 6, "num_return_sequences": 3},
}


def _options(theirs: dict) -> dict:
    names = {"num_beams": "beams", "num_return_sequences": "n_best", "no_repeat_ngram_size": "no_repeat_ngram"}
    return {names.get(k, k): v for k, v in theirs.items()}


@pytest.mark.parametrize("setting", BEAMS)
@pytest.mark.parametrize("name", MODELS)
def test_beam_search_is_transformers(name: str, setting: str) -> None:
    options = BEAMS[setting]
    expected = _by_transformers(name, PROMPTS, max_new_tokens=12, **options)
    found = beam_search(_model(name), PROMPTS, 12, stop=STOPS, **_options(options))
    assert [[h.tokens for h in hypotheses] for hypotheses in found] == expected
    assert all(a.score >= b.score for hypotheses in found for a, b in itertools.pairwise(hypotheses))
    if setting == "late":
        for prompt in PROMPTS:
            more = {"no_repeat_ngram_size": 2} | options
            theirs = _by_transformers(name, [prompt], max_new_tokens=12, **more)
            ours = beam_search(_model(name), [prompt], 12, stop=STOPS, **_options(more))
            assert [[h.tokens for h in hypotheses] for hypotheses in ours] == theirs


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_log_probabilities(name: str) -> None:
    model = _model(name)
    for penalty in (0.0, 1.0):
        found = beam_search(model, PROMPTS, 7, beams=3, n_best=3, length_penalty=penalty, stop=[STOPS[0]])
        for prompt, hypotheses in zip(PROMPTS, found, strict=True):
            for tokens, score in hypotheses:
                ended = tokens if len(tokens) == 7 else [*tokens, STOPS[0]]
                logits = model(torch.tensor([prompt + ended]))[0].double().log_softmax(-1)
                total = sum(logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(ended))
                assert abs(score - total / len(ended) ** penalty) <= 1e-4


def test_beams_of_everything_are_exhaustive() -> None:
    """As many beams as there are prefixes find the very best, which is computed by trying all."""
    model = _random(GPT(GPTConfig(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2)))
    found = beam_search(model, [[1, 2]], 3, beams=125, n_best=4, stop={4}, length_penalty=0.0)[0]
    every: dict[tuple[int, ...], float] = {}
    for new in itertools.product(range(5), repeat=3):
        cut = new[: new.index(4) + 1] if 4 in new else new
        logits = model(torch.tensor([[1, 2, *cut]]))[0].log_softmax(-1)
        every[cut] = sum(logits[1 + i, t].item() for i, t in enumerate(cut))
    best = sorted(every, key=lambda cut: -every[cut])[:4]
    assert [h.tokens for h in found] == [[t for t in cut if t != 4] for cut in best]
    assert all(abs(h.score - every[cut]) <= 1e-5 for h, cut in zip(found, best, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams: got 0; allowed: 1 and more"),
        ({"beams": 2, "n_best": 3}, "n_best: got 3; allowed: 1 to beams = 2"),
        ({"beams": 2, "early_stopping": "later"}, "early_stopping: got 'later'"),
        ({"beams": 2, "length_penalty": math.nan}, "length_penalty: got nan"),
    ],
)
def test_bad_beam_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(Recorder(10), [[1]], 3, **options)


def test_beam_search_where_nothing_may_follow() -> None:
    """All of three tokens may come once; then every row is at its end, without a stop token."""
    found = beam_search(Recorder(3), [[0]], 9, beams=2, no_repeat_ngram=1)[0]
    assert [h.tokens for h in found] == [[1, 2]]


def test_beams_go_on_beyond_the_context() -> None:
    """One beam is greedy; with the context of 48 full, the last 48 tokens count."""
    model, prompt = _model("gpt2"), list(range(1, 41))
    ids = list(prompt)
    for _ in range(16):
        ids.append(int(model(torch.tensor([ids[-48:]]))[0, -1].argmax()))
    assert beam_search(model, [prompt], 16, beams=1)[0][0].tokens == ids[40:]
    assert generate(model, [prompt, [3]], 16, temperature=0)[0] == ids[40:]


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    """Sampled together or alone, with padding or without, at their ends at different times."""
    model = _model(name)

    def seeds(rows: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in rows]

    together = generate(model, PROMPTS, 20, generators=seeds([0, 1, 2, 3]), stop=STOPS, top_k=20)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 20, generators=seeds([i]), stop=STOPS, top_k=20) == [together[i]]
    assert len({len(row) for row in together}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_work_of_one_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products, by torch's counter, and the shapes that attention gets."""
    from torch.utils.flop_counter import FlopCounterMode

    from fastlm.nn import self_attention

    model, shapes, attention = _model(name), [], self_attention.ops.attention

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options):
        shapes.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(self_attention.ops, "attention", recording)
    logits, state = model.prefill(PROMPTS, 20)
    assert shapes == [(8, 8)] * 2
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n not in ("wpe.weight", "wte.weight"))
    matrices += model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    where = [layer.k.data_ptr() for layer in state.layers]
    for step in range(3):
        shapes.clear()
        with FlopCounterMode(display=False) as counter:
            logits = model.step(state, logits.argmax(-1))
        assert counter.get_total_flops() == 2 * len(PROMPTS) * matrices
        assert shapes == [(1, 9 + step)] * 2
    assert [layer.k.data_ptr() for layer in state.layers] == where, "the cache was allocated anew"


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_backends_step_alike(backend: str) -> None:
    """Two rows of different length: logits of the prompt, of a step, and of one after the rows changed places."""
    model, prompts = _model("qwen3"), [[5, 9, 33], [7]]
    logits = []
    for used in ("reference", backend):
        with fastlm.use_backend(used):
            first, state = model.prefill(prompts, 6)
            second = model.step(state, torch.tensor([4, 8]))
            state.reorder(torch.tensor([1, 0]))
            logits.append(torch.stack((first, second, model.step(state, torch.tensor([2, 3])))))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()
    whole = model(torch.tensor([[7, 8, 2]]))[0, -1]
    assert (logits[1][2, 0] - whole).abs().max() <= 1e-5 * whole.abs().max()


class Translator(Recorder):
    """An encoder-decoder: its output begins anew, and counts up from the number of source tokens."""

    continues = False

    def prefill(self, prompts, capacity):
        self.prefills.append([list(p) for p in prompts])
        return self._logits([len(p) - 1 for p in prompts]), Moves()


def test_encoder_decoders_by_the_same_protocol() -> None:
    model = Translator(10, context=4)
    assert generate(model, [[1, 2], [1, 2, 3]], 3, temperature=0, no_repeat_ngram=1) == [[2, 3, 4], [3, 4, 5]]
    assert len(model.prefills) == 1
    # the context ends the text, as it cannot slide away from its beginning: three steps and the token behind them
    assert generate(Translator(10, context=4), [[1, 2]], 9, temperature=0) == [[2, 3, 4, 5]]
    found = beam_search(Translator(10, context=4), [[1, 2], [1]], 9, beams=2)
    assert [hypotheses[0].tokens for hypotheses in found] == [[2, 3, 4, 5], [1, 2, 3, 4]]


class Bytes:
    """One token a byte, decoded as the real tokenizers do."""

    def decode(self, ids: list[int], errors: str = "strict") -> str:
        return bytes(ids).decode(errors=errors)


def test_text_is_never_cut_inside_a_character() -> None:
    text = "a\u00e9\u20ac\U0001f600z"
    pieces = list(stream_text(Bytes(), text.encode()))
    assert pieces == list(text)  # each as soon as it is whole
    broken = b"a\xe2\x82z\xff\xf0\x9f"
    assert "".join(stream_text(Bytes(), broken)) == broken.decode(errors="replace")
    assert list(stream_text(Bytes(), [])) == []
