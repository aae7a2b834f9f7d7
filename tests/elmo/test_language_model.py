"""Losses and perplexity of the language model, word by word."""

from __future__ import annotations

import pytest
import torch

from ctxfast.elmo import batch_to_ids
from ctxfast.elmo.language_model import BiLanguageModel
from tests.elmo import models

VOCABULARY = ["<S>", "</S>", "<UNK>", "the", "cat", "sat"]


def test_loss_word_by_word():
    model = BiLanguageModel(models.model(), VOCABULARY).eval()
    sentences = [["the", "cat", "sat"], ["a", "cat"]]
    output = model.score(sentences)
    numbers = [[3, 4, 5], [2, 4]]
    losses: dict[str, list[float]] = {"forward": [], "backward": []}
    for sentence, ids in zip(sentences, numbers, strict=True):
        top = model.bilm(batch_to_ids([sentence]))["activations"][2][0]
        chain = [0, *ids, 1]
        for place in range(len(chain) - 1):
            for name, hidden, target in (
                ("forward", top[place, :8], chain[place + 1]),
                ("backward", top[place + 1, 8:], chain[place]),
            ):
                logits = model.softmax_weight @ hidden + model.softmax_bias
                losses[name].append(-torch.log_softmax(logits, 0)[target].item())
    assert output.words == 7 == len(losses["forward"])
    assert output.forward_loss.item() == pytest.approx(sum(losses["forward"]) / 7, rel=1e-5)
    assert output.backward_loss.item() == pytest.approx(sum(losses["backward"]) / 7, rel=1e-5)
    assert output.perplexity == pytest.approx(output.loss.exp().item(), rel=1e-5)
    again = model.score(sentences)
    assert torch.equal(again.loss, output.loss)  # no state is carried


def test_training_reaches_both_directions_and_the_characters():
    torch.manual_seed(2)  # from some starts 40 steps do not lead far
    bilm = models.model()
    bilm.requires_grad_(True)
    model = BiLanguageModel(bilm, VOCABULARY)
    optimiser = torch.optim.Adagrad(model.parameters(), 0.1)
    first = None
    for _ in range(40):
        output = model.score([["the", "cat", "sat"], ["cat", "the"]])
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        first = first if first is not None else output.loss.item()
    assert output.loss.item() < 0.6 * first
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="must begin with <S>, </S> and <UNK>"):
        BiLanguageModel(models.model(), ["the", "cat"])
    model = BiLanguageModel(models.model(), VOCABULARY)
    with pytest.raises(ValueError, match=r"word_ids must be \(1, 2\), got \(1, 3\)"):
        model(torch.ones(1, 2, 50, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))
