"""Tokenizer files in Hugging Face's layout: reading them, and building and writing the tokenizer.

A directory holds the vocabulary as tokenizer.json (the whole pipeline) or vocab.txt (one word piece
a line), and beside it tokenizer_config.json, special_tokens_map.json and added_tokens.json. The
latter two count only where tokenizer_config.json has no added_tokens_decoder, as in transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# transformers' classes that take tokenizer.json as it stands; its BertTokenizer puts BERT's
# normalizer and template into it.
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OPTIONS = (
    *SPECIAL_TOKENS,
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


def read_directory(directory: Path, caller: str) -> dict[str, Any]:
    """Arguments of `BertTokenizer` from the files of a directory."""
    options: dict[str, Any] = {}
    for argument, name in (("tokenizer_file", TOKENIZER_FILE), ("vocab_file", VOCAB_FILE)):
        if (directory / name).is_file():
            options[argument] = directory / name
            break
    else:
        raise FileNotFoundError(
            f"{caller}: the directory must hold {TOKENIZER_FILE} or {VOCAB_FILE}, "
            f"got {directory} with neither"
        )
    config = _read_json_if_there(directory / CONFIG_FILE)
    if config is not None:
        if config.get("tokenizer_class") not in GENERIC_CLASSES:
            options.update(do_lower_case=True, tokenize_chinese_chars=True)
        elif "tokenizer_file" in options:
            options["keep_template"] = True
        options.update(_known_options(config))
    added = (config or {}).get("added_tokens_decoder")
    if added is None:
        options.update(
            _known_options(_read_json_if_there(directory / "special_tokens_map.json") or {})
        )
        ids = _read_json_if_there(directory / "added_tokens.json") or {}
        special = {str(options.get(name)) for name in SPECIAL_TOKENS}
        special.update(map(str, options.get("extra_special_tokens", ())))
        added = {
            index: {
                "content": token,
                "special": token in special,
                "normalized": token not in special,
            }
            for token, index in ids.items()
        }
    options["added_tokens"] = {int(index): to_added_token(token) for index, token in added.items()}
    return options


def _known_options(config: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
    if "max_len" in config:
        options.setdefault("model_max_length", config["max_len"])
    for name in SPECIAL_TOKENS:
        if isinstance(options.get(name), Mapping):
            options[name] = to_added_token(options[name], special=True)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if extra:
        tokens = extra.values() if isinstance(extra, Mapping) else extra
        options["extra_special_tokens"] = [
            to_added_token(token, special=True) if isinstance(token, Mapping) else token
            for token in tokens
        ]
    return options


def to_added_token(token: str | AddedToken | Mapping[str, Any], **flags: Any) -> AddedToken:
    """An AddedToken from a string or from its JSON form; `flags` win."""
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, **flags)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    known = {name: token[name] for name in names if name in token}
    return AddedToken(token["content"], **{**known, **flags})


def read_text(path: Path) -> str:
    """Text of a UTF-8 file. Raises FileNotFoundError, or ValueError naming the bad line."""
    if not path.is_file():
        raise FileNotFoundError(f"BertTokenizer: no such file: {path}")
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"BertTokenizer: {path} must be UTF-8, got an invalid byte in line {line}"
        ) from error


def _read_json_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file, line and column of a mistake."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"BertTokenizer: {path} must be JSON, got {error.msg} in line {error.lineno} "
            f"column {error.colno}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"BertTokenizer: {path} must hold a JSON object, got {type(value).__name__}"
        )
    return value


def read_vocab(path: Path) -> dict[str, int]:
    """Ids of word pieces: their line numbers. White space at the end of a line is no part of it."""
    if not read_text(path).strip():
        raise ValueError(
            f"BertTokenizer: {path} must hold one word piece a line, got an empty file"
        )
    return WordPiece.read_file(str(path))


def backend_from_vocab(vocab: Mapping[str, int], unk_token: str, source: str) -> Tokenizer:
    """A tokenizer with BERT's splitting and decoding, as yet without normalizer and template."""
    if unk_token not in vocab:
        raise ValueError(
            f"BertTokenizer: {source} must hold the unknown token {unk_token!r}, "
            f"got {len(vocab)} entries without it"
        )
    backend = Tokenizer(WordPiece(dict(vocab), unk_token=unk_token))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def backend_from_json(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the truncation and padding it was saved with."""
    read_json(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises no narrower class
        raise ValueError(
            f"BertTokenizer: {path} must be a file of the tokenizers library, got: {error}"
        ) from error
    if not isinstance(backend.model, WordPiece):
        raise ValueError(
            f"BertTokenizer: {path} must hold a WordPiece model, got {type(backend.model).__name__}"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend


def build_backend(
    vocab: str | os.PathLike[str] | Mapping[str, int] | None,
    tokenizer_file: str | os.PathLike[str] | None,
    unk_token: str | None,
) -> Tokenizer:
    """The Rust tokenizer of a vocabulary or of a tokenizer.json."""
    if (vocab is None) == (tokenizer_file is None):
        got = "neither" if vocab is None else "both"
        raise ValueError(
            f"BertTokenizer: one of vocab_file and tokenizer_file must be given, got {got}"
        )
    if tokenizer_file is not None:
        backend = backend_from_json(as_path(tokenizer_file, "tokenizer_file"))
        if unk_token is not None:
            backend.model.unk_token = unk_token
    elif isinstance(vocab, Mapping):
        backend = backend_from_vocab(vocab, unk_token or "[UNK]", "vocab_file")
    else:
        path = as_path(vocab, "vocab_file")
        backend = backend_from_vocab(read_vocab(path), unk_token or "[UNK]", str(path))
    return backend


def set_normalizer(
    backend: Tokenizer,
    *,
    do_lower_case: bool | None,
    strip_accents: bool | None,
    tokenize_chinese_chars: bool | None,
) -> None:
    """Puts BERT's normalizer in. None leaves an option as it was, but strip_accents follows a
    do_lower_case that is given.
    """
    given: dict[str, Any] = {
        "do_lower_case": do_lower_case,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": tokenize_chinese_chars,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"BertTokenizer: {name} must be a bool, got {value!r}")
    if not given and backend.normalizer is not None:
        return
    before = normalizer_options(backend)
    if "do_lower_case" in given:
        before["strip_accents"] = None
    defaults = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    options: dict[str, Any] = {**defaults, **before, **given}
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        lowercase=options["do_lower_case"],
        strip_accents=options["strip_accents"],
        handle_chinese_chars=options["tokenize_chinese_chars"],
    )


def template(backend: Tokenizer, cls_token: str, sep_token: str) -> processors.TemplateProcessing:
    """[CLS] A [SEP] with token types 0, and [CLS] A [SEP] B [SEP] with types 0 and 1."""
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((cls_token, sep_token))]
    return processors.TemplateProcessing(
        single=[f"{cls_token}:0", "$A:0", f"{sep_token}:0"],
        pair=[f"{cls_token}:0", "$A:0", f"{sep_token}:0", "$B:1", f"{sep_token}:1"],
        special_tokens=ids,
    )


def clone(backend: Tokenizer) -> Tokenizer:
    """A tokenizer with truncation and padding of its own, over the same vocabulary and pipeline."""
    twin = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(twin, part, getattr(backend, part))
    added = backend.get_added_tokens_decoder()
    twin.add_tokens([added[index] for index in sorted(added)])
    return twin


def normalizer_options(backend: Tokenizer) -> dict[str, Any]:
    """The arguments of `set_normalizer` that give this normalizer; none if it is not BERT's."""
    normalizer = backend.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer):
        return {}
    return {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }


