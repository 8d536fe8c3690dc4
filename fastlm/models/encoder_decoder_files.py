"""Encoder-decoders in directories: the layouts of Hugging Face's T5 and Marian, and one of our own for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import checkpoint
from .encoder_decoder_config import EncoderDecoderConfig

if TYPE_CHECKING:
    from .encoder_decoder import EncoderDecoder

__all__ = ["MODEL_TYPES", "config_from_hf", "config_to_hf", "load", "read_shape", "save"]

M = TypeVar("M", bound="EncoderDecoder")

_OWN = "fastlm_encoder_decoder"
MODEL_TYPES = ("t5", "marian", _OWN)
_T5_ACTIVATIONS = {  # "gated-gelu" is of tanh's form, as transformers has it
    "relu": "relu", "gated-relu": "reglu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gated-gelu": "geglu_tanh",
    "silu": "silu", "gated-silu": "swiglu",
}  # fmt: skip
_MARIAN_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
}

# Where a layer of ours lies in a block of theirs; a list where ours holds several, one under the other. In T5 {mlp}
# counts the layers of a block.
_T5_LAYERS = {
    "ln_attn": ["layer.0.layer_norm"],
    "attn.c_attn": [f"layer.0.SelfAttention.{t}" for t in "qkv"],
    "attn.c_proj": ["layer.0.SelfAttention.o"],
    "ln_cross": ["layer.1.layer_norm"],
    "cross.c_q": ["layer.1.EncDecAttention.q"],
    "cross.c_kv": [f"layer.1.EncDecAttention.{t}" for t in "kv"],
    "cross.c_proj": ["layer.1.EncDecAttention.o"],
    "ln_mlp": ["layer.{mlp}.layer_norm"],
    "mlp.c_proj": ["layer.{mlp}.DenseReluDense.wo"],
}
_MARIAN_LAYERS = {
    "attn.c_attn": [f"self_attn.{t}_proj" for t in "qkv"],
    "attn.c_proj": ["self_attn.out_proj"],
    "ln_attn": ["self_attn_layer_norm"],
    "cross.c_q": ["encoder_attn.q_proj"],
    "cross.c_kv": [f"encoder_attn.{t}_proj" for t in "kv"],
    "cross.c_proj": ["encoder_attn.out_proj"],
    "ln_cross": ["encoder_attn_layer_norm"],
    "mlp.c_fc": ["fc1"],
    "mlp.c_proj": ["fc2"],
    "ln_mlp": ["final_layer_norm"],
}
_SHARED = {  # places of one tensor, any of which a file may hold
    "t5": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "marian": ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
}


def read_shape(directory: str | Path) -> EncoderDecoderConfig:
    """What config.json says. Whether the head of an old T5 is tied, only its weights tell."""
    return config_from_hf(checkpoint.read_config(directory, *MODEL_TYPES))


def load(cls: type[M], directory: str | Path) -> M:
    """See EncoderDecoder.from_pretrained."""
    raw = checkpoint.read_config(directory, *MODEL_TYPES)
    tensors = checkpoint.read_tensors(directory)
    kind = raw["model_type"]
    if kind in _SHARED:
        raw, tensors = _without_copies(raw, tensors)
    config = config_from_hf(raw)
    with torch.device("meta"):
        model = cls(config)
    parts = None if kind == _OWN else _t5_parts(config) if kind == "t5" else _marian_parts(config)
    if kind == "marian":
        tensors = {k: v for k, v in tensors.items() if not k.endswith("embed_positions.weight")}  # constants
        name = "final_logits_bias"
        if config.logit_bias:
            tensors.setdefault(name, torch.zeros(1, config.decoder_vocab_size))
            tensors[name] = tensors[name].flatten()
        elif name in tensors and not tensors[name].any():
            del tensors[name]
    checkpoint.assign(model, tensors, directory, parts)
    return model


def save(model: EncoderDecoder, directory: str | Path) -> None:
    """See EncoderDecoder.save_pretrained."""
    config = model.config
    raw = config_to_hf(config)
    state = {name: p.detach() for name, p in model.named_parameters()}  # each once
    kind = raw["model_type"]
    if kind != _OWN:
        parts = _t5_parts(config) if kind == "t5" else _marian_parts(config)
        pieces = [(parts(n, tuple(t.shape)), t) for n, t in state.items()]
        state = {
            name: piece
            for theirs, t in pieces
            for (name, _), piece in zip(theirs, t.split([s[0] for _, s in theirs]), strict=True)
        }
    if kind == "marian":
        bias = state.get("final_logits_bias", torch.zeros(config.decoder_vocab_size))
        state["final_logits_bias"] = bias[None]
    checkpoint.write(directory, raw, state)


def _without_copies(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tied weights by one name, and in the config whether the head of T5 is tied, which old and new files say differently.

    A copy that differs from what it should be stays, and is then an unknown tensor.
    """
    raw, tensors = dict(raw), dict(tensors)
    first, *others = _SHARED[raw["model_type"]]
    head = "lm_head.weight"
    if raw["model_type"] == "t5":
        scaled = bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))
        tied = bool(raw.get("tie_word_embeddings", True))
    else:
        scaled, tied = False, True
    if not raw.get("share_encoder_decoder_embeddings", True):
        first, others = others[1], []
    for name in [n for n in (*others, head) if n in tensors]:
        if first not in tensors and name != head:
            tensors[first] = tensors.pop(name)
        elif first in tensors and torch.equal(tensors[first], tensors[name]) and (tied or name != head):
            del tensors[name]
    if raw["model_type"] == "t5":
        tied = tied and head not in tensors
    elif first not in tensors and head in tensors:
        tensors[first] = tensors.pop(head)
    return raw | {"tied": tied, "scaled": scaled}, tensors


