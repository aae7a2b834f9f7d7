"""LSTM with a projected state (LSTMP), in one direction or in both, over sequences of their own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctxfast.ops import _native_lstm
from ctxfast.ops._lstm_autograd import lstm as _lstm
from ctxfast.ops._validate import (
    autocast,
    dropout_seed,
    require_bool,
    require_device,
    require_floating,
    require_number,
    require_probability,
    require_same,
    require_tensor,
    shape_of,
)
from ctxfast.reference.lstm import compute_dtype, recurrent_mask

Pair = tuple[Tensor, Tensor]
WEIGHT_DTYPES = (torch.bfloat16, torch.int8)


def _require_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {shape_of(x)}")


def _require_clip(op: str, name: str, clip: float | None) -> float | None:
    if clip is None:
        return None
    require_number(op, name, clip)
    if not clip > 0:
        raise ValueError(f"{op}: {name} must be positive or None, got {clip}")
    return float(clip)


def _lengths(op: str, lengths: Any, input: Tensor) -> Tensor | None:
    """int64 [B] on the device of input; their range is checked where they are read."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(list(lengths), dtype=torch.int64)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"{op}: lengths must be integers, got {lengths.dtype}")
    _require_shape(op, "lengths", lengths, (input.shape[0],))
    return lengths.to(device=input.device, dtype=torch.int64)


def _require_weight_dtype(op: str, weight_dtype: torch.dtype | None) -> None:
    if weight_dtype is not None and weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{op}: weight_dtype must be None, torch.bfloat16 or torch.int8, got {weight_dtype}"
        )


