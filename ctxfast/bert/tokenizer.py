"""BertTokenizer: the WordPiece tokenization of BERT (Wu et al., 2016; Devlin et al., 2019)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding

from ctxfast.bert import tokenizer_files
from ctxfast.bert.batch_encoding import BatchEncoding
from ctxfast.bert.files import make_directory, resolve_directory, write_atomically
from ctxfast.bert.tokenizer_arguments import (
    SIDES,
    as_batch,
    bad_input,
    choice,
    integer,
    is_pair,
    padding_items,
    resolve_lengths,
    truncation_items,
)
from ctxfast.bert.tokenizer_padding import pad
from ctxfast.bert.tokenizer_vocabulary import Settings, Vocabulary

_NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a longest length


def _write(text: str, path: Path) -> None:
    path.write_bytes(text.encode())


class BertTokenizer(Vocabulary):
    """Text to token ids and back, as Hugging Face's BertTokenizerFast does it, and called like it.

    Ids, offsets and words equal those of transformers' fast tokenizer, which differs from Google's
    original in a few places: a final sigma becomes a medial one in lower case, private-use
    characters are dropped, a special token such as "[SEP]" inside a text is that token
    (split_special_tokens=True splits it), and words of more than 100 characters are unknown, where
    Google's limit is now 200.

    Calls from several threads neither wait for nor see one another: no call changes the tokenizer.

    vocab_file, vocab: vocab.txt, or a mapping of tokens to ids
    tokenizer_file:   tokenizer.json, instead of vocab_file
    do_lower_case, strip_accents, tokenize_chinese_chars: by default what tokenizer_file says; for a
                      vocab_file True, the same as do_lower_case, and True
    extra_special_tokens: special tokens beyond the named ones
    added_tokens:     tokens that follow the vocabulary, by id
    keep_template:    keep the special tokens that tokenizer_file puts around a text, instead of
                      [CLS] A [SEP] and [CLS] A [SEP] B [SEP]
    model_max_length: tokens that the model takes; without limit by default

    Raises FileNotFoundError for a missing file; ValueError for one that is not UTF-8, not JSON or no
    WordPiece vocabulary.
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | Mapping[str, int] | None = None,
        *,
        vocab: str | os.PathLike[str] | Mapping[str, int] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        do_lower_case: bool | None = None,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool | None = None,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        unk_token: str | AddedToken | None = None,
        sep_token: str | AddedToken = "[SEP]",
        pad_token: str | AddedToken | None = "[PAD]",
        cls_token: str | AddedToken = "[CLS]",
        mask_token: str | AddedToken | None = "[MASK]",
        extra_special_tokens: Sequence[str | AddedToken] = (),
        added_tokens: Mapping[int, AddedToken] | None = None,
        keep_template: bool = False,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
        name_or_path: str = "",
    ) -> None:
        unk = None if unk_token is None else str(unk_token)
        vocab = vocab_file if vocab is None else vocab
        backend = tokenizer_files.build_backend(vocab, tokenizer_file, unk)
        tokenizer_files.set_normalizer(
            backend,
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
        )
        super().__init__(
            backend,
            {
                "bos_token": bos_token,
                "eos_token": eos_token,
                "unk_token": unk_token or backend.model.unk_token,
                "sep_token": sep_token,
                "pad_token": pad_token,
                "cls_token": cls_token,
                "mask_token": mask_token,
            },
            extra_special_tokens,
            added_tokens or {},
        )
        if not keep_template:
            backend.post_processor = tokenizer_files.template(
                backend, str(cls_token), str(sep_token)
            )
        options = tokenizer_files.normalizer_options(backend)
        self.do_lower_case = options.get("do_lower_case")
        self.strip_accents = options.get("strip_accents")
        self.tokenize_chinese_chars = options.get("tokenize_chinese_chars")
        if isinstance(model_max_length, float):
            model_max_length = int(min(model_max_length, _NO_LIMIT))
        limit = _NO_LIMIT if model_max_length is None else model_max_length
        self.model_max_length = integer("model_max_length", limit, 1)
        self.padding_side = choice("padding_side", padding_side, SIDES)
        self.truncation_side = choice("truncation_side", truncation_side, SIDES)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self.model_input_names = list(model_input_names)
        self.name_or_path = name_or_path
        self.is_fast = True
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> BertTokenizer:
        """The tokenizer of a directory, or of a model on the Hugging Face hub (local cache first).

        Options come from tokenizer_config.json as transformers reads it; `overrides` are arguments
        of the class and win. A tokenizer.json without that file is taken as it says itself.
        """
        caller = "BertTokenizer.from_pretrained"
        if isinstance(directory, (str, os.PathLike)) and os.path.isfile(directory):
            name = "tokenizer_file" if str(directory).endswith(".json") else "vocab_file"
            return cls(**{name: directory, **overrides})
        path = resolve_directory(
            directory,
            caller=caller,
            cache_dir=cache_dir,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
        )
        options = tokenizer_files.read_directory(path, caller)
        return cls(**{**options, "name_or_path": str(directory), **overrides})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes tokenizer.json, tokenizer_config.json and, where it can say the same, vocab.txt.

        transformers loads the directory and tokenizes as this tokenizer does. No file is ever half
        written. Returns the paths.
        """
        path = make_directory(directory, caller="save_pretrained")
        paths = []
        for name, text in tokenizer_files.file_texts(self._backend, self._config()).items():
            write_atomically(path / name, partial(_write, text))
            paths.append(str(path / name))
        return tuple(paths)

    def _config(self) -> dict[str, Any]:
        names = (
            "do_lower_case",
            "strip_accents",
            "tokenize_chinese_chars",
            "model_max_length",
            "padding_side",
            "truncation_side",
            "clean_up_tokenization_spaces",
            "split_special_tokens",
            "model_input_names",
        )
        config = {name: getattr(self, name) for name in names}
        config = {name: value for name, value in config.items() if value is not None}
        config.update(self.special_tokens_map)
        if self.extra_special_tokens:
            config["extra_special_tokens"] = self.extra_special_tokens
        return config

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodes a text, or a batch of them, alone or each with its pair.

        text, text_pair: a str, or a list of str for a batch; with is_split_into_words, a list of
                         words, or a list of such lists. A batch may be a list of (text, pair)
        padding:         False, True or "longest", "max_length"
        truncation:      False, True or "longest_first", "only_first", "only_second"; by default
                         "longest_first" where max_length is given and padding is not
        max_length:      tokens of a row, special ones included; model_max_length by default
        stride:          tokens that a row shares with the overflowing row before it
        return_overflowing_tokens: what was cut off, in further rows; overflow_to_sample_mapping
                         says whose they are
        return_tensors:  None for lists, "pt" for int64 tensors [B, S], "np" for arrays
        verbose:         whether to warn, once, of a text longer than model_max_length

        Raises TypeError for what is not valid text, naming it; ValueError for lengths without room.
        """
        lengths = resolve_lengths(self, padding, truncation, max_length, pad_to_multiple_of)
        batch, batched = as_batch(text, text_pair, is_split_into_words)
        stride = integer("stride", stride, 0)
        if lengths.truncation != "do_not_truncate":
            pair = any(is_pair(item, is_split_into_words) for item in batch)
            special = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
            room = integer("max_length", lengths.max_length, special) - special
            if stride and stride >= room:
                raise ValueError(
                    f"BertTokenizer: stride must be less than max_length without {special} special "
                    f"tokens, which is {room}, got {stride}"
                )
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        settings = Settings(
            truncation_items(self, lengths, stride),
            padding_items(self, lengths, pad_to_multiple_of, padding_side),
            split_special_tokens,
        )
        encodings = self._encode(settings, batch, batched, is_split_into_words, add_special_tokens)
        owners = list(range(len(encodings)))
        if return_overflowing_tokens:
            groups = [[encoding, *encoding.overflowing] for encoding in encodings]
            owners = [i for i, group in enumerate(groups) for _ in group]
            encodings = [encoding for group in groups for encoding in group]

        data: dict[str, Any] = {"input_ids": [encoding.ids for encoding in encodings]}
        if self._wants("token_type_ids", return_token_type_ids):
            data["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if self._wants("attention_mask", return_attention_mask):
            data["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [encoding.special_tokens_mask for encoding in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [encoding.offsets for encoding in encodings]
        longest = max(map(len, data["input_ids"]), default=0)
        if return_length:
            data["length"] = [len(ids) for ids in data["input_ids"]]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = owners
        if verbose and lengths.max_length is None and longest > self.model_max_length:
            self.warn_once(
                f"a text must have at most {self.model_max_length} tokens for the model, "
                f"got {longest}; truncation=True cuts it"
            )
        if not batched and return_tensors is None and not return_overflowing_tokens:
            data = {
                key: rows[0] if isinstance(rows[0], list) else rows for key, rows in data.items()
            }
        if not batch and return_tensors is not None:
            data = {key: np.empty((0, 0), np.int64) for key in data}
        return BatchEncoding(data, encodings, tensor_type=return_tensors)

    def _wants(self, name: str, requested: bool | None) -> bool:
        return name in self.model_input_names if requested is None else requested

    def _encode(
        self,
        settings: Settings,
        batch: Sequence[Any],
        batched: bool,
        is_split_into_words: bool,
        add_special_tokens: bool,
    ) -> list[Encoding]:
        if not batch:
            return []
        try:
            return self._view(settings).encode_batch(
                batch, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise TypeError(bad_input(batch, batched, is_split_into_words)) from error
        except BaseException as error:
            # A Rust panic arrives as an exception that is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                "BertTokenizer: truncation, max_length and stride must leave room for every text, "
                f"got: {str(error).splitlines()[0]}"
            ) from error

    def encode(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        """The input_ids of a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(
        self, text: Any, pair: Any = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads encoded sequences, a mapping of lists or a list of such mappings, to one length.

        Values may be lists, NumPy arrays or tensors; the result has the kind of the input unless
        return_tensors says another. Keys that are not the tokenizer's pass unpadded. The input is
        not changed.
        """
        return pad(
            self,
            encoded_inputs,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens of one text that the model takes beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=False)

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens of a pair that the model takes beside the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def warn_once(self, message: str) -> None:
        """Warns, the first time, in the words of `message` up to its figures."""
        kind = message.split(",")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"BertTokenizer: {message}", stacklevel=4)

    def __repr__(self) -> str:
        return (
            f"BertTokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, do_lower_case={self.do_lower_case}, "
            f"special_tokens={self.special_tokens_map})"
        )
