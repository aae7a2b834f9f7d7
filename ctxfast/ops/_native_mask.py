"""Padding masks across the boundary between tensors and csrc; the rules of `_native.py` hold here."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.ops import _dispatch
from ctxfast.ops._native import _module, available

_COUNTED = (torch.int64, torch.bool, torch.int32, torch.uint8, torch.int8, torch.int16)


def all_set(mask: Tensor) -> bool:
    """Whether no element of a mask on the CPU is 0 or false: short calls spend ten times as long in torch."""
    if (
        _dispatch.parts_unseen("cpu")
        and type(mask) is Tensor
        and mask.dtype in _COUNTED
        and mask.is_contiguous()
        and available()
    ):
        return bool(_module().all_set(mask.data_ptr(), mask.numel(), mask.element_size()))
    return bool(mask.all())
