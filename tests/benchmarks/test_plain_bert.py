"""The truth of the BERT workloads against transformers, in float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast.benchmarks import workloads
from ctxfast.benchmarks.ceilings import Ceilings
from ctxfast.benchmarks.plain_bert import Shape, product_tf32


@pytest.fixture(scope="module")
def case():
    return next(workloads.cases("bert-inference", "tiny"))


def test_truth_is_what_transformers_gives_for_each_sentence_alone(case):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(
        case.inputs.directory,
        dtype=torch.float64,
        attn_implementation="eager",
        add_pooling_layer=False,
    ).eval()
    alone = []
    with torch.inference_mode():
        for batch in case.inputs.batches:
            for ids, length in zip(batch.ids, batch.lengths, strict=True):
                alone.append(model(input_ids=ids[None, :length]).last_hidden_state[0])
    torch.testing.assert_close(case.truth(), torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_products_of_tf32_keep_eleven_bits():
    x = torch.tensor([[1 + 2.0**-10], [1 + 2.0**-11], [-1 - 2.0**-12], [1 - 2.0**-11]])
    expected = [1 + 2.0**-10, 1 + 2.0**-10, -1.0, 1 - 2.0**-11]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    assert product_tf32(x, one, zero).flatten().tolist() == expected
    assert product_tf32(one, x, zero.expand(4)).flatten().tolist() == expected


def test_batches_hold_what_they_say(case):
    for batch in case.inputs.batches:
        assert batch.mask.sum(1).tolist() == list(batch.lengths)
        assert bool((batch.ids[~batch.mask] == 0).all()) and bool((batch.ids[batch.mask] > 0).all())
        chosen = batch.rows([2, 0])
        assert chosen.lengths == (batch.lengths[2], batch.lengths[0])
        assert torch.equal(chosen.ids[0, : chosen.lengths[0]], batch.ids[2, : batch.lengths[2]])
        assert chosen.mask.shape[1] == max(chosen.lengths)


def test_flop_count_by_hand():
    shape = Shape(hidden_size=4, intermediate_size=8, num_hidden_layers=3)
    linears = 2 * (4 * 4 * 4 + 2 * 4 * 8)  # four projections and two of the feed-forward, a token
    attention = 4 * 4 * (5**2 + 2**2)  # scores and weighted sum
    assert shape.flop([5, 2]) == 3 * (linears * 7 + attention)
    assert shape.linear_parameters() == 3 * (4 * 16 + 2 * 32)


def test_base_is_bert_base():
    """22.3 GFLOP for 128 tokens, 85 M parameters in the linears."""
    assert Shape().flop([128]) == pytest.approx(22.3e9, rel=5e-3)
    assert Shape().linear_parameters() == 84_934_656


def test_the_limit_is_the_slower_of_arithmetic_and_memory():
    ceilings = Ceilings(
        {"float32": {"torch": {16: 50.0}, "oneDNN": {16: 100.0}}}, {4: 80.0, 256: 20.0}
    )
    assert ceilings.limit("float32", 1e11, 1e9) == (pytest.approx(1.0), "compute")
    assert ceilings.limit("float32", 1e9, 1e9) == (pytest.approx(0.05), "memory")
    assert ceilings.limit("float32", 1.0, 4 * 2**20) == (pytest.approx(4 * 2**20 / 80e9), "memory")
    assert ceilings.limit("int8", 1e9, 1e9) is None
