"""Sentence boundaries, and one clear error for bad input."""

from __future__ import annotations

import pytest
import torch

from ctxfast import elmo, nn
from ctxfast.elmo import Elmo, batch_to_ids
from ctxfast.elmo.boundaries import add_sentence_boundary_token_ids
from tests.elmo import models


@pytest.fixture
def folder(tmp_path):
    models.model().save(tmp_path / "elmo", form="hdf5")
    return tmp_path / "elmo"


def test_boundaries_of_ids_and_vectors():
    ids = torch.tensor([[3, 4, 5], [6, 0, 0]])
    result, mask = add_sentence_boundary_token_ids(ids, ids > 0, 9, 10)
    assert result.tolist() == [[9, 3, 4, 5, 10], [9, 6, 10, 0, 0]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    vectors = torch.randn(2, 5, 4)
    tokens, inner = elmo.remove_sentence_boundaries(vectors, mask)
    assert torch.equal(tokens[0], vectors[0, 1:4]) and torch.equal(tokens[1, 0], vectors[1, 1])
    assert inner.tolist() == [[True] * 3, [True, False, False]] and not tokens[1, 1:].any()
    short, none = elmo.remove_sentence_boundaries(torch.randn(2, 1, 4), torch.zeros(2, 1).bool())
    assert short.shape == (2, 0, 4) and none.shape == (2, 0)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.ones(1, 2, 49, dtype=torch.int64), ValueError, r"character ids \[B, T, 50\]"),
        (torch.ones(1, 2, 50), TypeError, "inputs must be integers"),
        (torch.full((1, 2, 50), 262), ValueError, r"ids must be in \[0, 262\), got 262"),
        (torch.full((1, 2, 50), 1 << 20), ValueError, "inputs must be character ids"),
        (None, ValueError, "inputs must be character ids"),
    ],
)
def test_bad_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        models.model()(inputs)


def test_bad_arguments(folder):
    with pytest.raises(elmo.ConfigurationError, match="must be an integer of at least 1, got 0"):
        Elmo(folder, None, 0)
    with pytest.raises(elmo.ConfigurationError, match="must be 3 numbers, got 2"):
        Elmo(folder, None, 1, scalar_mix_parameters=[1.0, 2.0])
    with pytest.raises(TypeError, match="lists of words, got the string 'a sentence'"):
        batch_to_ids(["a sentence"])
    mix = nn.ScalarMix(2)
    with pytest.raises(elmo.ConfigurationError, match="must be 2 layers, got 3"):
        mix([torch.ones(1, 2)] * 3)
