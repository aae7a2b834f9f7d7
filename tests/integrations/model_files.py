"""Small models with a tokenizer in a folder, as `from_pretrained`, pipelines and sentence-transformers load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.model_cases import VOCABULARY, build

transformers = pytest.importorskip("transformers")

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = """
    the a an this we you it is was not very film food plot good bad great dull warm service loved hated ate and or but
    in with paris berlin anna where who . , ! ? ##s ##ed
"""

# Of different lengths, one of a single word, one with words that the vocabulary lacks.
TEXTS = [
    "The film was very good, and we loved it.",
    "Dull.",
    "Where was Anna? In Paris, with the great food and the warm service!",
    "this was an unfathomable plot",
    "we ate in berlin but it was not very good",
]


def save(folder: Path, family: str = "bert", head: str = "Model", **fields: Any) -> Path:
    """Writes a small random model of this family and head, and a WordPiece tokenizer; returns the folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = [*_SPECIAL, *_WORDS.split()]
    assert len(words) <= VOCABULARY
    vocabulary = {word: index for index, word in enumerate(words)}
    model = build(family, head, pad_token_id=0, **fields)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "attention_mask"]
    if family == "bert":
        names.insert(1, "token_type_ids")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=36,
        model_input_names=names,
        **{f"{word.strip('[]').lower()}_token": word for word in _SPECIAL},
    ).save_pretrained(folder)
    return folder
