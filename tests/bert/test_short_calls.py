"""What a call keeps for the next one, and who must not be given it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ctxfast.bert import BertConfig, BertModel
from ctxfast.bert.inputs import dense_batch
from tests.bert.model_cases import SMALL

CPU = torch.device("cpu")


def test_the_layout_of_a_dense_grid_is_kept_for_inference() -> None:
    with torch.inference_mode():
        kept = dense_batch(3, 5, CPU)
        assert dense_batch(3, 5, CPU) is kept and dense_batch(5, 3, CPU) is not kept
    fresh = dense_batch(3, 5, CPU)
    assert fresh is not kept
    for name in ("cu_seqlens", "indices", "sequence_ids", "positions"):
        assert torch.equal(getattr(kept, name), getattr(fresh, name)), name
        assert not getattr(kept, name).is_inference(), name


def test_large_and_traced_layouts_are_not_kept() -> None:
    with torch.no_grad():
        assert dense_batch(64, 512, CPU) is not dense_batch(64, 512, CPU)
        with FakeTensorMode():
            assert isinstance(dense_batch(7, 11, CPU).indices, FakeTensor)
        assert not isinstance(dense_batch(7, 11, CPU).indices, FakeTensor)


class _LastState(nn.Module):
    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[0]


def test_a_trace_follows_its_input() -> None:
    model = _LastState(BertModel(BertConfig(**SMALL)).eval())
    first, second = torch.randint(1, 60, (2, 1, 9))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(first)
        traced = torch.jit.trace(model, first, check_trace=False)
        torch.testing.assert_close(traced(second), model(second))