def _parts(layers: Mapping[str, list[str]], ends: Mapping[str, str], block: str) -> checkpoint.Parts:
    """layers: as _T5_LAYERS; ends: names outside of the blocks; block: where their blocks lie, by side and number."""

    def parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        stem, kind = name.rsplit(".", 1)
        if name in ends:
            return [(ends[name], shape)]
        side, _, index, layer = stem.split(".", 3)
        theirs = layers[layer]
        rows = (shape[0] // len(theirs), *shape[1:])
        place = block.format(side=side, index=index)
        return [(f"{place}.{t.format(mlp=1 if side == 'encoder' else 2)}.{kind}", rows) for t in theirs]

    return parts


def _t5_parts(config: EncoderDecoderConfig) -> checkpoint.Parts:
    """T5's tensors that make up one of ours."""
    wi = ["wi_0", "wi_1"] if config.is_gated else ["wi"]
    layers = _T5_LAYERS | {"mlp.c_fc": [f"layer.{{mlp}}.DenseReluDense.{t}" for t in wi]}
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ends = {"encoder.wte.weight": "shared.weight", "lm_head.weight": "lm_head.weight"}
    for side in ("encoder", "decoder"):
        ends |= {f"{side}.relative_bias": f"{side}.{bias}", f"{side}.ln_f.weight": f"{side}.final_layer_norm.weight"}
    return _parts(layers, ends, "{side}.block.{index}")


def _marian_parts(config: EncoderDecoderConfig) -> checkpoint.Parts:
    """Marian's tensors that make up one of ours."""
    shared, source, target = _SHARED["marian"]
    ends = {"lm_head.bias": "final_logits_bias", "decoder.wte.weight": target}
    ends["encoder.wte.weight"] = shared if config.tie_source_target else source
    return _parts(_MARIAN_LAYERS, ends, "model.{side}.layers.{index}")


# --- config.json


def _layout(c: EncoderDecoderConfig) -> str:
    """The layout that has this config's options."""
    if c.embd_pdrop != c.resid_pdrop:
        return _OWN
    same_dropout = c.attn_pdrop == c.inner_pdrop == c.final_pdrop == c.resid_pdrop
    if (
        c.norm == "rms" and c.position == "relative" and c.pre_norm and not c.bias and not c.scale_attention
        and not c.scale_embedding and not c.logit_bias and c.tie_source_target and same_dropout
        and c.activation in _T5_ACTIVATIONS.values() and c.scale_logits == c.tie_word_embeddings
    ):  # fmt: skip
        return "t5"
    if (
        c.norm == "layer" and c.position == "sinusoidal" and not c.pre_norm and not c.has_final_norm and c.bias
        and c.scale_attention and not c.scale_logits and c.tie_word_embeddings and not c.final_pdrop
        and c.layer_norm_epsilon == 1e-5 and c.head_width * c.n_head == c.n_embd
        and c.activation in _MARIAN_ACTIVATIONS.values()
    ):  # fmt: skip
        return "marian"
    return _OWN


_SAME = {  # config.json's names of ours
    "t5": {
        "vocab_size": "vocab_size", "d_model": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
        "relative_attention_num_buckets": "relative_buckets", "relative_attention_max_distance": "relative_max_distance",
        "layer_norm_epsilon": "layer_norm_epsilon", "dropout_rate": "resid_pdrop",
    },
    "marian": {
        "vocab_size": "vocab_size", "max_position_embeddings": "n_positions", "d_model": "n_embd",
        "encoder_layers": "n_layer", "encoder_attention_heads": "n_head", "scale_embedding": "scale_embedding",
        "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop", "activation_dropout": "inner_pdrop",
    },
}  # fmt: skip
_KEPT = ("label_smoothing", "initializer", "pad_token_id", "decoder_start_token_id", "eos_token_id")
# Hugging Face's defaults where the file is silent
_DEFAULTS = {
    "t5": {
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1, "feed_forward_proj": "relu", "d_kv": 64, "initializer": "t5", "pad_token_id": 0,
        "decoder_start_token_id": 0, "eos_token_id": 1,
    },
    "marian": {
        "max_position_embeddings": 1024, "scale_embedding": False, "dropout": 0.1, "attention_dropout": 0.0,
        "activation_dropout": 0.0, "activation_function": "gelu", "share_encoder_decoder_embeddings": True,
        "logit_bias": True, "pad_token_id": 58100, "decoder_start_token_id": 58100, "eos_token_id": 0,
    },
}  # fmt: skip
_REQUIRED = {
    "t5": ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"),
    "marian": ("vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
}


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The fields of config.json."""
    c, layout = config, _layout(config)
    if layout == _OWN:
        return {"architectures": ["EncoderDecoder"], "model_type": _OWN, **dataclasses.asdict(c)}
    raw: dict[str, Any] = {"model_type": layout, "is_encoder_decoder": True}
    raw |= {theirs: getattr(c, ours) for theirs, ours in _SAME[layout].items()}
    raw |= {name: getattr(c, name) for name in _KEPT}
    activations = _T5_ACTIVATIONS if layout == "t5" else _MARIAN_ACTIVATIONS
    activation = {ours: theirs for theirs, ours in reversed(activations.items())}[c.activation]
    if layout == "t5":
        return raw | {
            "architectures": ["T5ForConditionalGeneration"], "d_kv": c.head_width, "d_ff": c.inner_width,
            "num_decoder_layers": c.decoder_layers, "feed_forward_proj": activation,
            "tie_word_embeddings": c.tie_word_embeddings,
        }  # fmt: skip
    return raw | {
        "architectures": ["MarianMTModel"], "activation_function": activation, "logit_bias": c.logit_bias,
        "decoder_layers": c.decoder_layers, "encoder_ffn_dim": c.inner_width, "decoder_ffn_dim": c.inner_width,
        "decoder_attention_heads": c.n_head, "share_encoder_decoder_embeddings": c.tie_source_target,
        "decoder_vocab_size": c.decoder_vocab_size, "tie_word_embeddings": True,
    }  # fmt: skip


def config_from_hf(raw: Mapping[str, Any]) -> EncoderDecoderConfig:
    """EncoderDecoderConfig of a config.json; ValueError for what EncoderDecoder does not implement."""
    kind = raw["model_type"]
    if kind == _OWN:
        names = {f.name for f in dataclasses.fields(EncoderDecoderConfig)}
        return EncoderDecoderConfig(**{k: v for k, v in raw.items() if k in names})
    if missing := [k for k in _REQUIRED[kind] if k not in raw]:
        raise ValueError(f"config.json: {missing[0]} is missing")
    given = _DEFAULTS[kind] | {k: v for k, v in raw.items() if v is not None}
    fields = {ours: given[theirs] for theirs, ours in _SAME[kind].items()}
    fields |= {name: given[name] for name in _KEPT if name in given}
    if kind == "t5":
        return _t5_config(given, fields)
    return _marian_config(given, fields)


def _t5_config(given: Mapping[str, Any], fields: dict[str, Any]) -> EncoderDecoderConfig:
    p, tied = given["dropout_rate"], bool(given.get("tied", given.get("tie_word_embeddings", True)))
    return EncoderDecoderConfig(
        **fields,
        n_decoder_layer=given.get("num_decoder_layers"),
        head_dim=given["d_kv"],
        n_inner=given["d_ff"],
        activation=_activation("feed_forward_proj", given["feed_forward_proj"], _T5_ACTIVATIONS),
        position="relative",
        norm="rms",
        pre_norm=True,
        bias=False,
        scale_attention=False,
        scale_embedding=False,
        scale_logits=bool(given.get("scaled", tied)),
        tie_word_embeddings=tied,
        embd_pdrop=p,
        attn_pdrop=p,
        inner_pdrop=p,
        final_pdrop=p,
    )


def _marian_config(given: Mapping[str, Any], fields: dict[str, Any]) -> EncoderDecoderConfig:
    for ours, theirs in (("encoder_attention_heads", "decoder_attention_heads"), ("encoder_ffn_dim", "decoder_ffn_dim")):
        if given.get(theirs, given[ours]) != given[ours]:
            raise ValueError(f"config.json: {theirs} is {given[theirs]}; allowed: {given[ours]}, as {ours}")
    fixed = {
        "tie_word_embeddings": True, "normalize_before": False, "normalize_embedding": False,
        "add_final_layer_norm": False, "add_bias_logits": False, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    }  # fmt: skip
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {given[key]}; allowed: {value}")
    return EncoderDecoderConfig(
        **fields,
        target_vocab_size=given.get("decoder_vocab_size"),
        n_decoder_layer=given.get("decoder_layers"),
        n_inner=given["encoder_ffn_dim"],
        activation=_activation("activation_function", given["activation_function"], _MARIAN_ACTIVATIONS),
        tie_source_target=given["share_encoder_decoder_embeddings"],
        logit_bias=given["logit_bias"],
        embd_pdrop=given["dropout"],
    )


def _activation(key: str, name: str, known: Mapping[str, str]) -> str:
    if name not in known:
        raise ValueError(f"config.json: {key} is {name!r}; allowed: {', '.join(known)}")
    return known[name]
