"""What an ELMo remembers from call to call: each row of a batch goes on where the row of the same number ended."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

States = tuple[Tensor, Tensor]
MODES = ("carry", "reset", "warm")
Owner = TypeVar("Owner", bound="StatefulModule")


def mode_of(stateful: bool | str) -> str:
    """ "carry", "reset" or "warm"; AllenNLP's True and False are the first two."""
    if isinstance(stateful, bool):
        return "carry" if stateful else "reset"
    if stateful not in MODES:
        names = ", ".join(map(repr, MODES))
        raise ValueError(f"stateful must be True, False, {names}, got {stateful!r}")
    return stateful


def _owned(x: Tensor) -> Tensor:
    """A detached copy that any later call may use, whatever mode this one runs in."""
    with torch.inference_mode(False):
        return x.detach().clone()


class StatefulModule(nn.Module):
    """States of layers over rows: h [L, S, 2P] and c [L, S, 2D], forward before backward in the last dimension.

    stateful: "carry" (or True): a row starts from its state after the last call in which it took part;
              "reset" (or False): every call starts from zero;
              "warm": every call starts from the states that `set_states` or `warmup` left, and leaves them alone. A
              row beyond them starts from the last one
    `_states` is None, or the two tensors; S is the largest batch so far. It is no part of the state_dict, and moves
    with the module.
    """

    def __init__(self, stateful: bool | str = True) -> None:
        super().__init__()
        self._mode = mode_of(stateful)
        self._states: States | None = None

    @property
    def stateful(self) -> bool | str:
        """As it was set; True and False stand for "carry" and "reset"."""
        return {"carry": True, "reset": False}.get(self._mode, self._mode)

    @stateful.setter
    def stateful(self, value: bool | str) -> None:
        self._mode = mode_of(value)

    def get_states(self) -> States | None:
        """Copies of the states, to keep or to give to `set_states` of this or of another model."""
        return None if self._states is None else (_owned(self._states[0]), _owned(self._states[1]))

    def set_states(self, states: States | None) -> None:
        """Takes h [L, S, 2P] and c [L, S, 2D], or None. Raises ValueError for other shapes."""
        if states is None:
            self._states = None
            return
        h, c = states
        wanted = self._state_sizes()
        for name, x, (layers, features) in (("h", h, wanted[0]), ("c", c, wanted[1])):
            if (
                x.dim() != 3
                or (x.shape[0], x.shape[2]) != (layers, features)
                or len(h[0]) != len(c[0])
            ):
                raise ValueError(
                    f"set_states: {name} must be [{layers}, rows, {features}], got shape {tuple(x.shape)}"
                )
        self._states = _owned(h), _owned(c)

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Forgets everything, or with mask, bool [S], sets the states of its true rows to zero."""
        if mask is None or self._states is None:
            if mask is None:
                self._states = None
            return
        rows = self._states[0].shape[1]
        if mask.dim() != 1 or mask.shape[0] != rows:
            raise ValueError(
                f"reset_states: mask must be [{rows}], a value for each row of the states, "
                f"got shape {tuple(mask.shape)}"
            )
        drop = mask.bool().to(self._states[0].device).view(1, -1, 1)
        with torch.inference_mode(False):
            self._states = tuple(x.masked_fill(drop, 0.0) for x in self._states)  # type: ignore[assignment]

    def _state_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(layers, features) of h and of c."""
        raise NotImplementedError

    def _initial_states(self, batch: int, like: Tensor, cell_dtype: torch.dtype) -> States:
        """h [L, batch, 2P] and c [L, batch, 2D] that a call begins with."""
        sizes = self._state_sizes()
        dtypes = like.dtype, cell_dtype
        kept = None if self._mode == "reset" else self._states
        initial = []
        for index, ((layers, features), dtype) in enumerate(zip(sizes, dtypes, strict=True)):
            if kept is None:
                x = torch.zeros(layers, batch, features, dtype=dtype, device=like.device)
            else:
                x = kept[index].to(like.device, dtype)[:, :batch]
                missing = batch - x.shape[1]
                if missing and self._mode == "warm" and x.shape[1]:
                    x = torch.cat((x, x[:, -1:].expand(-1, missing, -1)), 1)
                elif missing:
                    x = torch.cat((x, x.new_zeros(layers, missing, features)), 1)
            initial.append(x)
        return initial[0], initial[1]

    def _keep_states(self, h: Tensor, c: Tensor) -> None:
        """Remembers the states of a call's rows [L, batch, ...]; the rows beyond keep theirs."""
        if self._mode != "carry":
            return
        batch = h.shape[1]
        before = self._states
        merged = []
        for index, x in enumerate((h, c)):
            if before is not None and before[index].shape[1] > batch:
                rest = before[index][:, batch:].to(x.device, x.dtype)
                x = torch.cat((x.detach(), rest), 1)
            merged.append(_owned(x))
        self._states = merged[0], merged[1]

    def _apply(self: Owner, fn: Any, recurse: bool = True) -> Owner:
        super()._apply(fn, recurse)
        if self._states is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._states = fn(self._states[0]), fn(self._states[1])
        return self
