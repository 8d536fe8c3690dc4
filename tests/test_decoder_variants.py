"""GPT's variants: Llama, Qwen2 and Qwen3 beside transformers', the audit of every switch, and mutants it must catch."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from conftest import BACKENDS_HERE
from models import LLAMA, QWEN3, lm_batch, tiny_gpt

from fastlm import registry
from fastlm.cli import main
from fastlm.engine import audit, gradients
from fastlm.models import GPT, GPTConfig
from fastlm.nn import MLP, RMSNorm, RotaryEmbedding, SelfAttention

transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")

HEADS = {"n_head": 4, "n_kv_head": 2}
VARIANTS = {
    "rms": {"norm": "rms"},
    "rotary": {"position": "rotary"},
    "partial rotary": {"position": "rotary", "rotary_dim": 4, "rope_theta": 100.0},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu", "n_inner": 40},
    "relu squared": {"activation": "relu_squared"},
    "grouped heads": HEADS,
    "one key head of another width": {"n_kv_head": 1, "head_dim": 10},
    "qk norm": {"qk_norm": True},
    "biases by part": {"bias": False, "qkv_bias": True, "norm_bias": True},
    "other biases": {"qkv_bias": False, "norm_bias": False},
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen3 with dropout": QWEN3 | {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_audit_passes(backend, variant, dtype):
    if backend == "triton" and variant != "qwen3 with dropout":
        pytest.skip("the interpreter is slow; the other variants run on the other backends")
    report = audit(tiny_gpt(**VARIANTS[variant]), lm_batch(), dtype, backend)
    assert report.ok, report.table()


def test_exact_in_float64():
    report = audit(tiny_gpt(**VARIANTS["qwen3 with dropout"]), lm_batch(), torch.float64, "reference")
    assert max(r.error for r in report.rows) <= 1e-14, report.table()


@pytest.mark.parametrize("what", ["mlp", "block"])
def test_recomputing_changes_no_gradient(what):
    model, batch = tiny_gpt(**QWEN3), lm_batch()
    expected = gradients(model, batch)[1]
    model.recompute = what
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model, batch)[1].items())


# --- against transformers


SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
PEERS = {
    "llama": ("Llama", {}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
}


def _peer(name):
    """transformers' model with random weights everywhere."""
    kind, options = PEERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _peer_gradient(peer, name):
    """What transformers has for one of our parameters, found without our table of names."""
    modules = dict(peer.named_modules())
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("h."):
        ends = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
        return getattr(modules[ends[stem]], kind).grad
    layer, stem = modules[f"model.layers.{stem.split('.')[1]}"], stem.split(".", 2)[2]
    attention, mlp = layer.self_attn, layer.mlp
    theirs = {
        "ln_1": [layer.input_layernorm], "ln_2": [layer.post_attention_layernorm],
        "attn.c_attn": [attention.q_proj, attention.k_proj, attention.v_proj], "attn.c_proj": [attention.o_proj],
        "attn.q_norm": [getattr(attention, "q_norm", None)], "attn.k_norm": [getattr(attention, "k_norm", None)],
        "mlp.c_fc": [mlp.gate_proj, mlp.up_proj], "mlp.c_proj": [mlp.down_proj],
    }[stem]  # fmt: skip
    return torch.cat([getattr(m, kind).grad for m in theirs])


@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_transformers(name, tmp_path):
    peer, batch = _peer(name), lm_batch()
    peer.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    expected_logits = peer(batch["input_ids"]).logits
    assert _relative(model(batch["input_ids"]), expected_logits) <= 1e-5
    expected = torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), batch["targets"].flatten())
    expected.backward()
    loss, grads = gradients(model, batch)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    for parameter, grad in grads.items():
        theirs = _peer_gradient(peer, parameter)
        assert _relative(grad, theirs) <= 1e-5, parameter
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize("name", PEERS)
def test_saved_directory_loads_here_and_in_transformers(name, tmp_path):
    peer, batch = _peer(name), lm_batch()
    peer.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    back = type(peer).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in peer.state_dict().items())
    assert _relative(back(batch["input_ids"]).logits, peer(batch["input_ids"]).logits) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_its_own_files(variant, tmp_path):
    model, ids = tiny_gpt(**VARIANTS[variant]).eval(), lm_batch()["input_ids"]
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids), model(ids))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    expected = {"llama": "llama", "qwen3": "qwen3", "qwen3 with dropout": "qwen3"}
    assert kind == expected.get(variant, "fastlm_gpt")


