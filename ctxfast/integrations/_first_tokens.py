"""Heads that read first tokens alone, and what of an encoder nobody can see behind them.

The logits of such a head are a function of one row a sequence. Of the last layer it takes the keys and values of all
tokens, and everything else of the first ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from ctxfast.bert.selection import Selection
from ctxfast.integrations._families import family_of, submodule
from ctxfast.integrations._stock import NotStock, require_class, require_plain

# By head, the module that is given the whole last hidden state: its path and class. None: the first column alone leaves
# the code of the encoder and the head. MPNet's relative bias takes queries of all rows.
_READERS: dict[str, tuple[str, str] | None] = {
    "BertForSequenceClassification": ("bert.pooler", "BertPooler"),
    "RobertaForSequenceClassification": ("classifier", "RobertaClassificationHead"),
    "XLMRobertaForSequenceClassification": ("classifier", "XLMRobertaClassificationHead"),
    "CamembertForSequenceClassification": ("classifier", "CamembertClassificationHead"),
    "ElectraForSequenceClassification": ("classifier", "ElectraClassificationHead"),
    "DistilBertForSequenceClassification": None,
    "AlbertForSequenceClassification": None,
}

_head: ContextVar[Any] = ContextVar("head", default=None)


@contextlib.contextmanager
def first_token_first(head: Any) -> Iterator[None]:
    """Inside the forward of `head`, column 0 of a last hidden state is each sequence's first token, wherever its
    padding lies.
    """
    token = _head.set(head)
    try:
        yield
    finally:
        _head.reset(token)


def wants_first_token_first() -> bool:
    return _head.get() is not None


def first_tokens_suffice(model: nn.Module) -> bool:
    """Whether the last hidden state of this call of `model` reaches nobody but a head that reads first tokens of it."""
    head, family = _head.get(), family_of(type(model))
    name = type(head).__name__
    if name not in _READERS or family is None:
        return False
    for module, stock in ((head, family.stock(name)), (model, family.stock(family.model))):
        if type(module).__dict__.get("_ctxfast_stock") is not stock:
            return False
    if head._modules.get(head.base_model_prefix) is not model:
        return False
    reader = _READERS[name]
    try:
        require_plain("the encoder", model)
        if reader is not None:
            found = submodule(head, reader[0])
            require_class(reader[0], found, family.stock(reader[1]))
            require_plain(reader[0], found)  # type: ignore[arg-type]
    except NotStock:
        return False
    return True


def first_column(selection: Selection, rows: Tensor) -> Tensor:
    """[R, H] of the selection -> [B, 1, H], zero for a sequence without tokens."""
    batch = selection.batch
    rows = rows[: batch.total]
    if batch.total < batch.batch_size:
        grid = rows.new_zeros(batch.batch_size, rows.shape[1])
        rows = grid.index_copy(0, batch.sequence_ids, rows)
    return rows.unsqueeze(1)
