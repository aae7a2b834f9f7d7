"""The exact results of an attention case in float64, and what rounding their terms once leaves in them.

Written from the weights of the reference, without autograd and without the reference's own backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.reference.dropout import dropout_scale
from tests.ops.attention_cases import Case, Inputs

Results = dict[str, Tensor]


def _problem(
    case: Case, q: Tensor, k: Tensor, v: Tensor, bias, do, dlse, arguments
) -> tuple[Results, Results]:
    """Exact results and rounding of one padded problem [B, H, Sq, D] in float64."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    dropout = {name: arguments.pop(name) for name in ("dropout_p", "seed")}
    w = reference.attention_weights(q, k, bias=bias, **arguments)  # [B, H, Sq, Sk], without dropout
    m = w  # with dropout
    if case.dropout_p > 0.0:
        m = reference.attention_weights(q, k, bias=bias, **arguments, **dropout)
    lse = reference.attention_with_lse(q, k, v, bias=bias, **arguments)[1]
    output = m @ v
    dw = do @ v.mT
    delta = (m * dw).sum(-1, keepdim=True)
    ds = m * dw - w * delta
    if dlse is not None:
        ds = ds + w * dlse.double()[..., None]
    exact = {
        "output": output,
        "lse": lse,
        "dquery": ds @ k * scale,
        "dkey": ds.mT @ q * scale,
        "dvalue": m.mT @ do,
    }

    # Terms are rounded to the dtype before the products, scores and their gradients where they are accumulated. The
    # backward starts from the stored output, itself rounded, which shifts delta of a whole row.
    # Where the exact answer is float64 too, both hold a sum of n terms in some order: a random walk of roundings.
    def walk(n: int) -> float:
        return max(1, n) ** 0.5 if case.dtype == torch.float64 else 1.0

    # Scores, gradients of weights and delta are sums of head_dim terms: half a unit of partial sums that grow as the
    # root of their number. The eager path tells nothing of it where these sums cancel or are few.
    over_d = max(walk(case.head_dim), (case.head_dim / 8) ** 0.5)
    equal = case.grad_memory in ("rows", "scalar")  # rows whose roundings all go one way
    half_ulp = torch.finfo(case.dtype).eps / 2
    least = (
        half_ulp * torch.finfo(case.dtype).smallest_normal
    )  # half the spacing below the normal range
    unit = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps

    def largest(x: Tensor, terms: Tensor) -> Tensor:
        """The largest in each row of the number itself and of the root of its summed squared terms."""
        if x.shape[-1] == 0:
            return x.new_zeros((*x.shape[:-1], 1))
        return torch.maximum(x.abs(), terms.sqrt()).where(w > 0, 0.0).amax(-1, keepdim=True)

    def rounded(error: Tensor, weight: Tensor) -> Tensor:
        """The square of an error that rounding makes, no less than the dtype's spacing, where a weight is not zero."""
        return error.abs().clamp_min(least).where(weight > 0, 0.0).square()

    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias.nan_to_num(neginf=0.0)
    score = largest(scores, q.square() @ k.square().mT * scale**2) * over_d
    relative = half_ulp + unit * (1 + score)  # of a weight
    terms = rounded(relative * m, m)
    grad = largest(dw, do.square() @ v.square().mT) * over_d
    grad = grad * max(1.0, dropout_scale(case.dropout_p))
    if dlse is not None:
        grad = grad + dlse.double()[..., None].abs()
    ds_terms = rounded(relative * ds, w) + (unit * w * grad).square()
    stored = output.to(case.dtype).double()
    shift = w * ((do * stored).sum(-1, keepdim=True) - delta)
    over_q, over_k = walk(q.shape[2]) ** (2 if equal else 1), walk(k.shape[2])
    rounding = {
        "output": (terms @ v.square()).sqrt() * over_k,
        "lse": unit * torch.maximum(score[..., 0], lse.nan_to_num(neginf=0.0).abs()),
        "dquery": ((ds_terms @ k.square()).sqrt() * over_k + (shift @ k).abs()) * abs(scale),
        "dkey": ((ds_terms.mT @ q.square()).sqrt() * over_q + (shift.mT @ q).abs()) * abs(scale),
        "dvalue": (terms.mT @ do.square()).sqrt() * over_q,
    }
    if bias is not None:
        exact["dbias"] = ds.sum_to_size(bias.shape)
        over_all = walk(ds.numel() // max(1, bias.numel()))
        left = (
            ds_terms.sqrt().sum_to_size(bias.shape)
            if equal
            else ds_terms.sum_to_size(bias.shape).sqrt()
        )
        rounding["dbias"] = left * over_all + shift.sum_to_size(bias.shape).abs()
    return exact, rounding


def exact_results(case: Case, inputs: Inputs) -> tuple[Results, Results]:
    """Exact results in float64 and the rounding of their terms, by name, in the layout of the operator."""
    q, k, v, do = (x.double() for x in (inputs.query, inputs.key, inputs.value, inputs.grad_output))
    bias = None if inputs.bias is None else inputs.bias.double()
    arguments = dict(inputs.arguments)
    if not case.packed:
        if arguments["key_padding_mask"] is not None:
            valid = arguments["key_padding_mask"][:, None, :, None]
            k, v = k.where(valid, 0.0), v.where(valid, 0.0)
        return _problem(case, q, k, v, bias, do, inputs.grad_lse, arguments)

    for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
        arguments.pop(name)
    lse = torch.full((case.heads, q.shape[0]), -torch.inf, dtype=torch.float64)
    empty = {"output": torch.zeros_like(q), "lse": lse}
    empty |= {
        "dquery": torch.zeros_like(q),
        "dkey": torch.zeros_like(k),
        "dvalue": torch.zeros_like(v),
    }
    if bias is not None:
        empty["dbias"] = torch.zeros_like(bias)
    exact = {name: x.contiguous().clone() for name, x in empty.items()}
    rounding = {name: torch.zeros_like(x) for name, x in exact.items()}
    start_q = start_k = 0
    for b, (nq, nk) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        rows, columns = slice(start_q, start_q + nq), slice(start_k, start_k + nk)
        start_q, start_k = rows.stop, columns.stop

        def part(x: Tensor, b=b, nq=nq, nk=nk) -> Tensor:
            """What sequence b reads of a bias, or of its gradient."""
            x = x[b : b + 1] if x.shape[0] > 1 else x
            x = x[:, :, :nq] if x.shape[2] > 1 else x
            return x[..., :nk] if x.shape[3] > 1 else x

        found = _problem(
            case,
            *(x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns])),
            None if bias is None else part(bias),
            do[rows].transpose(0, 1)[None],
            None if inputs.grad_lse is None else inputs.grad_lse[None, :, rows],
            dict(arguments, first_sequence=b),
        )
        for into, results in zip((exact, rounding), found, strict=True):
            into["output"][rows] = results["output"][0].transpose(0, 1)
            into["lse"][:, rows] = results["lse"][0]
            into["dquery"][rows] = results["dquery"][0].transpose(0, 1)
            into["dkey"][columns] = results["dkey"][0].transpose(0, 1)
            into["dvalue"][columns] = results["dvalue"][0].transpose(0, 1)
            if bias is not None:
                part(into["dbias"]).add_(results["dbias"])
    return exact, rounding
