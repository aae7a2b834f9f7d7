"""What a model returns: a mapping that is also read by attribute and by index, as in transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


class ModelOutput(dict[str, Any]):
    """The fields that are not None, in the order in which the class declares them.

    `output.last_hidden_state`, `output["last_hidden_state"]`, `output[0]`, `output[:2]` and `output.to_tuple()` agree.
    Iteration gives the names of the fields, as in any mapping.
    """

    fields: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        inherited = [
            f for base in reversed(cls.__mro__[1:]) for f in base.__dict__.get("fields", ())
        ]
        own = [name for name in inspect.get_annotations(cls) if name not in inherited]
        cls.fields = (*dict.fromkeys(inherited), *own)

    def __init__(self, **values: Any) -> None:
        unknown = values.keys() - self.fields
        if unknown:
            raise TypeError(f"{type(self).__name__}: unknown field {', '.join(sorted(unknown))}")
        super().__init__(
            {name: values[name] for name in self.fields if values.get(name) is not None}
        )

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self[name] for name in self.fields if self.get(name) is not None)


class BaseModelOutputWithPooling(ModelOutput):
    """What `BertModel` returns.

    last_hidden_state: [B, S, H], zero in padding
    pooler_output:     [B, H], None without a pooling layer
    hidden_states:     num_hidden_layers + 1 tensors [B, S, H], the embeddings first, where asked for
    attentions:        num_hidden_layers tensors [B, heads, S, S], where asked for
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class _HeadOutput(ModelOutput):
    """The loss comes first, where labels are given; hidden states and attentions as in BaseModelOutputWithPooling."""

    loss: Tensor | None


class BertForPreTrainingOutput(_HeadOutput):
    """loss [] where both kinds of labels are given; logits [B, S, V], zero in padding, and [B, 2]."""

    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class MaskedLMOutput(_HeadOutput):
    """logits [B, S, V], zero in padding; None in a training step with labels under config.sparse_prediction."""

    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class SequenceClassifierOutput(_HeadOutput):
    """logits [B, num_labels]."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class NextSentencePredictorOutput(SequenceClassifierOutput):
    """logits [B, 2]: column 0 that the second sentence follows the first, column 1 that it does not."""


class MultipleChoiceModelOutput(SequenceClassifierOutput):
    """logits [B, choices]."""


class TokenClassifierOutput(SequenceClassifierOutput):
    """logits [B, S, num_labels], zero in padding."""


class QuestionAnsweringModelOutput(_HeadOutput):
    """start_logits and end_logits [B, S], the lowest value of their type in padding."""

    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
