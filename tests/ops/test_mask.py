"""Masks that csrc looks at, against torch."""

from __future__ import annotations

import pytest
import torch

from ctxfast.ops._native_mask import all_set

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(0, 4), (1, 1), (3, 67)])
def test_all_set_is_what_torch_says(dtype, size):
    with torch.inference_mode():
        mask = torch.ones(size, dtype=dtype)
        assert all_set(mask)
        for place in ((0, 0), (size[0] - 1, size[1] - 1)) if mask.numel() else ():
            holed = mask.clone()
            holed[place] = 0
            assert not all_set(holed)


@pytest.mark.parametrize("value", [256, -1, 1 << 40, -(1 << 63)])
def test_every_byte_of_an_element_counts(value):
    with torch.inference_mode():
        assert all_set(torch.full((2, 5), value))


def test_what_csrc_cannot_read():
    with torch.inference_mode():
        strided = torch.tensor([[1, 0], [1, 0]])[:, :1]
        assert all_set(strided) and not all_set(torch.tensor([[1.0, -0.0]]))
