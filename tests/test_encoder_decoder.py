"""EncoderDecoder beside transformers' T5 and Marian and torch.nn.Transformer; its files; what it generates."""

from __future__ import annotations

import functools
import json
import math
import tempfile

import pytest
import torch
from models import T5, T5_V1_1, tiny_encoder_decoder, translation_batch

from fastlm.cli import main
from fastlm.engine import gradients
from fastlm.generate import beam_search, generate
from fastlm.models import EncoderDecoder, EncoderDecoderConfig

transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")

T5_SIZES = {
    "vocab_size": 41, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
MARIAN_SIZES = {
    "vocab_size": 41, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "pad_token_id": 40, "decoder_start_token_id": 40, "eos_token_id": 0, "forced_eos_token_id": None,
    "dropout": 0.0,
}  # fmt: skip
PEERS = {
    "t5": ("T5", {}),
    "t5 1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1}),
    "t5 gated silu": ("T5", {"feed_forward_proj": "gated-silu"}),
    "marian": ("Marian", {"scale_embedding": True, "activation_function": "swish"}),
    "marian of two vocabularies": ("Marian", {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 45}),
}


@functools.cache
def _peer(name):
    """transformers' model with random weights everywhere, in evaluation mode."""
    kind, options = PEERS[name]
    torch.manual_seed(0)
    if kind == "T5":
        config = transformers.T5Config(**T5_SIZES, **options)
        model = transformers.T5ForConditionalGeneration(config)
        if options.get("tie_word_embeddings") is False:  # transformers 5 ties it at the start whatever the config says
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    else:
        model = transformers.MarianMTModel(transformers.MarianConfig(**MARIAN_SIZES, **options))
        model.final_logits_bias.normal_()
        for table in (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens):
            table.padding_idx = None  # else the token that starts the decoder has no gradient
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@functools.cache
def _ours(name):
    """The same model here, by way of its files."""
    with tempfile.TemporaryDirectory() as directory:
        _peer(name).save_pretrained(directory)
        return EncoderDecoder.from_pretrained(directory).eval()


def _mask(batch):
    return (torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]).long()


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _of_peer(peer, name):
    """What transformers has for one of our parameters, found without our table of names."""
    stem, kind = name.rsplit(".", 1)
    t5 = hasattr(peer, "shared")
    body = peer if t5 else peer.model
    if stem == "lm_head":
        return peer.lm_head.weight if kind == "weight" else peer.final_logits_bias
    side, rest = stem.split(".", 1) if "." in stem else (stem, "")
    stack = getattr(body, side)
    if rest == "wte":
        return stack.embed_tokens.weight
    if name.endswith("relative_bias"):
        return stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    if rest == "ln_f":
        return stack.final_layer_norm.weight
    _, index, layer = rest.split(".", 2)
    if t5:
        block = stack.block[int(index)].layer
        attention, mlp = block[0].SelfAttention, block[-1].DenseReluDense
        cross = block[1].EncDecAttention if side == "decoder" else attention
        inner = [mlp.wi_0, mlp.wi_1] if hasattr(mlp, "wi_0") else [mlp.wi]
        theirs = {
            "attn.c_attn": [attention.q, attention.k, attention.v], "attn.c_proj": [attention.o], "cross.c_q": [cross.q],
            "cross.c_kv": [cross.k, cross.v], "cross.c_proj": [cross.o], "mlp.c_fc": inner, "mlp.c_proj": [mlp.wo],
            "ln_attn": [block[0].layer_norm], "ln_cross": [block[1].layer_norm], "ln_mlp": [block[-1].layer_norm],
        }[layer]  # fmt: skip
    else:
        block = stack.layers[int(index)]
        attention, cross = block.self_attn, getattr(block, "encoder_attn", block.self_attn)
        theirs = {
            "attn.c_attn": [attention.q_proj, attention.k_proj, attention.v_proj], "attn.c_proj": [attention.out_proj],
            "cross.c_q": [cross.q_proj], "cross.c_kv": [cross.k_proj, cross.v_proj], "cross.c_proj": [cross.out_proj],
            "mlp.c_fc": [block.fc1], "mlp.c_proj": [block.fc2], "ln_attn": [block.self_attn_layer_norm],
            "ln_cross": [getattr(block, "encoder_attn_layer_norm", None)], "ln_mlp": [block.final_layer_norm],
        }[layer]  # fmt: skip
    return [getattr(m, kind) for m in theirs]


