"""GPTs in directories: the layouts of Hugging Face's GPT-2, Llama, Qwen2 and Qwen3, and one of our own for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import checkpoint
from .gpt_config import GPTConfig

if TYPE_CHECKING:
    from .gpt import GPT

__all__ = ["config_from_hf", "config_to_hf", "load", "save"]

M = TypeVar("M", bound="GPT")

_OWN = "fastlm_gpt"
_LLAMAS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

# Our names of a block's layers, and Llama's; a list where ours holds several of theirs, one under the other.
_LLAMA_LAYERS = {
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
_LLAMA_ENDS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}


def load(cls: type[M], directory: str | Path) -> M:
    """See GPT.from_pretrained."""
    raw = checkpoint.read_config(directory, "gpt2", *_LLAMAS, _OWN)
    config = config_from_hf(raw)
    with torch.device("meta"):
        model = cls(config)
    tensors = checkpoint.read_tensors(directory)
    kind = raw["model_type"]
    if kind == "gpt2":
        tensors = _from_gpt2(config, tensors)
        checkpoint.assign(model, tensors, directory)
        return model
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}  # old files have them
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    checkpoint.assign(model, tensors, directory, _llama_parts(config) if kind in _LLAMAS else None)
    return model


def save(model: GPT, directory: str | Path) -> None:
    """See GPT.save_pretrained."""
    config = model.config
    raw = config_to_hf(config)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if raw["model_type"] == "gpt2":
        state = _to_gpt2(config, state)
    elif raw["model_type"] in _LLAMAS:
        parts = _llama_parts(config)
        pieces = [(parts(n, tuple(t.shape)), t) for n, t in state.items()]
        state = {
            name: piece
            for theirs, t in pieces
            for (name, _), piece in zip(theirs, t.split([s[0] for _, s in theirs]), strict=True)
        }
    checkpoint.write(directory, raw, state)


def _llama_parts(config: GPTConfig) -> checkpoint.Parts:
    """Llama's tensors that make up one of ours."""
    heads = (config.n_head, config.n_kv_head or config.n_head, config.n_kv_head or config.n_head)
    rows = {"attn.c_attn": [n * config.head_width for n in heads], "mlp.c_fc": [config.inner_width] * 2}

    def parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        stem, kind = name.rsplit(".", 1)
        if not stem.startswith("h."):
            return [(f"{_LLAMA_ENDS[stem]}.{kind}", shape)]
        _, index, layer = stem.split(".", 2)
        sizes = rows.get(layer, [shape[0]])
        theirs = _LLAMA_LAYERS[layer]
        return [
            (f"model.layers.{index}.{t}.{kind}", (n, *shape[1:])) for t, n in zip(theirs, sizes, strict=True)
        ]

    return parts


