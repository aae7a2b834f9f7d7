"""The cross entropy kernel, interpreted, against float64: losses, gradients in place of the logits, the operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ctxfast import ops, reference
from ctxfast.ops import _cross_entropy_chunks, _triton_cross_entropy
from tests.kernels.cases import FLOATS
from tests.ops.implementations import only
from tests.ops.test_linear_cross_entropy import arguments, loss_and_gradients
from tests.oracle import CAPS, assert_matches

SHAPES = [(1, 1, 2), (5, 7, 33), (40, 48, 100), (17, 33, 1029)]
NAMES = ("loss", "hidden", "weight", "bias")


@pytest.fixture
def small_blocks(monkeypatch):
    """A row of logits takes several blocks, as a real vocabulary does."""
    monkeypatch.setattr(_triton_cross_entropy, "_LARGEST_BLOCK", 64)


def in_place(logits, labels, scale=0.25, gradient=True, ignore_index=-100):
    """The kernel's losses and what it leaves in a copy of logits whose rows are padded with NaN."""
    buffer = torch.full((logits.shape[0], logits.shape[1] + 7), torch.nan, dtype=logits.dtype)
    view = buffer[:, : logits.shape[1]]
    view.copy_(logits)
    losses = _triton_cross_entropy.cross_entropy_(
        view, labels, scale, gradient, ignore_index=ignore_index
    )
    padding = buffer[:, logits.shape[1] :]  # as good as absent: no value of it is read
    assert (padding == 0).all() if gradient else padding.isnan().all()
    return losses, view


def expected(logits, labels, scale, dtype):
    x = logits.to(dtype).requires_grad_()
    losses = F.cross_entropy(x, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum() * scale, x)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 300])
@pytest.mark.usefixtures("small_blocks")
def test_rows(dtype, columns):
    logits = (torch.randn(9, columns) * 4).to(dtype)
    labels = torch.randint(columns, (9,))
    labels[1], labels[5] = -100, -100
    labels[0], labels[8] = columns - 1, 0
    losses, gradients = in_place(logits, labels)
    eager, exact = (expected(logits, labels, 0.25, t) for t in (dtype, torch.float64))
    assert_matches(losses, eager[0], exact[0], name="losses", cap=CAPS[dtype])
    assert_matches(gradients, eager[1], exact[1], name="gradients")
    assert torch.equal(losses[[1, 5]], torch.zeros(2))
    again, untouched = in_place(logits, labels, gradient=False)
    assert torch.equal(again, losses) and torch.equal(untouched, logits)


@pytest.mark.usefixtures("small_blocks")
def test_extreme_logits_are_treated_as_torch_does():
    logits = torch.randn(7, 130)
    labels = torch.tensor([0, 129, 3, 3, 70, 3, 3])
    logits[0, 0], logits[1, 129] = 1e4, -1e4
    logits[2, :64] = -torch.inf  # a whole block, the label among it
    logits[3, 64:] = -torch.inf
    logits[4, 70] = torch.inf
    logits[5, 129] = torch.nan
    logits[6] = -torch.inf
    losses, gradients = in_place(logits, labels, 1.0)
    eager = expected(logits, labels, 1.0, torch.float32)
    torch.testing.assert_close(losses, eager[0], equal_nan=True)
    torch.testing.assert_close(gradients, eager[1], equal_nan=True)


@pytest.mark.usefixtures("small_blocks")
def test_ignored_rows_are_not_read_and_missing_labels_are_loud():
    logits = torch.randn(4, 100)
    logits[0] = torch.nan
    losses, gradients = in_place(logits, torch.tensor([7, 100, -1, 99]), ignore_index=7)
    assert losses[0] == 0 and torch.equal(gradients[0], torch.zeros(100))
    assert losses.isnan().tolist() == [False, True, True, False]
    assert gradients.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("buffer", [1 << 25, 4096])
def test_operator_matches_float64(monkeypatch, shape, dtype, every_row, buffer):
    monkeypatch.setattr(_cross_entropy_chunks, "_BUFFER", buffer)
    monkeypatch.setattr(_cross_entropy_chunks, "_BLOCK", 64)
    monkeypatch.setattr(_triton_cross_entropy, "capturing", lambda device: every_row)
    *tensors, labels = arguments(*shape, dtype)
    if shape[0] == 5:
        tensors.pop()  # no bias
    ignored = labels == -100
    poisoned = [tensors[0].masked_fill(ignored[:, None], torch.nan), *tensors[1:]]
    with only("triton"):
        found = loss_and_gradients(ops.linear_cross_entropy, poisoned, labels, dtype)
    eager = loss_and_gradients(reference.linear_cross_entropy, tensors, labels, dtype)
    exact = loss_and_gradients(reference.linear_cross_entropy, tensors, labels, torch.float64)
    for name, *three in zip(NAMES, found, eager, exact, strict=False):
        assert_matches(*three, name=name, cap=CAPS[dtype])
    assert torch.equal(found[1][ignored], torch.zeros_like(found[1][ignored]))


@pytest.mark.parametrize("every_row", [False, True])
def test_no_label_and_no_rows(monkeypatch, every_row):
    monkeypatch.setattr(_triton_cross_entropy, "capturing", lambda device: every_row)
    hidden, weight, bias, labels = arguments(6, 5, 9, torch.float32)
    labels.fill_(-100)
    with only("triton"):
        for rows in (6, 0):
            loss, *gradients = loss_and_gradients(
                ops.linear_cross_entropy,
                (hidden[:rows], weight, bias),
                labels[:rows],
                torch.float32,
            )
            assert loss.isnan()
            assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_layouts_index_types_and_the_loss_alone():
    hidden, weight, bias, labels = arguments(24, 6, 11, torch.float32)
    exact = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    strided = torch.stack([hidden, hidden], -1)[..., 0].view(2, 12, 6)
    with only("triton"):
        for call in (
            (strided, weight, bias, labels.view(2, 12)),
            (hidden, weight.t().contiguous().t(), bias, labels.int()),
            (hidden, weight, bias.repeat_interleave(2)[::2], labels.repeat_interleave(2)[::2]),
        ):
            torch.testing.assert_close(ops.linear_cross_entropy(*call), exact)