def _direction_weights(op: str, weight_hh: Tensor, weight_hr: Tensor | None) -> None:
    require_floating(op, "weight_hh", weight_hh)
    if weight_hh.dim() != 2 or weight_hh.shape[0] % 4 or 0 in weight_hh.shape:
        raise ValueError(f"{op}: weight_hh must be [4 * H, P], got {shape_of(weight_hh)}")
    rows, features = weight_hh.shape
    if weight_hr is not None:
        require_floating(op, "weight_hr", weight_hr)
        _require_shape(op, "weight_hr", weight_hr, (features, rows // 4))
    elif features != rows // 4:
        raise ValueError(
            f"{op}: weight_hh must be [4 * H, H] without weight_hr, got {shape_of(weight_hh)}"
        )


def _direction(
    op: str,
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
) -> None:
    """Shapes: input [B, T, K], weight_ih [4H, K], weight_hh [4H, P], bias [4H], weight_hr [P, H] (without it P = H)."""
    if input.dim() != 3:
        raise ValueError(f"{op}: input must be [B, T, K], got {shape_of(input)}")
    _direction_weights(op, weight_hh, weight_hr)
    rows = weight_hh.shape[0]
    _require_shape(op, "weight_ih", weight_ih, (rows, input.shape[2]))
    if bias is not None:
        _require_shape(op, "bias", bias, (rows,))
    named = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias, "weight_hr": weight_hr}
    for name, parameter in named.items():
        if parameter is not None:
            require_same(op, name, parameter, "input", input)


def _run(
    op: str,
    inputs: tuple[Tensor, Tensor | None],
    weights: list[tuple[Tensor | None, Tensor | None]],
    lengths: Any,
    initial_state: Pair | None,
    reverse: bool,
    cell_clip: float | None,
    proj_clip: float | None,
    recurrent_dropout_p: float,
    seed: Tensor | None,
    recompute: bool,
    weight_dtype: torch.dtype | None,
    packed: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Validates and calls the registered operator; h [D, B, P] and c [D, B, H], as is initial_state."""
    count = 1 if weights[0][1] is None else 2
    for x in (*inputs, *(w for pair in weights for w in pair)):
        if x is not None:
            require_floating(op, "input and weights", x)
    flat = autocast(*inputs, *(w for pair in weights for w in pair))
    inputs = flat[0], flat[1]  # type: ignore[assignment]
    weights = [(flat[i], flat[i + 1]) for i in range(2, len(flat), 2)]
    input = inputs[0]
    for k in range(count):
        own = inputs[k] if inputs[k] is not None else input
        _direction(op, own, *(pair[k] for pair in weights))  # type: ignore[arg-type]
    if inputs[1] is not None:
        require_same(op, "the second input", inputs[1], "the first", input)
        if inputs[1].shape[:2] != input.shape[:2]:
            raise ValueError(
                f"{op}: both inputs must be {tuple(input.shape[:2])} in B and T, got {shape_of(inputs[1])}"
            )
    if count == 2:
        _require_shape(op, "weight_hh of both directions", weights[1][1], weights[1][0].shape)  # type: ignore[arg-type, union-attr]
    rows, features = weights[1][0].shape  # type: ignore[union-attr]
    batch = input.shape[0]
    compute = compute_dtype(input.dtype)
    for name, flag in (("reverse", reverse), ("recompute", recompute)):
        require_bool(op, name, flag)
    _require_weight_dtype(op, weight_dtype)
    if proj_clip is not None and weights[3][0] is None:
        raise ValueError(f"{op}: proj_clip must be None without weight_hr, got {proj_clip}")
    cell_clip, proj_clip = (
        _require_clip(op, "cell_clip", cell_clip),
        _require_clip(op, "proj_clip", proj_clip),
    )
    lengths = _lengths(op, lengths, input)
    if initial_state is None:
        zero = input.new_zeros(())
        state = (
            zero.expand(count, batch, features),
            zero.to(compute).expand(count, batch, rows // 4),
        )
    else:
        state = _initial_state(op, initial_state, input, (count, batch, features, rows // 4))
    require_probability(op, recurrent_dropout_p, "recurrent_dropout_p")
    seed = dropout_seed(op, recurrent_dropout_p, seed, input.device)
    mask = None
    if seed is not None:
        drawn = recurrent_mask(seed, recurrent_dropout_p, 2, batch, features, compute)
        mask = drawn if count == 2 else drawn[int(reverse)].unsqueeze(0)
    tensors = [
        x for x in (*inputs, *(w for pair in weights for w in pair), *state) if x is not None
    ]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if weight_dtype is not None and differentiable:
        raise ValueError(
            f"{op}: weight_dtype serves inference; it must be None where gradients are recorded, got {weight_dtype}"
        )
    return _lstm(
        *inputs,
        *(w for pair in weights for w in pair),
        *state,
        lengths,
        mask,
        *packed,
        reverse,
        cell_clip,
        proj_clip,
        weight_dtype,
        differentiable and not recompute,
    )[:3]


def _initial_state(
    op: str, initial_state: Pair, input: Tensor, sizes: tuple[int, int, int, int]
) -> Pair:
    if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
        raise TypeError(
            f"{op}: initial_state must be a pair (h, c), got {type(initial_state).__name__}"
        )
    count, batch, features, cells = sizes
    h, c = initial_state
    leading = (count, batch) if op == "bilstm" else (batch,)
    for name, x, size in (("h", h, features), ("c", c, cells)):
        require_floating(op, f"{name} of initial_state", x)
        require_device(op, f"{name} of initial_state", x, input.device)
        _require_shape(op, f"{name} of initial_state", x, (*leading, size))
    h, c = h.to(input.dtype), c.to(compute_dtype(input.dtype))
    return (h, c) if op == "bilstm" else (h.unsqueeze(0), c.unsqueeze(0))


def _with_residual(op: str, output: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return output
    require_tensor(op, "residual", residual)
    _require_shape(op, "residual", residual, tuple(output.shape))
    return output + residual.to(output.dtype)


def pack_lstm(
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """The weights of one direction as the CPU kernels read them, for `packed`; None without those kernels.

    weight_dtype as in `lstm`. The copy, uint8, serves the instruction set in use; elsewhere it is not believed, and
    calls do without: they arrange small weights and those of another weight_dtype themselves, and read large ones where
    they lie, a piece at a time. It takes the memory of the weights in weight_dtype, without one that of weight_hh and
    weight_hr: calls read weight_ih where it lies.
    """
    op = "pack_lstm"
    _direction_weights(op, weight_hh, weight_hr)
    require_floating(op, "weight_ih", weight_ih)
    if weight_ih.dim() != 2 or weight_ih.shape[0] != weight_hh.shape[0]:
        raise ValueError(
            f"{op}: weight_ih must be [{weight_hh.shape[0]}, K], got {shape_of(weight_ih)}"
        )
    _require_weight_dtype(op, weight_dtype)
    weights = [x for x in (weight_ih, weight_hh, weight_hr) if x is not None]
    if _native_lstm.refuses(*weights) is not None:
        return None
    return _native_lstm.pack(weight_ih, weight_hh, weight_hr, weight_dtype)


def lstm(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    initial_state: Pair | None = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    residual: Tensor | None = None,
    recurrent_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
    weight_dtype: torch.dtype | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM (Hochreiter and Schmidhuber, 1997) with the projection of Sak et al. (2014) and both clips of ELMo.

    input:      [B, T, K];  weight_ih: [4H, K];  weight_hh: [4H, P];  bias: [4H];  weight_hr: [P, H], or None and P = H.
                Gates in the order i, f, g, o of `torch.nn.LSTM`, all of one floating dtype
    lengths:    integers [B] in [0, T] in any order. From its length on a row gives 0 and keeps its state; what the
                input holds there, NaN included, has no influence. In reverse a row starts at its last valid position
    initial_state: h [B, P] and c [B, H], by default 0
    cell_clip:  bound of the cell before its tanh;  proj_clip: bound of the projected state. Clipped values are carried.
                Gradients are those of `torch.clamp`
    residual:   [B, T, P], added to the output and not to the state
    recurrent_dropout_p: one mask for a whole sequence on the (clipped) state, output and carried alike (Gal and
                Ghahramani, 2016);  seed: int64 [1] on the device of input, by default drawn from torch's generator
    recompute:  the backward pass runs the sequence again instead of keeping the gates
    weight_dtype: torch.bfloat16 or torch.int8 (one scale a row): how weight_ih, weight_hh and weight_hr are held, for
                inference. It loses the precision that its name says; the default is exact
    packed:     weight_ih, weight_hh and weight_hr as `ctxfast.ops.pack_lstm` arranges them, for inference. The caller
                vouches that it holds their values

    Returns output [B, T, P], h [B, P] and c [B, H]; c is float32 for 16-bit inputs, so that a sequence in parts gives
    what it gives in one. Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or value.
    """
    op = "lstm"
    require_floating(op, "input", input)
    output, h, c = _run(
        op,
        (input, None),
        [(weight_ih, None), (weight_hh, None), (bias, None), (weight_hr, None)],
        lengths,
        initial_state,
        reverse,
        cell_clip,
        proj_clip,
        recurrent_dropout_p,
        seed,
        recompute,
        weight_dtype,
        (packed, None),
    )
    return _with_residual(op, output, residual), h.squeeze(0), c.squeeze(0)


def _pair(op: str, name: str, x: Any) -> tuple[Any, Any]:
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"{op}: {name} must be a pair, forward and reverse, got {type(x).__name__}")
    return x[0], x[1]


def bilstm(
    input: Tensor | Pair,
    weight_ih: Pair,
    weight_hh: Pair,
    bias: Pair | None = None,
    weight_hr: Pair | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    initial_state: Pair | None = None,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    residual: Tensor | None = None,
    recurrent_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
    weight_dtype: torch.dtype | None = None,
    packed: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two independent LSTMs in one call, the first forward in time, the second in reverse.

    input:  [B, T, K], which both read, or a pair, one for each: ELMo's directions are separate stacks
    weights, bias and packed: pairs, else as in `lstm`;  initial_state: h [2, B, P] and c [2, B, H]
    residual: [B, T, 2P];  the other arguments as in `lstm`

    Returns output [B, T, 2P], forward before reverse, h [2, B, P] and c [2, B, H].
    """
    op = "bilstm"
    inputs = (input, None) if isinstance(input, Tensor) else _pair(op, "input", input)
    weights = [_pair(op, "weight_ih", weight_ih), _pair(op, "weight_hh", weight_hh)]
    for name, pair in (("bias", bias), ("weight_hr", weight_hr)):
        weights.append((None, None) if pair is None else _pair(op, name, pair))
    output, h, c = _run(
        op,
        inputs,
        weights,  # type: ignore[arg-type]
        lengths,
        initial_state,
        False,
        cell_clip,
        proj_clip,
        recurrent_dropout_p,
        seed,
        recompute,
        weight_dtype,
        (None, None) if packed is None else _pair(op, "packed", packed),
    )
    return _with_residual(op, output, residual), h, c
