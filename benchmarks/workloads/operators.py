"""Single operators at the shapes in which BERT calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lengths as length_sets
from ..case import Case

Target = torch.dtype | torch.device


@dataclass(frozen=True)
class AttentionInputs:
    """query, key, value [T, H, D] of packed sequences; with gradients, that of the output too."""

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]
    grad: Tensor | None = None

    def to(self, target: Target) -> AttentionInputs:
        grad = None if self.grad is None else self.grad.to(target)
        q, k, v = (x.to(target) for x in (self.query, self.key, self.value))
        return AttentionInputs(q, k, v, self.lengths, grad)


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], list[Tensor]]:
    """A call that gives the output of a function of these inputs, then the gradient of each."""
    with torch.inference_mode(False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        grad = grad.clone()

    def run() -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    return run


@dataclass(frozen=True)
class LinearInputs:
    """input [M, K], weight [N, K], bias [N]; then exact GELU, or the sum with residual [M, N]."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    activation: str | None = None
    residual: Tensor | None = None

    def to(self, target: Target) -> LinearInputs:
        residual = None if self.residual is None else self.residual.to(target)
        return LinearInputs(
            self.input.to(target),
            self.weight.to(target),
            self.bias.to(target),
            self.activation,
            residual,
        )

    def run(self) -> Tensor:
        """What torch's own operators give."""
        output = F.linear(self.input, self.weight, self.bias)
        output = F.gelu(output) if self.activation == "gelu" else output
        return output if self.residual is None else output + self.residual


@dataclass(frozen=True)
class LayerNormInputs:
    """input and residual [M, N], weight and bias [N]."""

    input: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-12

    def to(self, target: Target) -> LayerNormInputs:
        weight, bias = self.weight.to(target), self.bias.to(target)
        return LayerNormInputs(
            self.input.to(target), self.residual.to(target), weight, bias, self.eps
        )

    def run(self) -> Tensor:
        """What torch's own operators give."""
        size = (self.input.shape[-1],)
        return F.layer_norm(self.input + self.residual, size, self.weight, self.bias, self.eps)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(size: str) -> Iterator[Case]:
    """Dense sequences of 512 and packed batches of real lengths, head size 64: forward, then with gradients."""
    heads, head_dim = {"tiny": (2, 32), "base": (12, 64), "large": (16, 64)}[size]
    dense = {"tiny": [64] * 2, "base": [512] * 4, "large": [2048] * 2}[size]
    sentences = {"tiny": 4, "base": 32, "large": 64}[size]
    pairs = {"tiny": 2, "base": 16, "large": 32}[size]
    batches = {
        f"dense-{len(dense)}x{dense[0]}": dense,
        f"sms_spam-{sentences}": length_sets.draw("sms_spam", sentences),
        f"mrpc-{sentences}": length_sets.draw("mrpc_train_pairs", sentences),
        f"xquad-{pairs}": length_sets.draw("xquad_question_context_pairs", pairs),
    }
    for training in (False, True):
        for name, lengths in batches.items():
            yield attention_case(name, lengths, heads, head_dim, training=training)


def attention_case(
    name: str,
    lengths: list[int],
    heads: int,
    head_dim: int,
    *,
    workload: str = "attention",
    training: bool = False,
) -> Case:
    """Self-attention of packed sequences of these lengths; in training the gradients with it.

    FLOP: two products forward, five backward, which computes the scores again (Dao et al. 2022). The fact
    `scores_saved` is the scores of the padded batch over those of the sequences: what a gain over a padded peer owes
    to the layout alone.
    """
    total, scores = sum(lengths), sum(length**2 for length in lengths)
    query, key, value, grad = (_normal(total, heads, head_dim, seed=seed) for seed in range(4))
    inputs = AttentionInputs(query, key, value, tuple(lengths), grad if training else None)
    products, tensors = (7, 12) if training else (2, 4)
    return Case(
        workload=workload,
        name=f"train-{name}" if training else name,
        kind="attention_training" if training else "attention",
        description=f"attention, {heads} heads of {head_dim}, {len(lengths)} sequences, {total} tokens"
        + (", forward and backward" if training else ""),
        inputs=inputs,
        truth=lambda: attention_truth(inputs),
        dtypes=("float32", "bfloat16"),
        flop=2.0 * products * heads * head_dim * scores,
        traffic=lambda element: float(tensors * element * total * heads * head_dim),
        items=total,
        unit="tokens",
        facts={
            "sequences": len(lengths),
            "tokens": total,
            "fill": round(length_sets.fill(lengths), 3),
            "scores_saved": round(len(lengths) * max(lengths) ** 2 / scores, 3),
        },
    )