def _is_projection(name: str) -> bool:
    """Whether Hugging Face's GPT-2 keeps this weight as Conv1D does, (in, out)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.t().contiguous() if _is_projection(k) and v.dim() == 2 else v for k, v in tensors.items()}


def _from_gpt2(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    buffers = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry
    tensors = {k: v for k, v in tensors.items() if not k.endswith(buffers)}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if not config.bias:
        tensors = {k: v for k, v in tensors.items() if not (k.endswith(".bias") and not v.any())}
    return _turned(tensors)


def _to_gpt2(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    if not config.bias:
        for name in [n for n in state if n.endswith("weight") and ("ln_" in n or _is_projection(n))]:
            state[name.removesuffix("weight") + "bias"] = state[name].new_zeros(state[name].shape[0])
    return {k if k.startswith("lm_head") else f"transformer.{k}": v for k, v in _turned(state).items()}


# --- config.json


def _layout(c: GPTConfig) -> str:
    """The first layout that has this config's options."""
    defaults = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    changed = {n for n, d in defaults.items() if getattr(c, n) != d}
    biases = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")
    usual_width = c.head_width * c.n_head == c.n_embd
    same_heads = c.n_kv_head in (None, c.n_head) and usual_width
    if not changed & {"norm", "position", "qk_norm", *biases} and same_heads and c.activation in _GELUS.values():
        return "gpt2"
    full = c.rotary_dim in (None, c.head_width)
    if c.norm != "rms" or c.position != "rotary" or c.activation != "swiglu" or not full:
        return _OWN
    qkv, out, mlp = (c.has_bias(part) for part in ("qkv", "out", "mlp"))
    if c.qk_norm:
        return "qwen3" if qkv == out and not mlp else _OWN
    if qkv == out:
        return "llama"
    return "qwen2" if qkv and not mlp and usual_width else _OWN


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The fields of config.json."""
    c, layout = config, _layout(config)
    fields = dataclasses.asdict(c)
    if layout == _OWN:
        return {"architectures": ["GPT"], "model_type": _OWN, **fields}
    if layout == "gpt2":
        activation = {v: k for k, v in reversed(_GELUS.items())}[fields.pop("activation")]
        kept = {k: v for k, v in fields.items() if k in _GPT2_FIELDS}
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": layout, "activation_function": activation, **kept,
        }  # fmt: skip
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    raw = {
        "architectures": [_LLAMAS[layout]],
        "model_type": layout,
        "hidden_act": "silu",
        "num_key_value_heads": c.n_kv_head or c.n_head,
        "intermediate_size": c.inner_width,
        "rope_parameters": rope,
        "embd_pdrop": c.embd_pdrop,  # ours: theirs have dropout of the attention weights only
        "resid_pdrop": c.resid_pdrop,
        **{theirs: fields[ours] for ours, theirs in _LLAMA_FIELDS.items()},
    }
    if layout != "qwen2":
        raw |= {"attention_bias": c.has_bias("qkv"), "head_dim": c.head_width}
    if layout == "llama":
        raw["mlp_bias"] = c.has_bias("mlp")
    return raw


_GPT2_FIELDS = {
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation", "layer_norm_epsilon", "bias",
    "embd_pdrop", "resid_pdrop", "attn_pdrop", "initializer_range", "tie_word_embeddings",
}  # fmt: skip
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "layer_norm_epsilon": "rms_norm_eps",
    "attn_pdrop": "attention_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}


def config_from_hf(raw: Mapping[str, Any]) -> GPTConfig:
    """GPTConfig of a config.json; ValueError for what GPT does not implement."""
    if raw["model_type"] == "gpt2":
        return _gpt2_config(raw)
    if raw["model_type"] in _LLAMAS:
        return _llama_config(raw)
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    return GPTConfig(**{k: v for k, v in raw.items() if k in names})


def _fixed(raw: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if raw.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {raw[key]}; allowed: {value}")


def _gpt2_config(raw: Mapping[str, Any]) -> GPTConfig:
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _GELUS:
        raise ValueError(f"config.json: activation_function is {activation!r}; allowed: {', '.join(_GELUS)}")
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    _fixed(raw, fixed)
    # Hugging Face's defaults where the file is silent
    fields = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1} | {
        k: v for k, v in raw.items() if k in _GPT2_FIELDS
    }
    return GPTConfig(**(fields | {"activation": _GELUS[activation]}))


def _llama_config(raw: Mapping[str, Any]) -> GPTConfig:
    kind = raw["model_type"]
    _fixed(raw, {"hidden_act": "silu", "use_sliding_window": False})
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if k not in raw]
    if missing or "intermediate_size" not in raw:
        raise ValueError(f"config.json: {(missing or ['intermediate_size'])[0]} is missing")
    # newer files keep everything about the rotation in one place, older ones beside each other
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta", 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    _fixed(rope, {"partial_rotary_factor": 1.0})
    bias = bool(raw.get("attention_bias", False))
    defaults = {"tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    fields = {ours: (defaults | dict(raw))[theirs] for ours, theirs in _LLAMA_FIELDS.items()
              if theirs in raw or theirs in defaults}  # fmt: skip
    return GPTConfig(
        **fields,
        n_kv_head=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else None),
        n_inner=raw["intermediate_size"],
        activation="swiglu",
        norm="rms",
        qk_norm=kind == "qwen3",
        position="rotary",
        rope_theta=theta,
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        bias=False,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and kind == "llama",
        embd_pdrop=raw.get("embd_pdrop", 0.0),
        resid_pdrop=raw.get("resid_pdrop", 0.0),
    )