def is_standard(backend: Tokenizer, cls_token: str, sep_token: str) -> bool:
    """Whether transformers' BertTokenizer, which rebuilds the pipeline, would build this one."""
    model, normalizer = backend.model, backend.normalizer
    if backend.post_processor is None:
        return False
    expected = template(backend, cls_token, sep_token).__getstate__()
    return (
        isinstance(normalizer, normalizers.BertNormalizer)
        and normalizer.clean_text
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(backend.decoder, decoders.WordPiece)
        and backend.decoder.prefix == "##"
        and model.continuing_subword_prefix == "##"
        and model.max_input_chars_per_word == 100
        and backend.post_processor.__getstate__() == expected
    )


def file_texts(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """What `save_pretrained` writes, by file name."""
    standard = is_standard(backend, config["cls_token"], config["sep_token"])
    name = "BertTokenizer" if standard else GENERIC_CLASSES[0]
    config = {**config, "tokenizer_class": name}
    texts = {
        TOKENIZER_FILE: backend.to_str(pretty=True),
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
    }
    lines = _vocab_lines(backend.get_vocab(with_added_tokens=True))
    if lines is not None:
        texts[VOCAB_FILE] = lines
    return texts


def _vocab_lines(vocab: Mapping[str, int]) -> str | None:
    """vocab.txt, or None where its lines would not give back the same vocabulary."""
    tokens = sorted(vocab, key=vocab.__getitem__)
    contiguous = all(vocab[token] == i for i, token in enumerate(tokens))
    kept = all(token == token.rstrip() and "\n" not in token for token in tokens)
    return "".join(f"{token}\n" for token in tokens) if contiguous and kept else None


def as_path(value: Any, argument: str) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"BertTokenizer: {argument} must be a path, got {type(value).__name__}")
    return Path(value)