@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_transformers(name):
    peer, model, batch = _peer(name), _ours(name), translation_batch()
    bias = getattr(peer, "final_logits_bias", None)
    if bias is not None:  # a buffer there, a parameter here
        bias.requires_grad_(True)
    peer.zero_grad()
    expected = peer(input_ids=batch["input_ids"], attention_mask=_mask(batch), labels=batch["targets"])
    expected.loss.backward()
    ids = model._shifted(batch["targets"], None)
    logits = model(batch["input_ids"], decoder_input_ids=ids, lengths=batch["lengths"])
    assert _relative(logits, expected.logits) <= 1e-5
    loss, grads = gradients(model, batch)
    assert abs(loss.item() - expected.loss.item()) <= 1e-5 * expected.loss.item()
    for parameter, grad in grads.items():
        theirs = _of_peer(peer, parameter)
        theirs = torch.cat([t.grad for t in theirs]) if isinstance(theirs, list) else theirs.grad.view(grad.shape)
        assert _relative(grad, theirs) <= 1e-5, parameter
    trained = [p for p in peer.parameters() if p.requires_grad] + ([] if bias is None else [bias])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in trained)
    if bias is not None:
        bias.requires_grad_(False)
        bias.grad = None


# --- against torch.nn.Transformer


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_agrees_with_torch(pre_norm):
    model = tiny_encoder_decoder(pre_norm=pre_norm, final_norm=True, label_smoothing=0.1)
    c, batch = model.config, translation_batch()
    peer = torch.nn.Transformer(
        c.n_embd, c.n_head, c.n_layer, c.n_layer, c.inner_width, 0.0, "relu", batch_first=True, norm_first=pre_norm
    )
    peer.requires_grad_(True)
    pairs = {}  # our parameters, and theirs that hold the same, one under the other
    for side in ("encoder", "decoder"):
        stack = getattr(peer, side)
        pairs[f"{side}.ln_f"] = [stack.norm]
        for i, layer in enumerate(stack.layers):
            norms = [layer.norm1, layer.norm2] if side == "encoder" else [layer.norm1, layer.norm3, layer.norm2]
            pairs |= {f"{side}.h.{i}.{n}": [m] for n, m in zip(("ln_attn", "ln_mlp", "ln_cross"), norms, strict=False)}
            pairs |= {f"{side}.h.{i}.mlp.c_fc": [layer.linear1], f"{side}.h.{i}.mlp.c_proj": [layer.linear2]}
            pairs[f"{side}.h.{i}.attn.c_proj"] = [layer.self_attn.out_proj]
            if side == "decoder":
                pairs[f"{side}.h.{i}.cross.c_proj"] = [layer.multihead_attn.out_proj]
    ours = dict(model.named_parameters())
    tensors = {f"{n}.{k}": getattr(m, k) for n, (m,) in pairs.items() for k in ("weight", "bias")}
    with torch.no_grad():
        for name, t in tensors.items():
            t.copy_(ours[name])
        for k in ("weight", "bias"):
            for side in ("encoder", "decoder"):
                for i, layer in enumerate(getattr(peer, side).layers):
                    getattr(layer.self_attn, f"in_proj_{k}").copy_(ours[f"{side}.h.{i}.attn.c_attn.{k}"])
                    if side == "decoder":
                        both = [ours[f"{side}.h.{i}.cross.{n}.{k}"] for n in ("c_q", "c_kv")]
                        getattr(layer.multihead_attn, f"in_proj_{k}").copy_(torch.cat(both))
    table = ours["encoder.wte.weight"].detach().clone().requires_grad_()

    def embed(ids):
        """As Vaswani et al., section 3.5, with sines before cosines."""
        place = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        angle = place / 10000 ** (torch.arange(0, c.n_embd, 2) / c.n_embd)
        return table[ids] * math.sqrt(c.n_embd) + torch.cat((angle.sin(), angle.cos()), 1).float()

    source, target = embed(batch["input_ids"]), embed(model._shifted(batch["targets"], None))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    behind = _mask(batch) == 0
    y = peer(source, target, tgt_mask=causal, src_key_padding_mask=behind, memory_key_padding_mask=behind)
    expected = torch.nn.functional.cross_entropy(
        (y @ table.t()).flatten(0, 1), batch["targets"].flatten(), label_smoothing=0.1
    )
    expected.backward()
    loss, grads = gradients(model, batch)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    theirs = {name: t.grad for name, t in tensors.items()} | {"encoder.wte.weight": table.grad}
    for k in ("weight", "bias"):
        for side in ("encoder", "decoder"):
            for i, layer in enumerate(getattr(peer, side).layers):
                theirs[f"{side}.h.{i}.attn.c_attn.{k}"] = getattr(layer.self_attn, f"in_proj_{k}").grad
                if side == "decoder":
                    both = getattr(layer.multihead_attn, f"in_proj_{k}").grad
                    theirs[f"{side}.h.{i}.cross.c_q.{k}"] = both[: c.n_embd]
                    theirs[f"{side}.h.{i}.cross.c_kv.{k}"] = both[c.n_embd :]
    assert set(theirs) == set(grads)
    for name, grad in grads.items():
        assert _relative(grad, theirs[name]) <= 1e-5, name


