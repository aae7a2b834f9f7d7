"""BERT (Devlin et al., 2019) in plain PyTorch, any dtype: the truth in float64, and the eager baselines.

    h = LayerNorm(word[ids] + position[0..S) + type[0])
    each layer: h = LayerNorm(h + softmax(q k^T / sqrt(D)) v W_o + b_o);  h = LayerNorm(h + gelu(h W_1 + b_1) W_2 + b_2)

It reads a Hugging Face directory with random weights that `write_weights` makes: no download, the same for every peer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Product = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # x [..., K], weight [N, K], bias [N] -> [..., N]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a BERT encoder under the names of its config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    def linear_shapes(self) -> list[tuple[int, int]]:
        """[out, in] of every linear of one layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]

    def flop(self, lengths: Sequence[int]) -> float:
        """Operations of the linears and of attention over the valid tokens of sequences of these lengths."""
        linears = sum(2 * n * k for n, k in self.linear_shapes()) * sum(lengths)
        attention = 4 * self.hidden_size * sum(length**2 for length in lengths)
        return float(self.num_hidden_layers * (linears + attention))

    def linear_parameters(self) -> int:
        """Elements of the weights that every forward reads."""
        return self.num_hidden_layers * sum(n * k for n, k in self.linear_shapes())


def write_weights(directory: Path, shape: Shape, *, seed: int = 0) -> None:
    """A Hugging Face BERT directory with random float32 weights, and a vocabulary of the words token5, token6, ...

    Biases and LayerNorm parameters are random too, every sub-layer contributes as much as the residual, and scores are
    large enough for attention to single out tokens: an error anywhere changes the output, in bfloat16 too.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size).normal_(0.0, std, generator=generator)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    tensors: dict[str, Tensor] = {}

    def linear(name: str, n: int, k: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = normal(n, k, std=gain * k**-0.5)
        tensors[f"{name}.bias"] = normal(n, std=0.2)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1.0 + normal(hidden, std=0.2)
        tensors[f"{name}.bias"] = normal(hidden, std=0.2)

    for name, rows in (
        ("word", shape.vocab_size),
        ("position", shape.max_position_embeddings),
        ("token_type", shape.type_vocab_size),
    ):
        tensors[f"embeddings.{name}_embeddings.weight"] = normal(rows, hidden, std=0.02)
    norm("embeddings.LayerNorm")
    sharp = 2.0**0.5  # gives scores of standard deviation 2
    for i in range(shape.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        linear(f"{layer}.attention.self.query", hidden, hidden, sharp)
        linear(f"{layer}.attention.self.key", hidden, hidden, sharp)
        linear(f"{layer}.attention.self.value", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "pad_token_id": 0,
        **asdict(shape),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    words = [*SPECIAL, *(f"token{i}" for i in range(len(SPECIAL), shape.vocab_size))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def read_weights(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a directory in one dtype, under the names of a bare encoder."""
    from ctxfast.bert.weights import read_checkpoint

    tensors = read_checkpoint(directory, caller="bench")
    return {_bare(name): tensor.to(dtype) for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    """Without the prefix of a model with a head, and with today's names of a LayerNorm's parameters."""
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(old, new)
    return name


def product_int8(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias with both factors rounded to 8 bits, the products summed exactly and the rest in float32.

    The least error that is known for 8 bits without calibration: a scale for each output channel of the weight, as all
    engines have it, and 255 steps over the whole range of each row of x, found anew in every call.
    """
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0  # [N, 1]
    low = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - low).clamp_min(1e-30) / 255.0  # [..., 1]
    steps, rounded = ((x - low) / step).round(), (weight / scale).round()
    sums = (steps.double() @ rounded.double().t()).float()  # integers below 2^53
    return scale.squeeze(1) * (step * sums + low * rounded.sum(1)) + bias


def product_tf32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias with both factors rounded to TF32, 11 bits of the mantissa, and the rest in float32."""

    def rounded(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return F.linear(rounded(x), rounded(weight), bias)


def forward(
    weights: dict[str, Tensor],
    shape: Shape,
    ids: Tensor,
    positions: Tensor,
    attend: Attend,
    product: Product = F.linear,
) -> Tensor:
    """Last hidden state [..., hidden] of token ids [...]; `attend` maps q, k, v [..., hidden] to the same shape.

    product: of the linear layers
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return product(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, (shape.hidden_size,), weight, bias, shape.layer_norm_eps)

    tables = {
        name: weights[f"embeddings.{name}_embeddings.weight"]
        for name in ("word", "position", "token_type")
    }
    activation = ACTIVATIONS[shape.hidden_act]
    h = tables["word"][ids] + tables["position"][positions] + tables["token_type"][0]
    h = norm("embeddings.LayerNorm", h)
    for i in range(shape.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{x}", h) for x in ("query", "key", "value"))
        context = linear(f"{layer}.attention.output.dense", attend(q, k, v))
        h = norm(f"{layer}.attention.output.LayerNorm", h + context)
        inner = activation(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", h + linear(f"{layer}.output.dense", inner))
    return h


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """q, k, v [B, S, hidden] -> [B, S, hidden]; mask [B, S], True = attend."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))  # [B, H, S, D]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(-3, -2).flatten(-2)


def alone(
    weights: dict[str, Tensor],
    shape: Shape,
    ids: Tensor,
    lengths: Sequence[int],
    product: Product = F.linear,
) -> Tensor:
    """[T, hidden] of packed ids [T]: attention runs in every sentence alone, there is no padding and no mask."""
    positions = torch.cat([torch.arange(length) for length in lengths])

    def attend(*packed: Tensor) -> Tensor:
        sentences = zip(*(x.split(list(lengths)) for x in packed), strict=True)
        heads = shape.num_attention_heads
        outputs = [
            softmax_attention(q[None], k[None], v[None], heads, None) for q, k, v in sentences
        ]
        return torch.cat([output[0] for output in outputs])

    return forward(weights, shape, ids, positions, attend, product)