def attention_truth(inputs: AttentionInputs) -> Tensor:
    """Each sequence alone through torch's SDPA in float64: [T, H, D], then the gradients of q, k and v: [4T, H, D]."""
    exact = inputs.to(torch.float64)
    function = partial(_one_by_one, list(inputs.lengths))
    arguments = (exact.query, exact.key, exact.value)
    if exact.grad is None:
        return function(*arguments)
    return torch.cat(forward_and_backward(function, arguments, exact.grad)())


def _one_by_one(lengths: list[int], *packed: Tensor) -> Tensor:
    outputs = []
    for sequence in zip(*(x.split(lengths) for x in packed), strict=True):
        q, k, v = (x.transpose(0, 1) for x in sequence)  # [H, S, D]
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(outputs)


def linear(size: str) -> Iterator[Case]:
    """The linears of a BERT layer, with the epilogue that follows them, for one sentence and for a batch."""
    hidden, inner = {"tiny": (64, 256), "base": (768, 3072)}[size]
    for rows in {"tiny": (12, 48), "base": (12, 832)}[size]:
        yield _linear_case("qkv", rows, 3 * hidden, hidden)
        yield _linear_case("gelu", rows, inner, hidden, activation="gelu")
        yield _linear_case("residual", rows, hidden, inner, add=True)


def _linear_case(
    name: str, m: int, n: int, k: int, *, activation: str | None = None, add: bool = False
) -> Case:
    inputs = LinearInputs(
        _normal(m, k, seed=0),
        _normal(n, k, seed=1) * k**-0.5,
        _normal(n, seed=2),
        activation,
        _normal(m, n, seed=3) if add else None,
    )
    epilogue = f" and {activation}" if activation else " and residual" if add else ""
    return Case(
        workload="linear",
        name=f"{name}-{m}x{k}x{n}",
        kind="linear",
        description=f"linear with bias{epilogue}, {m} rows, {k} to {n}",
        inputs=inputs,
        truth=lambda: inputs.to(torch.float64).run(),
        dtypes=("float32", "bfloat16"),
        flop=2.0 * m * n * k,
        traffic=lambda element: float(element * (n * k + m * (n + k))),
        items=m,
        unit="rows",
    )


def layer_norm(size: str) -> Iterator[Case]:
    """Residual and LayerNorm over the tokens of one batch and of a long one."""
    hidden = {"tiny": 64, "base": 768}[size]
    for rows in {"tiny": (48,), "base": (832, 8192)}[size]:
        yield _layer_norm_case(rows, hidden)


def _layer_norm_case(rows: int, hidden: int) -> Case:
    inputs = LayerNormInputs(
        _normal(rows, hidden, seed=0),
        _normal(rows, hidden, seed=1),
        1.0 + 0.1 * _normal(hidden, seed=2),
        0.1 * _normal(hidden, seed=3),
    )
    return Case(
        workload="layer-norm",
        name=f"{rows}x{hidden}",
        kind="layer_norm",
        description=f"residual and LayerNorm, {rows} rows of {hidden}",
        inputs=inputs,
        truth=lambda: inputs.to(torch.float64).run(),
        dtypes=("float32", "bfloat16"),
        flop=8.0 * rows * hidden,
        traffic=lambda element: 3.0 * element * rows * hidden,
        items=rows,
        unit="rows",
    )
