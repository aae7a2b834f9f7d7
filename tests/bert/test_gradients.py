"""Training: gradients and dropout of BertModel against transformers.BertModel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.bert.model_cases import TOLERANCE, assert_valid_equal, batch, pair  # noqa: E402


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_of_every_parameter(mode: str) -> None:
    ours, theirs = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    getattr(ours, mode)(), getattr(theirs, mode)()
    ids, mask = batch([7, 2, 5], 7)
    ids[0, 3] = 0  # [PAD] as a token: its row takes no gradient
    weight = torch.randn(3, 7, 32) * mask[..., None]
    pooled_weight = torch.randn(3, 32)
    for model in (ours, theirs):
        output = model(ids, mask)
        loss = (output.last_hidden_state * weight).sum()
        (loss + (output.pooler_output * pooled_weight).sum()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        want = expected[name].grad
        assert parameter.grad is not None, name
        scale = want.abs().max().clamp(min=1.0)
        assert (parameter.grad - want).abs().max() <= TOLERANCE * scale, name
    assert not ours.embeddings.word_embeddings.weight.grad[0].any()


def test_gradient_of_given_embeddings() -> None:
    ours, theirs = pair()
    _, mask = batch([3, 6], 6)
    embeds = torch.randn(2, 6, 32)
    weight = torch.randn(2, 6, 32) * mask[..., None]
    gradients = []
    for model in (ours, theirs):
        leaf = embeds.clone().requires_grad_()
        (model(inputs_embeds=leaf, attention_mask=mask)[0] * weight).sum().backward()
        gradients.append(leaf.grad)
    assert_valid_equal(gradients[0], gradients[1], mask, 1e-4)


SITES = [
    "embeddings.dropout",
    "encoder.layer.0.attention.self.dropout",
    "encoder.layer.1.attention.output.dropout",
    "encoder.layer.0.output.dropout",
]


@pytest.mark.parametrize("site", SITES)
def test_dropout_of_everything_is_where_transformers_has_it(site: str) -> None:
    ours, theirs = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids, mask = batch([7, 4], 7)
    before = ours(ids, mask)[0]
    for model in (ours, theirs):
        model.train()
        model.get_submodule(site).p = 1.0
    got = ours(ids, mask)[0]
    assert_valid_equal(got, theirs(ids, mask)[0], mask)
    assert (got - before).abs().max() > 0.01


def test_dropout_does_not_see_the_layout() -> None:
    model, _ = pair(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model.train()
    ids, mask = batch([7, 2, 5], 7)
    wide = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))

    def run(*arguments: Tensor, **options: bool) -> Tensor:
        torch.manual_seed(5)
        return model(*arguments, **options).last_hidden_state

    once = run(ids, mask)
    assert torch.equal(once, run(ids, mask))
    assert_valid_equal(run(*wide)[:, :7], once, mask)
    assert_valid_equal(run(ids, mask, output_attentions=True), once, mask)
    torch.manual_seed(6)
    assert (model(ids, mask)[0] - once).abs().max() > 0.1
    model.eval()
    assert torch.equal(run(ids, mask), model(ids, mask)[0])
