"""Which weights of an ELMo are held twice."""

from __future__ import annotations

import pytest
import torch

from ctxfast.elmo import batch_to_ids
from ctxfast.nn import PackedLinear, packed_bytes, refresh
from ctxfast.ops import _native
from tests.elmo import models
from tests.elmo.models import SENTENCES


@pytest.mark.skipif(not _native.available(), reason="packed copies are those of the native module")
def test_the_token_encoder_is_packed_where_it_is_a_large_part():
    """dim 24, projection 8: 3,840 recurrent weights beside 1,440 of highways and projection of 18 filters."""
    ids = batch_to_ids(SENTENCES)
    for changes, expected in (({}, False), ({"filters": ((1, 40), (2, 40))}, True)):
        bilm = models.model(**changes)
        bilm.stateful = "reset"
        encoder = bilm._token_embedder
        with torch.inference_mode():
            layers = bilm.layers(ids)[0]
            assert (packed_bytes(encoder) > 0) == expected
            assert packed_bytes(bilm) > packed_bytes(encoder)
            for layer in encoder.modules():
                if isinstance(layer, PackedLinear):
                    layer.pack_exact = not expected
            refresh(bilm)
            assert torch.equal(bilm.layers(ids)[0], layers)
            assert (packed_bytes(encoder) > 0) != expected