def test_shards_and_old_configs(tmp_path):
    """Weights in several files that an index names, the rotation's options as files before 2025 have them."""
    peer = _peer("llama 3.1")
    peer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = lm_batch()["input_ids"]
    assert _relative(GPT.from_pretrained(tmp_path)(ids), peer(ids).logits) <= 1e-5
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        GPT.from_pretrained(tmp_path)


def _edit(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: model\.layers\.1\.mlp\.up_proj\.weight \(40, 24\)"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), r"unknown: model\.layers\.2\.mlp"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(24, 24)}),
            r"model\.layers\.0\.self_attn\.k_proj\.weight: got shape \(24, 24\), allowed: \(12, 24\)",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, text, tmp_path):
    _peer("llama").save_pretrained(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=text):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu; allowed: silu"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(change, text, tmp_path):
    _peer("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=text):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_kv_head": 5}, "n_kv_head: got 5; allowed: a divisor of n_head = 3"),
        ({"norm": "batch"}, "norm: got 'batch'; allowed: layer, rms"),
        ({"position": "rotary", "rotary_dim": 10}, "rotary_dim: got 10; allowed: an even number from 2 to head_dim = 8"),
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"head_dim": 0}, "head_dim: got 0"),
    ],
)
def test_options_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        GPTConfig(vocab_size=61, n_embd=24, n_head=3, **options)


def test_packed_documents_do_not_see_each_other():
    model = tiny_gpt(**QWEN3).eval()
    ids = lm_batch(1, 8)["input_ids"]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    y = model(ids, segment_ids=segments, positions=positions)
    apart = torch.cat([model(ids[:, :3]), model(ids[:, 3:])], 1)
    assert _relative(y, apart) <= 1e-6
    assert audit(model, lm_batch(1, 8) | {"segment_ids": segments, "positions": positions}).ok


def test_compiles_whole():
    model, batch = tiny_gpt(**QWEN3, n_layer=1), lm_batch()
    expected = model(**batch)
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()


# --- the command line


def test_audit_reaches_the_variants(capsys):
    shape = ["--norm", "rms", "--position", "rotary", "--mlp", "swiglu", "--kv-heads", "1", "--qk-norm"]
    assert main(["audit", "--preset", "tiny", "--seq-len", "8", "--backend", "reference", *shape]) == 0
    said = capsys.readouterr().out
    assert "h.1.attn.k_norm.weight" in said and "wpe" not in said and "passed" in said
    assert main(["audit", "--preset", "tiny", "--kv-heads", "3"]) == 2
    assert "--kv-heads: got 3, allowed: divisors of --n-head 2" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--position", "rotary", "--n-embd", "34"]) == 2
    assert "--n-embd: got 34, allowed: multiples of 4, as --position rotary" in capsys.readouterr().err


