"""Padding of sequences that are already encoded, as a data collator needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ctxfast.bert.batch_encoding import BatchEncoding, to_list
from ctxfast.bert.tokenizer_arguments import SIDES, choice, resolve_lengths

if TYPE_CHECKING:
    from ctxfast.bert.tokenizer import BertTokenizer


def pad(
    tokenizer: BertTokenizer,
    encoded_inputs: Any,
    padding: Any = True,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_attention_mask: bool | None = None,
    return_tensors: Any = None,
) -> BatchEncoding:
    """See `BertTokenizer.pad`."""
    if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs:
        if not all(isinstance(example, Mapping) for example in encoded_inputs):
            raise TypeError(
                "pad: encoded_inputs must be a mapping or a list of mappings, got others"
            )
        encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in encoded_inputs[0]}
    main = tokenizer.model_input_names[0]
    if not isinstance(encoded_inputs, Mapping) or main not in encoded_inputs:
        raise ValueError(f"pad: encoded_inputs must hold {main!r}, got {_names(encoded_inputs)}")
    if return_tensors is None:
        return_tensors = _kind(encoded_inputs[main])
    data = {key: to_list(value) for key, value in encoded_inputs.items()}
    if return_attention_mask is None:
        return_attention_mask = "attention_mask" in tokenizer.model_input_names
    ids = data[main]
    single = bool(ids) and not isinstance(ids[0], (list, tuple))
    rows = [ids] if single else ids
    if return_attention_mask and "attention_mask" not in data:
        masks = [[1] * len(row) for row in rows]
        data["attention_mask"] = masks[0] if single else masks
    lengths = resolve_lengths(tokenizer, padding, False, max_length, None)
    if lengths.padding != "do_not_pad" and rows:
        longest = max(map(len, rows))
        target = longest if lengths.padding == "longest" else (lengths.max_length or 0)
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        side = choice("padding_side", padding_side or tokenizer.padding_side, SIDES)
        fill = {
            main: tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        if return_attention_mask:
            fill["attention_mask"] = 0
        for key in fill.keys() & data.keys():
            values = [data[key]] if single else data[key]
            padded = [
                _pad_row(row, len(of), target, fill[key], side)
                for row, of in zip(values, rows, strict=True)
            ]
            data[key] = padded[0] if single else padded
    return BatchEncoding(data, tensor_type=return_tensors)


def _pad_row(row: list[int], length: int, target: int, value: int, side: str) -> list[int]:
    filler = [value] * (target - length)
    return [*row, *filler] if side == "right" else [*filler, *row]


def _names(encoded_inputs: Any) -> Any:
    return list(encoded_inputs) if isinstance(encoded_inputs, Mapping) else encoded_inputs


def _kind(ids: Any) -> str | None:
    """The tensor type of the input, which the output then has too."""
    first = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
    return (
        "pt"
        if isinstance(first, torch.Tensor)
        else "np"
        if isinstance(first, np.ndarray | np.generic)
        else None
    )
