"""ELMo (Peters et al., 2018) under AllenNLP's names: published files load, the numbers are the same."""

from __future__ import annotations

from ctxfast.elmo.bilm import ElmoBiLm
from ctxfast.elmo.boundaries import add_sentence_boundary_token_ids, remove_sentence_boundaries
from ctxfast.elmo.cell import LstmCellWithProjection
from ctxfast.elmo.characters import ELMoCharacterMapper, batch_to_ids
from ctxfast.elmo.elmo import Elmo, ElmoTokenEmbedder
from ctxfast.elmo.embedder import ElmoEmbedder, ELMoTokenCharactersIndexer
from ctxfast.elmo.files import convert, is_elmo, load_model, save_model
from ctxfast.elmo.language_model import BiLanguageModel
from ctxfast.elmo.lstm import ElmoLstm
from ctxfast.elmo.options import ElmoOptions
from ctxfast.elmo.token_encoder import ElmoCharacterEncoder
from ctxfast.nn.scalar_mix import ConfigurationError, ScalarMix

_ElmoBiLm = ElmoBiLm
_ElmoCharacterEncoder = ElmoCharacterEncoder

__all__ = [
    "BiLanguageModel",
    "ConfigurationError",
    "ELMoCharacterMapper",
    "ELMoTokenCharactersIndexer",
    "Elmo",
    "ElmoBiLm",
    "ElmoCharacterEncoder",
    "ElmoEmbedder",
    "ElmoLstm",
    "ElmoOptions",
    "ElmoTokenEmbedder",
    "LstmCellWithProjection",
    "ScalarMix",
    "add_sentence_boundary_token_ids",
    "batch_to_ids",
    "convert",
    "is_elmo",
    "load_model",
    "remove_sentence_boundaries",
    "save_model",
]
