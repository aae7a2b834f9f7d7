"""The loss of a language model's head: cross entropy of hidden @ weight^T + bias over the vocabulary.

loss = mean over labelled rows of  logsumexp(logits) - logits[label]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int = -100
) -> Tensor:
    """hidden [T, K], labels [T] -> scalar; arguments as `ctxfast.ops.linear_cross_entropy`."""
    logits = F.linear(hidden, weight, bias)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(wide), labels.long(), ignore_index=ignore_index)


def linear_cross_entropy_backward(
    grad_output: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, written out; differentiable once more through autograd.

    With M labelled rows:  dlogits = (softmax(logits) - one_hot(label)) * grad / M, and 0 in the other rows
    """
    logits = F.linear(hidden, weight, bias)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    labelled = labels != ignore_index
    one_hot = F.one_hot(labels.long().where(labelled, 0), weight.shape[0]).to(wide)
    scale = labelled.unsqueeze(1) * grad_output / labelled.sum().clamp(min=1)
    dlogits = ((logits.to(wide).softmax(1) - one_hot) * scale).to(hidden.dtype)
    return dlogits @ weight, dlogits.t() @ hidden, dlogits.sum(0)