def test_train_reaches_the_variants(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    run = ["--out", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--tokenizer", "bytes"]
    shape = ["--norm", "rms", "--position", "rotary", "--mlp", "swiglu", "--kv-heads", "1", "--qk-norm", "--no-bias"]
    few = ["--steps", "2", "--warmup", "1", "--seq-len", "16", "--batch-size", "2", "--sample-tokens", "0"]
    assert main(["train", "--preset", "tiny", *run, *few, *shape]) == 0
    raw = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert raw["model_type"] == "qwen3" and raw["num_key_value_heads"] == 1
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.tie_word_embeddings


# --- mutants: each breaks one thing by `patch`, pytest's monkeypatch


def _op(patch, name, **fields):
    op = registry.get(name)
    for field, make in fields.items():
        patch.setitem(op.__dict__, field, functools.partial(make, getattr(op, field)))


def _dk_of_one_query_head(original, *args):
    """The sum over the query heads that read a key head is lost: only the first of each group counts."""
    dout, dlse, q, k, v, *rest = args
    heads = torch.zeros(q.shape[1])
    heads[:: q.shape[1] // k.shape[1]] = 1
    return original(dout * heads[:, None, None].to(dout.dtype), dlse, q, k, v, *rest)


def lost_sum_over_the_group_in_dk(patch):
    def backward(original, *args):
        dq, _, *rest = original(*args)
        return dq, _dk_of_one_query_head(original, *args)[1], *rest

    _op(patch, "attention", backward=backward)


def lost_sum_over_the_group_in_dv(patch):
    def backward(original, *args):
        dq, dk, _, *rest = original(*args)
        return dq, dk, _dk_of_one_query_head(original, *args)[2], *rest

    _op(patch, "attention", backward=backward)


def rotary_turned_on_instead_of_back(patch):
    def backward(original, dy, cos, sin, *rest):
        return original(dy, cos, -sin, *rest)

    _op(patch, "rotary_embedding", backward=backward)


def rotary_of_keys_not_turned_back(patch):
    original = RotaryEmbedding.backward

    def backward(self, dy, tape, seq_dim=-2, into=None):
        if dy.shape[-2] == 2:  # key heads
            tape.pop("rotary_embedding")
            return dy
        return original(self, dy, tape, seq_dim, into)

    patch.setattr(RotaryEmbedding, "backward", backward)


def lost_weight_gradient_of_qk_norm(patch):
    original = RMSNorm.backward

    def backward(self, dy, tape):
        lost = self.normalized_shape == (8,) and dy.shape[-2] == 2  # a head's width, of the key heads
        return tape.backward("rms_norm", dy) if lost else original(self, dy, tape)

    patch.setattr(RMSNorm, "backward", backward)


def norms_of_queries_and_keys_exchanged(patch):
    original = SelfAttention.backward

    def backward(self, dy, tape, **options):
        self.q_norm, self.k_norm = self.k_norm, self.q_norm
        try:
            return original(self, dy, tape, **options)
        finally:
            self.q_norm, self.k_norm = self.k_norm, self.q_norm

    patch.setattr(SelfAttention, "backward", backward)


def gate_and_up_exchanged(patch):
    original = MLP.backward

    def backward(self, dy, tape):
        saved = tape.linear_backward

        def linear_backward(dh, weight, *rest, **more):
            if weight is self.c_fc.weight:
                dh = torch.cat(dh.chunk(2, -1)[::-1], -1)
            return saved(dh, weight, *rest, **more)

        tape.linear_backward = linear_backward
        try:
            return original(self, dy, tape)
        finally:
            tape.linear_backward = saved

    patch.setattr(MLP, "backward", backward)


def gradient_of_rms_norm_one_percent_off(patch):
    def backward(original, dy, d_sum, *rest):
        dx, *others = original(dy, d_sum, *rest)
        return (dx * 1.01, *others)

    _op(patch, "add_rms_norm", backward=backward)


MUTANTS = [
    lost_sum_over_the_group_in_dk,
    lost_sum_over_the_group_in_dv,
    rotary_turned_on_instead_of_back,
    rotary_of_keys_not_turned_back,
    lost_weight_gradient_of_qk_norm,
    norms_of_queries_and_keys_exchanged,
    gate_and_up_exchanged,
    gradient_of_rms_norm_one_percent_off,
]


@functools.cache
def _healthy(dtype):
    return audit(tiny_gpt(**QWEN3), lm_batch(batch=4, seq=12), dtype, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_catches(mutant, dtype, monkeypatch):
    assert _healthy(dtype).ok, _healthy(dtype).table()
    mutant(monkeypatch)
    report = audit(tiny_gpt(**QWEN3), lm_batch(batch=4, seq=12), dtype, "reference")
    assert not report.ok, f"{mutant.__name__} went through\n{report.table(5)}"