# --- files


@pytest.mark.parametrize("name", PEERS)
def test_saved_directory_loads_here_and_in_transformers(name, tmp_path):
    peer, model, batch = _peer(name), _ours(name), translation_batch()
    model.save_pretrained(tmp_path)
    again = EncoderDecoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    back = type(peer).from_pretrained(tmp_path).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": _mask(batch), "labels": batch["targets"]}
    with torch.no_grad():
        assert _relative(back(**inputs).logits, peer(**inputs).logits) <= 1e-6


OWN = {
    "transformer": ({}, "marian"),
    "t5": (T5, "t5"),
    "t5 1.1": (T5_V1_1, "t5"),
    "pre-norm": ({"pre_norm": True, "position": "learned"}, "fastlm_encoder_decoder"),
    "untied": ({"tie_source_target": False, "tie_word_embeddings": False}, "fastlm_encoder_decoder"),
    "rms": ({"norm": "rms", "position": "relative", "logit_bias": True}, "fastlm_encoder_decoder"),
    "t5 with other dropout": (T5 | {"attn_pdrop": 0.1}, "fastlm_encoder_decoder"),
}


@pytest.mark.parametrize("variant", OWN)
def test_every_variant_survives_its_own_files(variant, tmp_path):
    options, kind = OWN[variant]
    model, batch = tiny_encoder_decoder(**options).eval(), translation_batch()
    model.save_pretrained(tmp_path)
    again = EncoderDecoder.from_pretrained(tmp_path).eval()
    assert again(**batch).item() == model(**batch).item()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("t5", lambda t: t.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"),
         r"missing: decoder\.block\.1\.layer\.1\.EncDecAttention\.k\.weight \(18, 24\)"),
        ("t5", lambda t: t.update({"encoder.block.2.layer.0.layer_norm.weight": torch.ones(24)}), "unknown: encoder.block.2"),
        ("t5", lambda t: t.update({"encoder.embed_tokens.weight": torch.ones(41, 24)}), "unknown: encoder.embed_tokens"),
        ("t5 1.1", lambda t: t.update({"lm_head.weight": torch.ones(41, 23)}), r"lm_head\.weight: got shape \(41, 23\)"),
        ("marian", lambda t: t.update({"model.decoder.layers.0.fc1.bias": torch.ones(41)}),
         r"model\.decoder\.layers\.0\.fc1\.bias: got shape \(41,\), allowed: \(40,\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(name, change, text, tmp_path):
    from safetensors.torch import load_file, save_file

    _peer(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=text):
        EncoderDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("t5", {"feed_forward_proj": "tanh"}, "feed_forward_proj is 'tanh'; allowed: relu"),
        ("t5", {"d_ff": None}, "d_ff is missing"),
        ("marian", {"decoder_attention_heads": 2}, "decoder_attention_heads is 2; allowed: 3"),
        ("marian", {"normalize_before": True}, "normalize_before is True; allowed: False"),
        ("marian", {"model_type": "bart"}, "model_type is 'bart'; allowed: 't5', 'marian'"),
    ],
)
def test_configs_that_we_do_not_have_are_refused(name, change, text, tmp_path):
    _peer(name).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    with pytest.raises(ValueError, match=text):
        EncoderDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_head": 5}, "n_head: got 5; allowed: a divisor of n_embd = 512"),
        ({"position": "rotary"}, "position: got 'rotary'; allowed: sinusoidal, learned, relative"),
        ({"position": "relative", "relative_buckets": 7}, "relative_buckets: got 7; allowed: an even number"),
        ({"pre_norm": True, "final_norm": False}, "final_norm: got False"),
        ({"target_vocab_size": 5}, "tie_source_target: got True; allowed: False where the vocabularies differ"),
        ({"scale_logits": True, "logit_bias": True}, "logit_bias: got True"),
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0"),
        ({"pad_token_id": 37000}, "pad_token_id: got 37000; allowed: 0 to 36999"),
    ],
)
def test_options_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        EncoderDecoderConfig(**options)


