"""What `embed_file` may be asked for, checked before any file is opened."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

POOLINGS = ("tokens", "mean", "cls", "max", "pooler")
OVERLONG = ("truncate", "split", "error")
STORAGE_DTYPES = ("float32", "float16", "bfloat16")
STATEFUL = ("reset", "carry")
LAYOUTS = ("ctxfast", "allennlp")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "int8")


class OptionError(ValueError):
    """An option has a value that no model and no file could make right."""


def parse_layers(text: str) -> str | tuple[int, ...]:
    """`"top"`, `"all"`, `"mix"` (or `"average"`), or comma-separated indices such as `"-1,-2"` as a tuple."""
    if text in ("top", "all", "mix"):
        return text
    if text == "average":  # the mix without weights
        return "mix"
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        expected = "top, all, mix or comma-separated numbers such as -1,-2"
        raise OptionError(f"embed: layers must be {expected}, got {text!r}") from None


def parse_weights(text: str) -> tuple[float, ...]:
    """Comma-separated numbers as a tuple."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "comma-separated numbers such as 0.5,0,-0.5"
        raise OptionError(f"embed: mix_weights must be {expected}, got {text!r}") from None


@dataclass(frozen=True)
class EmbedOptions:
    """Options of `embed_file`.

    Args:
        pooling: "tokens" keeps one vector per token, [CLS] and [SEP] included. "mean" and "max"
            run over all tokens of a line, [CLS] and [SEP] included; "cls" is the vector of [CLS];
            "pooler" is BERT's pooler (dense + tanh on [CLS], top layer only).
        layers: "top", "all" (embedding output first, then every layer), "mix" (ELMo's scalar mix,
            Peters et al. 2018: softmax-weighted sum of all of them), or a tuple of indices into
            "all", negative ones counted from the top.
        mix_weights: one number per layer of "all", before the softmax; equal when None.
        normalize: scale pooled vectors to length 1.
        overlong: what to do with lines of more than `max_length` tokens: "truncate" keeps the
            first ones, "split" encodes the line in several pieces and joins them again (no token
            is lost; each piece sees only itself), "error" refuses.
        max_length: tokens per sequence, [CLS] and [SEP] included; the model's limit when None.
        batch_tokens: most tokens encoded at once.
        dtype: of the stored vectors. NPZ and HDF5 cannot hold bfloat16.
        compute_dtype: of the model while it runs. "int8", of a BERT on a CPU, rounds weights and activations of the
            linear layers to 8 bits.
        stateful: of an ELMo. "reset": a line's vectors do not depend on the lines before. "carry": each
            row of a batch goes on from the state of the batch before, in file order, as AllenNLP did.
        batch_size: lines of a batch where states are carried.
        layout: "ctxfast", or "allennlp": an ELMo's vectors per word as `allennlp elmo` wrote them.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:<index>".
    """

    pooling: str = "mean"
    layers: str | tuple[int, ...] = "top"
    mix_weights: tuple[float, ...] | None = None
    normalize: bool = False
    overlong: str = "truncate"
    max_length: int | None = None
    batch_tokens: int = 4096
    dtype: str = "float32"
    compute_dtype: str = "float32"
    device: str = "auto"
    stateful: str = "reset"
    batch_size: int = 64
    layout: str = "ctxfast"

    def __post_init__(self) -> None:
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("overlong", self.overlong, OVERLONG)
        _one_of("dtype", self.dtype, STORAGE_DTYPES)
        _one_of("stateful", self.stateful, STATEFUL)
        _one_of("layout", self.layout, LAYOUTS)
        if self.batch_size < 1:
            raise OptionError(f"embed: batch_size must be at least 1, got {self.batch_size}")
        if self.layout == "allennlp" and (self.pooling != "tokens" or self.dtype != "float32"):
            raise OptionError(
                "embed: pooling must be tokens and dtype float32 in the layout allennlp, got others"
            )
        _one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if isinstance(self.layers, str):
            _one_of("layers", self.layers, ("top", "all", "mix"))
        elif not self.layers:
            raise OptionError("embed: layers must name at least one layer, got none")
        if self.pooling == "pooler" and self.layers != "top":
            raise OptionError('embed: layers must be "top" with pooling "pooler", got others')
        if self.mix_weights is not None:
            if self.layers != "mix":
                raise OptionError('embed: mix_weights must come with layers "mix", got others')
            if not all(math.isfinite(weight) for weight in self.mix_weights):
                raise OptionError(f"embed: mix_weights must be finite, got {self.mix_weights}")
        if self.normalize and self.pooling == "tokens":
            raise OptionError("embed: normalize must come with a pooled output, got tokens")
        if self.max_length is not None and self.max_length < 3:
            raise OptionError(f"embed: max_length must be at least 3, got {self.max_length}")
        if self.batch_tokens < 1:
            raise OptionError(f"embed: batch_tokens must be at least 1, got {self.batch_tokens}")

    @property
    def many_layers(self) -> bool:
        """Whether the output has a layer axis: [T, L, D] in place of [T, D]."""
        return self.layers == "all" or (isinstance(self.layers, tuple) and len(self.layers) > 1)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"embed: {name} must be one of {', '.join(allowed)}, got {value!r}")
