"""LSTM with a projected state (LSTMP): Hochreiter and Schmidhuber (1997), projection by Sak, Senior, Beaufays (2014).

One step, with the state h [B, P] and the cell c [B, H]:

    i, f, g, o = split(x W_ih^T + b + h W_hh^T);   i, f, o = sigmoid(.);   g = tanh(g)
    cell = f * c + i * g;             c = clip(cell, cell_clip)
    projected = (o * tanh(c)) W_hr^T; h = clip(projected, proj_clip) * mask

The clipped values are what is carried. Without W_hr, projected = o * tanh(c) and P = H. mask [B, P] is recurrent
dropout (Gal and Ghahramani, 2016): one for a whole sequence. A row stops at its length: its output is 0 from there on
and its state stays. In reverse each row starts at its own last valid position.

In 16-bit types c and the arithmetic of a step are float32; h and the input of the projection are rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.reference.dropout import dropout_mask, dropout_scale

RECURRENT_HEAD = 0xFFFFFFFE

Saved = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of c and of the arithmetic of a step."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent_mask(
    seed: Tensor, p: float, directions: int, batch: int, features: int, dtype: torch.dtype
) -> Tensor:
    """[D, B, P]: 0, or the reciprocal of the keep probability; i = direction, j = feature, sequence = row."""
    device = seed.device
    keep = dropout_mask(
        seed,
        p,
        i=torch.arange(directions, device=device).view(-1, 1, 1),
        j=torch.arange(features, device=device),
        head=torch.full((1,), RECURRENT_HEAD, device=device),
        sequence=torch.arange(batch, device=device).view(-1, 1),
    )
    return keep.to(dtype) * dropout_scale(p)


def round_weight(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """weight [N, K] as it is after being stored in bfloat16, or in int8 with one scale a row (symmetric, 127 steps).

    What int8 stands for is in the compute type.
    """
    if dtype is None:
        return weight
    if dtype == torch.bfloat16:
        return weight.to(dtype).to(weight.dtype)
    w = weight.to(compute_dtype(weight.dtype))
    scale = w.abs().amax(1, keepdim=True) / 127
    quantised = torch.where(scale > 0, w / scale, torch.zeros_like(w)).round().clamp(-127, 127)
    return quantised * scale


def input_gates(
    input: Tensor, weight_ih: Tensor, bias: Tensor | None, weight_dtype: torch.dtype | None
) -> Tensor:
    """[B, T, 4H]: what the input [B, T, K] contributes, with weight_ih held in weight_dtype."""
    weight = round_weight(weight_ih, weight_dtype)
    wide = weight.dtype
    return F.linear(input.to(wide), weight, None if bias is None else bias.to(wide)).to(input.dtype)


def valid_positions(lengths: Tensor, steps: int) -> Tensor:
    """bool [B, T, 1]: before the row's end."""
    return (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(2)


def step_order(x: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """[B, T, N] with the valid positions of each row turned round if reverse; its own inverse."""
    if not reverse:
        return x
    if lengths is None:
        return x.flip(1)
    position = torch.arange(x.shape[1], device=x.device)
    last = lengths.unsqueeze(1) - 1
    index = torch.where(position <= last, last - position, position)
    return x.gather(1, index.unsqueeze(2).expand(x.shape))


def _clip(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def _inside(grad: Tensor, x: Tensor, bound: float | None) -> Tensor:
    """Gradient of _clip: it passes at the bounds themselves."""
    return grad if bound is None else torch.where(x.abs() <= bound, grad, torch.zeros_like(grad))


def lstm_recurrence(
    gates: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """The loop over time of one direction.

    gates: [B, T, 4H], what the input and the bias contribute;  weight_hh: [4H, P];  weight_hr: [P, H] or None
    h0: [B, P];  c0: [B, H] in the compute type;  lengths: integers [B] in [0, T];  mask: [B, P]

    Returns output [B, T, P], h, c, and what a backward pass reads, undefined past a row's end: the activated gates
    [B, T, 4H], the cells before their clip [B, T, H] and the projected states before theirs [B, T, P].
    """
    dtype, steps = gates.dtype, gates.shape[1]
    compute = c0.dtype
    valid = None if lengths is None else valid_positions(lengths, steps)
    gates = step_order(gates, lengths, reverse).to(compute)
    if valid is not None:
        gates = torch.where(valid, gates, torch.zeros_like(gates))
    recurrent = weight_hh.to(compute).t()
    h, c = h0, c0
    outputs, activated, cells, projections = [], [], [], []
    for step in range(steps):
        z = gates[:, step] + h.to(compute) @ recurrent
        i, f, g, o = z.chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        cell = f * c + i * g
        new_c = _clip(cell, cell_clip)
        projected = o * torch.tanh(new_c)
        if weight_hr is not None:
            projected = projected.to(dtype).to(compute) @ weight_hr.to(compute).t()
        new_h = _clip(projected, proj_clip)
        new_h = (new_h if mask is None else new_h * mask).to(dtype)
        activated.append(torch.cat((i, f, g, o), -1))
        cells.append(cell)
        projections.append(projected)
        if valid is None:
            h, c = new_h, new_c
            outputs.append(new_h)
        else:
            active = valid[:, step]
            h, c = torch.where(active, new_h, h), torch.where(active, new_c, c)
            outputs.append(torch.where(active, new_h, torch.zeros_like(new_h)))

    def stacked(parts: list[Tensor], like: Tensor) -> Tensor:
        joined = torch.stack(parts, 1) if parts else like.unsqueeze(1)[:, :0]
        return step_order(joined, lengths, reverse)

    saved = (
        stacked(activated, gates.new_empty(h0.shape[0], weight_hh.shape[0])),
        stacked(cells, c0),
        stacked(projections, h0.to(compute)),
    )
    return stacked(outputs, h0), h, c, saved


def previous_states(output: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state that each step of output [B, T, P] started from; 0 past a row's end."""
    steps = output.shape[1]
    before = torch.cat((h0.unsqueeze(1), step_order(output, lengths, reverse)), 1)[:, :steps]
    if lengths is not None:
        before = torch.where(valid_positions(lengths, steps), before, torch.zeros_like(before))
    return step_order(before, lengths, reverse)


def lstm_recurrence_backward(
    grad_output: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    saved: Saved,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    c0: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through time: gradients of gates [B, T, 4H], of projected [B, T, P] (both 0 past a row's end), h0 and c0.

    All in the compute type. The gradients of the weights are products of these with what the forward pass knows.
    """
    compute, steps = c0.dtype, grad_output.shape[1]
    valid = None if lengths is None else valid_positions(lengths, steps)
    grad_output = step_order(grad_output.to(compute), lengths, reverse)
    gates, cells, projections = (step_order(x.to(compute), lengths, reverse) for x in saved)
    dh, dc = grad_h.to(compute), grad_c.to(compute)
    dgates, dprojections = [], []
    for step in reversed(range(steps)):
        i, f, g, o = gates[:, step].chunk(4, -1)
        cell = cells[:, step]
        before = c0 if step == 0 else _clip(cells[:, step - 1], cell_clip)
        tanh_c = torch.tanh(_clip(cell, cell_clip))
        dprojected = dh + grad_output[:, step]
        dprojected = dprojected if mask is None else dprojected * mask
        dprojected = _inside(dprojected, projections[:, step], proj_clip)
        dfull = dprojected if weight_hr is None else dprojected @ weight_hr.to(compute)
        dcell = _inside(dc + dfull * o * (1 - tanh_c.square()), cell, cell_clip)
        dz = torch.cat(
            (
                dcell * g * i * (1 - i),
                dcell * before * f * (1 - f),
                dcell * i * (1 - g.square()),
                dfull * tanh_c * o * (1 - o),
            ),
            -1,
        )
        new_dh, new_dc = dz @ weight_hh.to(compute), dcell * f
        if valid is None:
            dh, dc = new_dh, new_dc
        else:
            active = valid[:, step]
            dh, dc = torch.where(active, new_dh, dh), torch.where(active, new_dc, dc)
            dz = torch.where(active, dz, torch.zeros_like(dz))
            dprojected = torch.where(active, dprojected, torch.zeros_like(dprojected))
        dgates.append(dz)
        dprojections.append(dprojected)

    def stacked(parts: list[Tensor], like: Tensor) -> Tensor:
        joined = torch.stack(parts[::-1], 1) if parts else like[:, :0]
        return step_order(joined, lengths, reverse)

    return stacked(dgates, gates), stacked(dprojections, grad_output), dh, dc


def lstm(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    initial_state: Pair | None = None,
    reverse: bool = False,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    residual: Tensor | None = None,
    recurrent_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, K] -> output [B, T, P], h [B, P], c [B, H]; arguments as `ctxfast.ops.lstm`."""
    batch, steps = input.shape[:2]
    features, compute = weight_hh.shape[1], compute_dtype(input.dtype)
    mask = None
    if recurrent_dropout_p > 0.0:
        assert seed is not None
        masks = recurrent_mask(
            seed, recurrent_dropout_p, 2 if reverse else 1, batch, features, compute
        )
        mask = masks[-1]
    if lengths is not None:
        valid = valid_positions(lengths, steps)
        input = torch.where(valid, input, torch.zeros_like(input))
    h0, c0 = initial_state or (
        input.new_zeros(batch, features),
        input.new_zeros(batch, weight_hh.shape[0] // 4),
    )
    output, h, c, _ = lstm_recurrence(
        input_gates(input, weight_ih, bias, weight_dtype),
        round_weight(weight_hh, weight_dtype),
        None if weight_hr is None else round_weight(weight_hr, weight_dtype),
        h0,
        c0.to(compute),
        lengths=lengths,
        mask=mask,
        reverse=reverse,
        cell_clip=cell_clip,
        proj_clip=proj_clip,
    )
    return output if residual is None else output + residual, h, c


def bilstm(
    input: Tensor | Pair,
    weight_ih: Pair,
    weight_hh: Pair,
    bias: Pair | None = None,
    weight_hr: Pair | None = None,
    *,
    initial_state: Pair | None = None,
    residual: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """output [B, T, 2P], h [2, B, P], c [2, B, H]; arguments as `ctxfast.ops.bilstm`."""
    results = []
    for k in range(2):
        results.append(
            lstm(
                input if isinstance(input, Tensor) else input[k],
                weight_ih[k],
                weight_hh[k],
                None if bias is None else bias[k],
                None if weight_hr is None else weight_hr[k],
                initial_state=None
                if initial_state is None
                else (initial_state[0][k], initial_state[1][k]),
                reverse=k == 1,
                **options,
            )
        )
    outputs, h, c = zip(*results, strict=True)
    output = torch.cat(outputs, -1)
    return output if residual is None else output + residual, torch.stack(h), torch.stack(c)
