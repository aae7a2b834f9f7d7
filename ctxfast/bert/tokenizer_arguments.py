"""The arguments of a tokenizer call, in the meaning that Hugging Face gives them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ctxfast.bert.tokenizer import BertTokenizer

PADDING = ("longest", "max_length", "do_not_pad")
SIDES = ("right", "left")
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
Items = tuple[tuple[str, Any], ...]
UNLIMITED = int(1e20)  # a longer model_max_length stands for none


class Lengths(NamedTuple):
    """One of PADDING, one of TRUNCATION, and the length that they aim at, if any."""

    padding: str
    truncation: str
    max_length: int | None


def choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, or that of an enum, if it is allowed. Raises ValueError."""
    text = getattr(value, "value", value)
    if text not in allowed:
        raise ValueError(
            f"BertTokenizer: {argument} must be one of {tuple(allowed)}, got {value!r}"
        )
    return text


def integer(argument: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`. Raises TypeError, ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"BertTokenizer: {argument} must be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"BertTokenizer: {argument} must be at least {least}, got {number}")
    return number


def resolve_lengths(
    tokenizer: BertTokenizer,
    padding: Any,
    truncation: Any,
    max_length: int | None,
    pad_to_multiple_of: int | None,
) -> Lengths:
    """What the arguments of a call ask for; model_max_length stands in for max_length."""
    if max_length is not None:
        max_length = integer("max_length", max_length, 0)
        if truncation is None and padding is False:
            truncation = True
    names: dict[Any, str] = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
    padding = choice("padding", names.get(padding, padding), PADDING)
    names = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
    truncation = choice("truncation", names.get(truncation, truncation), TRUNCATION)
    if padding == "longest" and truncation == "do_not_truncate" and max_length is not None:
        warnings.warn(
            "BertTokenizer: max_length must come with padding='max_length' or with truncation, "
            "got neither and is ignored",
            stacklevel=3,
        )
    if max_length is None and (padding == "max_length" or truncation != "do_not_truncate"):
        if tokenizer.model_max_length <= UNLIMITED:
            max_length = tokenizer.model_max_length
        else:
            tokenizer.warn_once(
                "padding='max_length' and truncation must come with max_length where the "
                "tokenizer has no model_max_length, got none and do nothing"
            )
            padding = "do_not_pad" if padding == "max_length" else padding
            truncation = "do_not_truncate"
    if padding != "do_not_pad" and tokenizer.pad_token is None:
        raise ValueError("BertTokenizer: padding must be False without a pad_token, got True")
    if pad_to_multiple_of is not None:
        pad_to_multiple_of = integer("pad_to_multiple_of", pad_to_multiple_of, 0)
        truncates = truncation != "do_not_truncate" and padding != "do_not_pad"
        if pad_to_multiple_of and truncates and max_length and max_length % pad_to_multiple_of:
            raise ValueError(
                f"BertTokenizer: max_length must be a multiple of pad_to_multiple_of, "
                f"{pad_to_multiple_of}, where texts are truncated and padded, got {max_length}"
            )
    return Lengths(padding, truncation, max_length)


def truncation_items(tokenizer: BertTokenizer, lengths: Lengths, stride: int) -> Items:
    """Arguments of tokenizers.Tokenizer.enable_truncation; none if nothing is to be truncated."""
    if lengths.truncation == "do_not_truncate":
        return ()
    return (
        ("max_length", lengths.max_length),
        ("stride", stride),
        ("strategy", lengths.truncation),
        ("direction", choice("truncation_side", tokenizer.truncation_side, SIDES)),
    )


def padding_items(
    tokenizer: BertTokenizer,
    lengths: Lengths,
    pad_to_multiple_of: int | None,
    padding_side: str | None,
) -> Items:
    """Arguments of tokenizers.Tokenizer.enable_padding; none if nothing is to be padded."""
    if lengths.padding == "do_not_pad":
        return ()
    side = tokenizer.padding_side if padding_side is None else padding_side
    return (
        ("length", lengths.max_length if lengths.padding == "max_length" else None),
        ("direction", choice("padding_side", side, SIDES)),
        ("pad_id", tokenizer.pad_token_id),
        ("pad_type_id", tokenizer.pad_token_type_id),
        ("pad_token", tokenizer.pad_token),
        ("pad_to_multiple_of", pad_to_multiple_of),
    )


def as_batch(text: Any, text_pair: Any, is_split_into_words: bool) -> tuple[list[Any], bool]:
    """The texts or (text, pair) tuples to encode, and whether a batch was given.

    An empty pair of a single text counts as none, as in transformers.
    """
    batched = isinstance(text, (list, tuple))
    if is_split_into_words:
        if not batched:
            raise TypeError(
                "BertTokenizer: text must be a list of words where is_split_into_words is True, "
                f"got {_describe(text)}"
            )
        batched = bool(text) and isinstance(text[0], (list, tuple))
    elif not batched and not isinstance(text, str):
        raise TypeError(
            f"BertTokenizer: text must be a str or a list of str, got {_describe(text)}"
        )
    if not batched:
        return [(text, text_pair) if text_pair else text], False
    if text_pair is None:
        return list(text), True
    if not isinstance(text_pair, (list, tuple)):
        raise TypeError(
            f"BertTokenizer: text_pair must be a list, as text is, got {_describe(text_pair)}"
        )
    if len(text) != len(text_pair):
        raise ValueError(
            f"BertTokenizer: text_pair must have the length of text, {len(text)}, "
            f"got {len(text_pair)}"
        )
    return list(zip(text, text_pair, strict=True)), True


def is_pair(item: Any, is_split_into_words: bool) -> bool:
    """Whether an item of a batch is a text with its pair."""
    if not isinstance(item, (list, tuple)) or not is_split_into_words:
        return not isinstance(item, str)
    return len(item) == 2 and isinstance(item[0], (list, tuple))


def bad_input(batch: Sequence[Any], batched: bool, is_split_into_words: bool) -> str:
    """The error message for the first item of a batch that the Rust library does not take."""
    for i, item in enumerate(batch):
        pair = isinstance(item, (list, tuple)) and is_pair(item, is_split_into_words)
        parts = item if pair else [item]
        position = f"[{i}]" if batched else ""
        if len(parts) > 2:
            got = f"{len(parts)} items"
            return f"BertTokenizer: text{position} must be a text or a (text, pair), got {got}"
        for name, part in zip(("text", "text_pair"), parts, strict=False):
            whole = isinstance(part, (list, tuple)) if is_split_into_words else True
            words = part if whole and is_split_into_words else [part]
            for word in words:
                if not whole or not _is_text(word):
                    expected = "a list of words" if not whole else "valid text"
                    return (
                        f"BertTokenizer: {name}{position} must be {expected}, got {_describe(word)}"
                    )
    return "BertTokenizer: text must be a str, a list of str or a list of pairs, got something else"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return "a str" if _is_text(value) else f"a str with a lone surrogate: {ascii(value)[:60]}"
    return "None" if value is None else type(value).__name__
