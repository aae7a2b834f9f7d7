"""Programs written for AllenNLP's ELMo."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from ctxfast.integrations import allennlp
from tests.elmo import models


@pytest.fixture
def installed():
    if importlib.util.find_spec("allennlp") is not None:
        pytest.skip("AllenNLP itself is installed")
    allennlp.install()
    yield
    allennlp.uninstall()
    assert "allennlp" not in sys.modules


def test_old_programs_run(installed, tmp_path):
    allennlp.install()  # twice is once
    models.model().save(tmp_path, form="hdf5")
    program = """
from allennlp.commands.elmo import ElmoEmbedder
from allennlp.common.checks import ConfigurationError
from allennlp.data.token_indexers.elmo_indexer import ELMoCharacterMapper
from allennlp.modules.elmo import Elmo, _ElmoBiLm, _ElmoCharacterEncoder, batch_to_ids
from allennlp.modules.elmo_lstm import ElmoLstm
from allennlp.modules.scalar_mix import ScalarMix
from allennlp.modules.token_embedders import ElmoTokenEmbedder
from allennlp.nn.util import remove_sentence_boundaries
import allennlp.modules.elmo

elmo = Elmo(options, weights, 2, dropout=0)
output = elmo(batch_to_ids([["First", "sentence", "."], ["Another", "."]]))
shape = tuple(output["elmo_representations"][1].shape)
embedder = ElmoEmbedder(options, weights, -1)
vectors = embedder.embed_sentence(["I", "ate", "an", "apple"])
encoder = _ElmoCharacterEncoder(options, weights)
"""
    names = {"options": str(tmp_path / "options.json"), "weights": str(tmp_path / "weights.hdf5")}
    exec(program, names)
    assert names["shape"] == (2, 3, 16) and names["vectors"].shape == (3, 4, 16)
    assert names["encoder"].get_output_dim() == 8
    assert names["embedder"].elmo_bilm._elmo_lstm._states[0].shape == (2, 1, 16)
    with pytest.raises(ImportError):
        exec("from allennlp.models import Model", {})


def test_without_install_nothing_is_there():
    if importlib.util.find_spec("allennlp") is None:
        with pytest.raises(ImportError):
            importlib.import_module("allennlp.modules.elmo")
