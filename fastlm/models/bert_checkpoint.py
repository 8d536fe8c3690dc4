"""BERT to and from Hugging Face directories: names, the three projections of a layer that we hold as one, configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from . import checkpoint
from .bert import BERTConfig

__all__ = ["config_from_hf", "config_to_hf", "load", "read_config", "save"]

M = TypeVar("M", bound=nn.Module)

_OURS = "fastlm-bert"  # pre-norm or rotary: what Hugging Face's BERT would load and compute something else with
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ARCHITECTURES = {
    "BERT": "BertModel",
    "BERTForMaskedLM": "BertForMaskedLM",
    "BERTForPreTraining": "BertForPreTraining",
    "BERTForQuestionAnswering": "BertForQuestionAnswering",
    "BERTForSentenceEmbedding": "BertModel",
    "BERTForSequenceClassification": "BertForSequenceClassification",
    "BERTForTokenClassification": "BertForTokenClassification",
}
_HEADS = ("pooler.", "cls.", "classifier.", "qa_outputs.")
_BIAS, _DECODER = "cls.predictions.bias", "cls.predictions.decoder."
_QKV = ("query", "key", "value")

_NAMES = (
    ("encoder.embeddings.norm.", "embeddings.LayerNorm."),
    ("encoder.embeddings.", "embeddings."),
    ("encoder.norm.", "encoder.LayerNorm."),
    ("head.dense.", "cls.predictions.transform.dense."),
    ("head.norm.", "cls.predictions.transform.LayerNorm."),
    ("head.bias", "cls.predictions.bias"),
    ("head.decoder", "cls.predictions.decoder.weight"),
    ("next_sentence.", "cls.seq_relationship."),
)
_LAYER_NAMES = (
    ("attn.c_proj.", "attention.output.dense."),
    ("ln_1.", "attention.output.LayerNorm."),
    ("mlp.c_fc.", "intermediate.dense."),
    ("mlp.c_proj.", "output.dense."),
    ("ln_2.", "output.LayerNorm."),
)


def _theirs(name: str) -> list[str]:
    """Hugging Face's names, without "bert.", of what is one parameter here."""
    if name.startswith("encoder.layers."):
        number, _, rest = name.removeprefix("encoder.layers.").partition(".")
        layer = f"encoder.layer.{number}."
        if rest.startswith("attn.c_attn."):
            return [f"{layer}attention.self.{part}.{rest.removeprefix('attn.c_attn.')}" for part in _QKV]
        return [layer + _renamed(rest, _LAYER_NAMES)]
    return [_renamed(name, _NAMES)]


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    return next((theirs + name.removeprefix(ours) for ours, theirs in names if name.startswith(ours)), name)


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The same with their shapes."""
    names = _theirs(name)
    return [(n, (shape[0] // len(names), *shape[1:])) for n in names]


def load(model: M, directory: str | Path, strict: bool) -> M:
    """Give an initialised model a directory's tensors; `from_pretrained` of the models says how."""
    tensors = {name.removeprefix("bert."): t for name, t in checkpoint.read_tensors(directory).items()}
    old = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    for before, now in old:
        tensors = {name.replace(before, now): t for name, t in tensors.items()}
    tensors.pop("embeddings.position_ids", None)
    own = {n: t.detach() for name, p in model.named_parameters() for n, t in _pieces(name, p)}
    if _BIAS in own:  # what files may hold twice; where the two biases differ, the decoder's is what counts
        if _DECODER + "bias" in tensors:
            tensors[_BIAS] = tensors.pop(_DECODER + "bias")
        if _DECODER + "weight" not in own:
            tensors.pop(_DECODER + "weight", None)
    if not strict:
        tensors = {n: t for n, t in tensors.items() if n in own or not n.startswith(_HEADS)}
        tensors |= {n: t for n, t in own.items() if n not in tensors and n.startswith(_HEADS)}
    checkpoint.assign(model, tensors, directory, _parts)
    return model


def _pieces(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter's tensors under Hugging Face's names."""
    names = _theirs(name)
    return list(zip(names, tensor.chunk(len(names)), strict=True))


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a model's directory; `save_pretrained` of the models says how."""
    architecture = _ARCHITECTURES[type(model).__name__]
    tensors = {n: t.detach() for name, p in model.named_parameters() for n, t in _pieces(name, p)}
    if _DECODER + "weight" in tensors:  # which transformers then does not tie either
        tensors[_DECODER + "bias"] = tensors[_BIAS].clone()
    if architecture != "BertModel":
        heads = tuple(head for head in _HEADS if head != "pooler.")
        tensors = {n if n.startswith(heads) else f"bert.{n}": t for n, t in tensors.items()}
    config: Any = model.config
    checkpoint.write(directory, config_to_hf(config, architecture), tensors)


def config_to_hf(config: BERTConfig, architecture: str) -> dict[str, Any]:
    """The fields of config.json."""
    fields = dataclasses.asdict(config)
    labels = fields.pop("labels")
    ours = {name: fields.pop(name) for name in ("pre_norm", "rotary")}
    activation = {v: k for k, v in reversed(_ACTIVATIONS.items())}[fields.pop("hidden_act")]
    return {
        "architectures": [architecture],
        "model_type": _OURS if any(ours.values()) else "bert",
        **fields,
        **(ours if any(ours.values()) else {}),
        "hidden_act": activation,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def read_config(directory: str | Path, **changes: Any) -> BERTConfig:
    """BERTConfig of a directory, with fields replaced."""
    return dataclasses.replace(config_from_hf(checkpoint.read_config(directory, "bert", _OURS)), **changes)


def config_from_hf(raw: dict[str, Any]) -> BERTConfig:
    """BERTConfig of a config.json; ValueError for what our BERT does not implement."""
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act is {activation!r}; allowed: {', '.join(_ACTIVATIONS)}")
    fixed = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {raw[key]!r}; allowed: {value!r}")
    names = {f.name for f in dataclasses.fields(BERTConfig)}
    fields = {"intermediate_size": 3072} | {k: v for k, v in raw.items() if k in names and k != "labels"}
    if labels := raw.get("id2label"):
        fields["labels"] = tuple(label for _, label in sorted((int(n), label) for n, label in labels.items()))
    elif "num_labels" in raw:
        fields["labels"] = tuple(map(str, range(raw["num_labels"])))
    return BERTConfig(**(fields | {"hidden_act": _ACTIVATIONS[activation]}))
