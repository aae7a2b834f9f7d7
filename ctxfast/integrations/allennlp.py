"""AllenNLP's ELMo imports on ctxfast: programs written for `allennlp.modules.elmo` run without AllenNLP."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any

from ctxfast import elmo, nn

# Module names of AllenNLP 0.9 to 2.10 that hold parts of ELMo, and what each of them gives.
_NAMES: Mapping[str, Mapping[str, Any]] = {
    "allennlp.common.checks": {"ConfigurationError": elmo.ConfigurationError},
    "allennlp.modules.elmo": {
        "Elmo": elmo.Elmo,
        "_ElmoBiLm": elmo.ElmoBiLm,
        "_ElmoCharacterEncoder": elmo.ElmoCharacterEncoder,
        "batch_to_ids": elmo.batch_to_ids,
        "ELMoCharacterMapper": elmo.ELMoCharacterMapper,
        "ELMoTokenCharactersIndexer": elmo.ELMoTokenCharactersIndexer,
        "ElmoLstm": elmo.ElmoLstm,
        "Highway": nn.Highway,
        "ScalarMix": nn.ScalarMix,
        "ConfigurationError": elmo.ConfigurationError,
        "remove_sentence_boundaries": elmo.remove_sentence_boundaries,
        "add_sentence_boundary_token_ids": elmo.add_sentence_boundary_token_ids,
    },
    "allennlp.modules.elmo_lstm": {"ElmoLstm": elmo.ElmoLstm},
    "allennlp.modules.lstm_cell_with_projection": {
        "LstmCellWithProjection": elmo.LstmCellWithProjection
    },
    "allennlp.modules.highway": {"Highway": nn.Highway},
    "allennlp.modules.scalar_mix": {"ScalarMix": nn.ScalarMix},
    "allennlp.modules.token_embedders": {"ElmoTokenEmbedder": elmo.ElmoTokenEmbedder},
    "allennlp.modules.token_embedders.elmo_token_embedder": {
        "ElmoTokenEmbedder": elmo.ElmoTokenEmbedder
    },
    "allennlp.commands.elmo": {"ElmoEmbedder": elmo.ElmoEmbedder},
    "allennlp.data.token_indexers": {"ELMoTokenCharactersIndexer": elmo.ELMoTokenCharactersIndexer},
    "allennlp.data.token_indexers.elmo_indexer": {
        "ELMoCharacterMapper": elmo.ELMoCharacterMapper,
        "ELMoTokenCharactersIndexer": elmo.ELMoTokenCharactersIndexer,
    },
    "allennlp.nn.util": {
        "remove_sentence_boundaries": elmo.remove_sentence_boundaries,
        "add_sentence_boundary_token_ids": elmo.add_sentence_boundary_token_ids,
    },
}
_MARK = "__ctxfast__"


def install() -> None:
    """Makes AllenNLP's ELMo modules importable in this process, from ctxfast.

    Only the names around ELMo exist; any other import of AllenNLP fails as it does without AllenNLP. Calling it again
    does nothing. Raises RuntimeError where AllenNLP itself is installed: it is left alone.
    """
    present = sys.modules.get("allennlp")
    if present is not None and hasattr(present, _MARK):
        return
    if present is not None or importlib.util.find_spec("allennlp") is not None:
        raise RuntimeError(
            "ctxfast.integrations.allennlp.install: allennlp must not be installed, got the package itself; "
            "import from ctxfast.elmo in its place"
        )
    for name, members in _NAMES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            _module(".".join(parts[:depth]))
        vars(sys.modules[name]).update(members)


def uninstall() -> None:
    """Takes back `install`."""
    for name in [n for n, module in sys.modules.items() if hasattr(module, _MARK)]:
        if name.split(".")[0] == "allennlp":
            del sys.modules[name]


def _module(name: str) -> None:
    if name in sys.modules:
        return
    module = types.ModuleType(name, "Provided by ctxfast.integrations.allennlp.")
    module.__path__ = []  # a package without files
    setattr(module, _MARK, True)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
