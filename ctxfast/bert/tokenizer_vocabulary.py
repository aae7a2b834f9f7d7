"""Half of BertTokenizer: its tokens and ids, special and added tokens, and ids back to text."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from ctxfast.bert import tokenizer_files as files
from ctxfast.bert.batch_encoding import to_list

# In the order of application, which matters: " ' " comes before the contractions.
_CONTRACTIONS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Settings(NamedTuple):
    """The state of a Rust tokenizer: items of the arguments of enable_truncation, enable_padding."""

    truncation: tuple[tuple[str, Any], ...] = ()
    padding: tuple[tuple[str, Any], ...] = ()
    split_special_tokens: bool = False


def _special_token(name: str) -> Any:
    def get(self: Vocabulary) -> str | None:
        token = self._special_tokens[name]
        return None if token is None else str(token)

    def set_(self: Vocabulary, token: str | AddedToken | None) -> None:
        if token is not None and not isinstance(token, (str, AddedToken)):
            raise TypeError(f"BertTokenizer: {name} must be a str, got {type(token).__name__}")
        self._special_tokens[name] = token

    return property(get, set_, doc=f"The {name.replace('_', ' ')}, or None.")


def _special_token_id(name: str) -> Any:
    def get(self: Vocabulary) -> int | None:
        token = getattr(self, name)
        return None if token is None else self.convert_tokens_to_ids(token)

    return property(get, doc=f"Id of the {name.replace('_', ' ')}, or None.")


class Vocabulary:
    """Tokens, ids and special tokens over a `tokenizers.Tokenizer`.

    A Rust tokenizer keeps truncation and padding as state, so that two callers who share one see
    each other's. Here every combination in use has a tokenizer of its own (`_view`) over the one
    vocabulary; making one takes ten microseconds. A vocabulary that grows is replaced, not changed.
    """

    bos_token = _special_token("bos_token")
    eos_token = _special_token("eos_token")
    unk_token = _special_token("unk_token")
    sep_token = _special_token("sep_token")
    pad_token = _special_token("pad_token")
    cls_token = _special_token("cls_token")
    mask_token = _special_token("mask_token")
    bos_token_id = _special_token_id("bos_token")
    eos_token_id = _special_token_id("eos_token")
    unk_token_id = _special_token_id("unk_token")
    sep_token_id = _special_token_id("sep_token")
    pad_token_id = _special_token_id("pad_token")
    cls_token_id = _special_token_id("cls_token")
    mask_token_id = _special_token_id("mask_token")
    pad_token_type_id = 0
    clean_up_tokenization_spaces = False

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str | AddedToken | None],
        extra_special_tokens: Sequence[str | AddedToken],
        added_tokens: Mapping[int, AddedToken],
    ) -> None:
        self._lock = threading.Lock()
        self._backend = backend
        self._backend_is_shared = False
        self._views: dict[Settings, Tokenizer] = {}
        self._special_tokens = {name: special_tokens.get(name) for name in files.SPECIAL_TOKENS}
        self._extra_special_tokens = list(extra_special_tokens)
        known = set(self.added_tokens_encoder)
        named = [token for token in self._special_tokens.values() if token is not None]
        in_order = [added_tokens[index] for index in sorted(added_tokens)]
        size = len(self)
        for token in (*in_order, *named, *self._extra_special_tokens):
            if str(token) not in known:
                known.add(str(token))
                backend.add_tokens([self._flagged(token)])
        self._warn_of_new_ids(size, added_tokens)

    def _flagged(self, token: str | AddedToken) -> AddedToken:
        if isinstance(token, str):
            return AddedToken(token, special=True)
        token.special = token.special or str(token) in self.all_special_tokens
        return token

    def _warn_of_new_ids(self, size: int, added_tokens: Mapping[int, AddedToken]) -> None:
        """Warns of tokens for which an embedding table has no row, or another one."""
        recorded = {str(token): index for index, token in added_tokens.items()}
        for token, index in self.added_tokens_encoder.items():
            if index != recorded.get(token, index):
                warnings.warn(
                    f"BertTokenizer: added token {token!r} must have the id it was saved with, "
                    f"{recorded[token]}, got {index}",
                    stacklevel=4,
                )
            elif (
                index >= size
                and token not in recorded
                and token in self.special_tokens_map.values()
            ):
                warnings.warn(
                    f"BertTokenizer: the vocabulary must hold the special token {token!r}, got "
                    f"{size} tokens without it; its id is now {index}, for which a model may have "
                    "no embedding",
                    stacklevel=4,
                )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_views"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._views = {}

    def _view(self, settings: Settings) -> Tokenizer:
        """A tokenizer with these settings that nobody changes any more."""
        view = self._views.get(settings)
        if view is not None:
            return view
        with self._lock:
            view = files.clone(self._backend)
            if settings.truncation:
                view.enable_truncation(**dict(settings.truncation))
            if settings.padding:
                view.enable_padding(**dict(settings.padding))
            view.encode_special_tokens = settings.split_special_tokens
            if not self._backend_is_shared:
                if len(self._views) >= 64:
                    self._views.clear()
                self._views[settings] = view
        return view

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer`. A part that is replaced on it takes effect in later calls."""
        with self._lock:
            self._backend_is_shared = True
            self._views.clear()
        return self._backend

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens, the special ones among them, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids of the added tokens, in their order."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens beyond the named ones."""
        return [str(token) for token in self._extra_special_tokens]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The name that transformers 4 has for `extra_special_tokens`."""
        return self.extra_special_tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set."""
        return {name: str(token) for name, token in self._special_tokens.items() if token}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once."""
        return list(dict.fromkeys((*self.special_tokens_map.values(), *self.extra_special_tokens)))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a sequence; the unknown token's where there is none."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self.unk_token_id if index is None and tokens != self.unk_token else index
        if not isinstance(tokens, Iterable):
            raise TypeError(
                f"convert_tokens_to_ids: tokens must be a str or a sequence of str, got {tokens!r}"
            )
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a sequence; None for ids beyond the vocabulary."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        numbers = (int(index) for index in ids)
        return [self._backend.id_to_token(index) for index in numbers if index not in skipped]

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Adds tokens at the end of the vocabulary; returns how many were new."""
        if isinstance(new_tokens, (str, AddedToken)):
            new_tokens = [new_tokens]
        if not all(isinstance(token, (str, AddedToken)) for token in new_tokens):
            raise TypeError("add_tokens: new_tokens must be str or AddedToken, got another type")
        with self._lock:
            backend = files.clone(self._backend)
            add = backend.add_special_tokens if special_tokens else backend.add_tokens
            number = add(list(new_tokens))
            self._backend, self._views = backend, {}
        return number

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Sets special tokens ("cls_token", ..., "extra_special_tokens"), adding those that are new.

        Returns how many tokens the vocabulary grew by. Raises ValueError for another name.
        """
        new: list[AddedToken] = []
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                tokens = [files.to_added_token(token, special=True) for token in value]
                kept = [] if replace_extra_special_tokens else self._extra_special_tokens
                present = {str(token) for token in kept}
                tokens = [token for token in tokens if str(token) not in present]
                self._extra_special_tokens = [*kept, *tokens]
                new += tokens
            elif name in files.SPECIAL_TOKENS:
                token = files.to_added_token(value, special=True)
                self._special_tokens[name] = token
                new.append(token)
            else:
                raise ValueError(
                    f"add_special_tokens: special_tokens_dict must have keys out of "
                    f"{(*files.SPECIAL_TOKENS, 'extra_special_tokens')}, got {name!r}"
                )
        return self.add_tokens(new, special_tokens=True) if new else 0

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of special tokens around one text, or around a pair."""
        return self._backend.num_special_tokens_to_add(pair)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where an id of a formatted sequence is a special token's, else 0."""
        if token_ids_1 is not None or not already_has_special_tokens:
            raise ValueError(
                "get_special_tokens_mask: already_has_special_tokens must be True, with one sequence, "
                "got other ids; return_special_tokens_mask=True makes the mask when text is encoded"
            )
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of ids (an int, a list, an array or a tensor), or the texts of a batch of them."""
        ids = to_list(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, int):
            ids = [ids]
        batched = bool(ids) and isinstance(ids[0], (list, tuple))
        try:
            texts = self._backend.decode_batch(
                ids if batched else [ids], skip_special_tokens=skip_special_tokens
            )
        except (TypeError, OverflowError) as error:
            raise ValueError(
                f"decode: token_ids must be non-negative integers, got others ({error})"
            ) from error
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            texts = [self.clean_up_tokenization(text) for text in texts]
        return texts if batched else texts[0]

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of a batch of id sequences."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens: word pieces joined."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """`text` without the spaces before punctuation and English contractions."""
        for spaced, joined in _CONTRACTIONS:
            text = text.replace(spaced, joined)
        return text