@pytest.mark.parametrize("options", [{}, T5, T5_V1_1], ids=["transformer", "t5", "t5 1.1"])
def test_the_start_is_a_guess(options):
    """A fresh model's loss is about ln(vocab), and grows not much more than its targets' entropy."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = EncoderDecoder(EncoderDecoderConfig(**(options | sizes | {"head_dim": 16, "n_inner": 128})))
    loss = model(**translation_batch(8, 16, 16, 500)).item()
    assert math.log(500) - 0.3 <= loss <= math.log(500) + 1.2


@pytest.mark.parametrize("options", [{"target_vocab_size": 45, "tie_source_target": False}, T5_V1_1])
def test_the_command_line_audits_a_directory(options, tmp_path, capsys):
    tiny_encoder_decoder(**options).save_pretrained(tmp_path)
    arguments = ["audit", "--model-dir", str(tmp_path), "--seq-len", "12", "--batch-size", "4", "--backend", "reference"]
    assert main(arguments) == 0
    assert "0 misses: passed" in capsys.readouterr().out
    assert main(["generate", str(tmp_path)]) == 2
    assert "a model that continues its prompt" in capsys.readouterr().err


# --- generation


GENERATED = ("t5", "t5 1.1", "marian", "marian of two vocabularies")
SOURCES = [[5, 9, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8], [39, 39, 17, 5, 20]]
STOPS = [0, 2, 13, 20, 30]  # T5's start token among them: in its n-grams transformers counts the one at the start
BEAMS = {
    "two": {"num_beams": 2},
    "four best of four": {"num_beams": 4, "num_return_sequences": 4},
    "long, late": {"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 5, "num_return_sequences": 2},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5, "num_return_sequences": 3},
    "early": {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 2},
}


def _by_transformers(name, **options):
    """New tokens of each source and hypothesis, without what ended them."""
    peer, longest = _peer(name), max(map(len, SOURCES))
    pad = peer.config.pad_token_id
    ids = torch.tensor([s + [pad] * (longest - len(s)) for s in SOURCES])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in SOURCES])
    stop = options.pop("stop", STOPS)
    out = peer.generate(
        ids, attention_mask=mask, do_sample=False, eos_token_id=stop or None, forced_eos_token_id=None, bad_words_ids=None,
        pad_token_id=pad, **options,
    )  # fmt: skip
    rows = [row[1:].tolist() for row in out]
    ends = [next((i for i, t in enumerate(row) if t in stop), None) for row in rows]
    new = [row[:end] for row, end in zip(rows, ends, strict=True)]
    each = options.get("num_return_sequences", 1)
    return [new[i : i + each] for i in range(0, len(new), each)]


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_is_transformers(name):
    found = generate(_ours(name), SOURCES, 20, temperature=0)
    assert [[row] for row in found] == _by_transformers(name, max_new_tokens=20, num_beams=1, stop=[])
    stopped = generate(_ours(name), SOURCES, 20, temperature=0, stop=STOPS, min_new_tokens=2)
    assert [[row] for row in stopped] == _by_transformers(name, max_new_tokens=20, num_beams=1, min_new_tokens=2)


@pytest.mark.parametrize("setting", BEAMS)
@pytest.mark.parametrize("name", GENERATED)
def test_beam_search_is_transformers(name, setting):
    theirs = BEAMS[setting]
    names = {"num_beams": "beams", "num_return_sequences": "n_best", "no_repeat_ngram_size": "no_repeat_ngram"}
    ours = {names.get(k, k): v for k, v in theirs.items()}
    found = beam_search(_ours(name), SOURCES, 12, stop=STOPS, **ours)
    assert [[h.tokens for h in hypotheses] for hypotheses in found] == _by_transformers(name, max_new_tokens=12, **theirs)


@pytest.mark.parametrize("name", ["t5 1.1", "marian"])
def test_steps_are_the_whole_pass(name):
    """The logits of step after step, rows reordered on the way, are those of one pass over the whole target."""
    model = _ours(name)
    logits, state = model.prefill(SOURCES, 6)
    order, start = torch.tensor([2, 0, 0]), model.config.decoder_start_token_id
    state.reorder(order)
    tokens = torch.randint(0, 41, (3, 4), generator=torch.Generator().manual_seed(0))
    steps = [logits[order], *[model.step(state, t) for t in tokens.t()]]
    sources = [SOURCES[i] for i in order]
    longest = max(map(len, sources))
    whole = model(
        torch.tensor([s + [3] * (longest - len(s)) for s in sources]), lengths=torch.tensor([len(s) for s in sources]),
        decoder_input_ids=torch.cat((torch.full((3, 1), start), tokens), 1),
    )  # fmt: skip
    assert _relative(torch.stack(steps, 1), whole) <= 1e-5


def test_generation_ends_where_the_positions_end():
    model = tiny_encoder_decoder().eval()
    assert len(generate(model, [[3, 4]], 40, temperature=0)[0]) == 16  # n_positions, the start token's too
    with pytest.raises(ValueError, match="got 17 tokens in a row"):
        generate(model, [[3] * 17], 2)
    assert len(generate(tiny_encoder_decoder(**T5).eval(), [[3] * 17], 40, temperature=0)[0]) == 40
