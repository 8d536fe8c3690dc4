"""GPT against Hugging Face's GPT-2, an independent implementation: outputs, gradients, training and files."""

from __future__ import annotations

import json

import pytest
import torch
from models import TINY, lm_batch, tiny_gpt

from fastlm.engine import AdamWConfig, Engine, gradients
from fastlm.models import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")


def hf_gpt2(seed: int = 0, **options):
    """transformers' GPT-2 with random weights everywhere."""
    torch.manual_seed(seed)
    zero = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(TINY | zero | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def hf_loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "options", [{}, {"n_inner": 40, "activation_function": "gelu"}, {"tie_word_embeddings": False}], ids=str
)
def test_agrees_with_transformers(options, tmp_path):
    peer, batch = hf_gpt2(**options), lm_batch()
    peer.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert _relative(model(batch["input_ids"]), peer(batch["input_ids"]).logits) <= 1e-5
    expected = hf_loss(peer, batch)
    expected.backward()
    loss, grads = gradients(model, batch)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    own = dict(peer.named_parameters())
    for name, grad in grads.items():
        theirs = own[name if name.startswith("lm_head") else f"transformer.{name}"].grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            theirs = theirs.t()
        if name.endswith("c_attn.bias"):  # the gradient of the keys' bias is 0 but for rounding
            third = len(theirs) // 3
            assert theirs[third : 2 * third].abs().max() <= 1e-6 >= grad[third : 2 * third].abs().max()
        assert _relative(grad, theirs) <= 1e-5, name


def test_ten_steps_agree_with_transformers(tmp_path):
    peer = hf_gpt2()
    peer.save_pretrained(tmp_path)
    engine = Engine(GPT.from_pretrained(tmp_path), AdamWConfig(lr=3e-3, max_norm=1.0, weight_decay=0.1))
    matrices = [p for p in peer.parameters() if p.dim() >= 2]
    vectors = [p for p in peer.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(10):
        batch = lm_batch(batch=4, seq=12, seed=step)
        expected = hf_loss(peer, batch)
        adamw.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        loss = engine.step(
            [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
        ).loss.item()
        assert abs(loss - expected.item()) <= 1e-4 * expected.item(), step


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"bias": False}], ids=str)
def test_saved_directory_loads_here_and_in_transformers(options, tmp_path):
    model, batch = tiny_gpt(**options), lm_batch()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    logits = model(batch["input_ids"])
    if options.get("bias", True):
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (
        torch.equal(again(batch["input_ids"]), logits) or _relative(again(batch["input_ids"]), logits) <= 1e-6
    )
    assert _relative(peer.eval()(batch["input_ids"]).logits, logits) <= 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def _edit(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), r"missing: h\.1\.ln_2\.bias \(24,\)"),
        (lambda t: t.update(extra=torch.ones(2)), r"unknown: extra \(2,\)"),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.ones(25)}),
            r"ln_f\.weight: got shape \(25,\), allowed: \(24,\)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.ones(24, dtype=torch.int32)}),
            r"ln_f\.weight: got dtype torch.int32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, text, tmp_path):
    tiny_gpt().save_pretrained(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=text):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("model_type", "bert", "model_type is 'bert'; allowed: 'gpt2', 'llama'"),
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
        ("n_head", 7, "n_head: got 7"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(field, value, text, tmp_path):
    tiny_gpt().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match=text):
        GPT.from_pretrained(tmp_path)


def test_truncated_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        GPT.from_pretrained(tmp_path)
    tiny_gpt().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        GPT.from_pretrained(tmp_path)


def test_compiles_whole_and_runs_under_autocast():
    model, batch = tiny_gpt(), lm_batch()
    expected = model(**batch)
    expected.backward()
    reference = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch)
    loss.backward()
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    for name, p in model.named_parameters():
        assert _relative(p.grad, reference[name]) <= 1e-5, name
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    mixed.backward()
    assert abs(mixed.item() - expected.item()) <= 0.02 * expected.item()
    assert all(
        _relative(p.grad, reference[n]) <= 0.1 for n, p in model.named_parameters() if "c_attn.bias" not in n
    )


def test_causality():
    """A later token changes no earlier logit."""
    model, ids = tiny_gpt().eval(), lm_batch()["input_ids"]
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % TINY["vocab_size"]
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4], b[:, 4])


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_positions=64))
    std = {n: p.std().item() for n, p in model.named_parameters()}
    assert abs(std["wte.weight"] - 0.02) <= 1e-3 and abs(std["h.0.attn.c_attn.weight"] - 0.02) <= 1e-3
    assert abs(std["h.3.mlp.c_proj.weight"] - 0.02 / 8**0.5) <= 5e-4
    assert all(
        (p == (1 if n.endswith("weight") else 0)).all() for n, p in model.named_parameters() if "ln_" in n
    )
