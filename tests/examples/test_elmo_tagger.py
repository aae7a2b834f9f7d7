"""The tagger learns, and only what should learn does."""

from __future__ import annotations

import torch

from ctxfast.elmo import Elmo
from ctxfast.examples.elmo_tagger import Tagger, read_conllu, train
from tests.elmo import models

SENTENCES = [
    [("the", "DET"), ("cat", "NOUN"), ("sleeps", "VERB")],
    [("a", "DET"), ("dog", "NOUN"), ("barks", "VERB"), (".", "PUNCT")],
    [("sleeps", "VERB"), ("the", "DET"), ("dog", "NOUN"), ("?", "PUNCT")],
]
TAGS = ["DET", "NOUN", "PUNCT", "VERB"]


def tagger(tmp_path) -> Tagger:
    models.model().save(tmp_path)
    elmo = Elmo(tmp_path, None, 1, dropout=0.0)
    elmo.stateful = "reset"
    return Tagger(elmo, TAGS, hidden=16)


def test_only_mix_gamma_and_task_network_get_gradients(tmp_path):
    model = tagger(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.loss(SENTENCES).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    mix = {"elmo.scalar_mix_0.gamma"}
    mix |= {f"elmo.scalar_mix_0.scalar_parameters.{j}" for j in range(3)}
    task = {name for name in before if name.startswith(("lstm.", "output."))}
    assert with_gradient == mix | task
    train(model, SENTENCES, epochs=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in with_gradient), name


def test_it_learns(tmp_path):
    torch.manual_seed(0)
    model = tagger(tmp_path)
    train(model, SENTENCES, epochs=300, rate=1e-2)
    assert model.accuracy(SENTENCES) == 1.0


def test_conllu(tmp_path):
    rows = ["# text", "1\tThe\tthe\tDET\t_", "2-3\tcan't\t_\t_\t_", "2\tca\tcan\tAUX\t_", "", ""]
    (tmp_path / "x.conllu").write_text("\n".join(rows))
    assert read_conllu(tmp_path / "x.conllu") == [[("The", "DET"), ("ca", "AUX")]]
