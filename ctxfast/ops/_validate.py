"""Argument checks shared by the public operators. Messages: <operator>: <argument> must be <expected>, got <actual>."""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int, int]


def shape_of(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def require_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def require_same(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x has the dtype and device of other."""
    if x.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}"
        )
    if x.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def require_floating(op: str, name: str, x: Tensor) -> None:
    require_tensor(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def require_broadcastable(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """x broadcasts to shape without changing it."""
    sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    fits = len(sizes) == len(shape) and all(
        a == 1 or a == b for a, b in zip(sizes, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {shape}, got {shape_of(x)}")


def require_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def require_number(op: str, name: str, x: object) -> None:
    if not isinstance(x, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {name} must be a number, got {type(x).__name__}")


def require_bool(op: str, name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {x!r}")


def require_probability(op: str, p: float, name: str = "dropout_p") -> None:
    require_number(op, name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p}")


def require_window(op: str, window_size: Window) -> None:
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or any(not isinstance(w, int) or w < -1 for w in window_size):
        raise ValueError(
            f"{op}: window_size must be two integers (left, right) of at least -1, got {window_size}"
        )


def dropout_seed(op: str, p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed to use: None without dropout, drawn from torch's generator on the device where none was given."""
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    require_tensor(op, "seed", seed)
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"{op}: seed must be an int64 tensor [1] on {device}, "
            f"got {seed.dtype} of {shape_of(seed)} on {seed.device}"
        )
    return seed


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in autocast's dtype where autocast is on for their device, as torch's matrix operators do."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
