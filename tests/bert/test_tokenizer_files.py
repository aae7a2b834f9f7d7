"""BertTokenizer's files: what is read from a directory, what is written, and what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from ctxfast.bert.tokenizer import BertTokenizer
from tests.bert.tokenizer_cases import (
    TRICKY,
    assert_same_call,
    both,
    minilm_directory,
    sms_texts,
    transformers_tokenizer,
    write_directory,
)

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "b", "É", "é", "e", "##b", "<x>", "hello", "world", "."]


def write_vocab(folder: Path, *tokens: str) -> Path:
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def assert_same_tokenizer(ours: BertTokenizer, theirs: Any) -> None:
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.model_max_length == theirs.model_max_length
    assert ours.padding_side == theirs.padding_side
    assert ours.truncation_side == theirs.truncation_side
    texts = [*TRICKY, "a ab <x> <y>É hello. <e1>b <E1> world", "hello[MASK] [mask]"]
    assert_same_call(ours, theirs, texts, padding=True)
    ids = ours(texts).input_ids
    assert ours.batch_decode(ids, skip_special_tokens=True) == theirs.batch_decode(
        ids, skip_special_tokens=True
    )


def test_vocab_alone(tmp_path: Path) -> None:
    write_vocab(tmp_path, *SPECIALS, *WORDS)
    ours, theirs = both(tmp_path)
    assert_same_tokenizer(ours, theirs)
    assert ours.do_lower_case is True
    assert ours.name_or_path == str(tmp_path)


@pytest.mark.filterwarnings("ignore:BertTokenizer. added token")
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"do_lower_case": False, "model_max_length": 9}},
        {"tokenizer_config.json": {"max_len": 11, "padding_side": "left"}},
        {"tokenizer_config.json": {"truncation_side": "left", "never_split": None, "other": 1}},
        {"tokenizer_config.json": {"cls_token": "<x>", "mask_token": "hello"}},
        {"tokenizer_config.json": {"bos_token": "[CLS]", "eos_token": "[SEP]"}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<e1>", "world"]}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<e1>"]}},
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "16": {
                        "content": "<E1>",
                        "lstrip": True,
                        "normalized": False,
                        "special": False,
                    },
                    "15": {"content": "<y>", "rstrip": True, "normalized": True, "special": True},
                },
                "extra_special_tokens": ["<y>"],
            },
            "special_tokens_map.json": {"cls_token": "ignored"},
        },
        {"special_tokens_map.json": {"sep_token": "<x>", "pad_token": "b"}},
        {
            "tokenizer_config.json": {"mask_token": "a", "do_lower_case": True},
            "special_tokens_map.json": {
                "mask_token": {"content": "<E1>", "lstrip": True, "normalized": False},
                "additional_special_tokens": ["<y>"],
            },
        },
        {"added_tokens.json": {"<y>": 16, "<E1>": 15}},
        {"added_tokens.json": {"<e1>": 15}, "special_tokens_map.json": {"mask_token": "<e1>"}},
        {
            "tokenizer_config.json": {
                "unk_token": {
                    "__type": "AddedToken",
                    "content": "[UNK]",
                    "lstrip": False,
                    "normalized": True,
                    "rstrip": False,
                    "single_word": False,
                }
            }
        },
    ],
    ids=lambda files: json.dumps(files)[:70],
)
@pytest.mark.filterwarnings("ignore:BertTokenizer. the vocabulary must hold")
def test_options_in_files(tmp_path: Path, files: dict[str, Any]) -> None:
    write_vocab(tmp_path, *SPECIALS, *WORDS)
    for name, content in files.items():
        write_json(tmp_path / name, content)
    assert_same_tokenizer(*both(tmp_path))


def test_overrides_win(tmp_path: Path) -> None:
    write_vocab(tmp_path, *SPECIALS, *WORDS)
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 5})
    overrides = {"do_lower_case": False, "model_max_length": 20, "cls_token": "<x>"}
    ours, theirs = both(tmp_path, **overrides)
    assert_same_tokenizer(ours, theirs)
    assert ours("É a").tokens() == ["<x>", "É", "a", "[SEP]"]
    with pytest.raises(TypeError, match="do_uppercase"):
        BertTokenizer.from_pretrained(tmp_path, do_uppercase=True)


def test_single_files_and_mappings(tmp_path: Path) -> None:
    path = write_vocab(tmp_path, *SPECIALS, *WORDS)
    expected = BertTokenizer.from_pretrained(tmp_path)
    expected.save_pretrained(tmp_path / "saved")
    ids = expected("É ab <x>").input_ids
    vocab = {token: i for i, token in enumerate([*SPECIALS, *WORDS])}
    for tokenizer in (
        BertTokenizer(path),
        BertTokenizer(vocab_file=str(path)),
        BertTokenizer(vocab=vocab),
        BertTokenizer.from_pretrained(path),
        BertTokenizer(tokenizer_file=tmp_path / "saved" / "tokenizer.json"),
        BertTokenizer.from_pretrained(tmp_path / "saved" / "tokenizer.json"),
    ):
        assert tokenizer("É ab <x>").input_ids == ids
        assert len(tokenizer) == len(vocab)


def cased_json(folder: Path) -> None:
    backend = Tokenizer(WordPiece({t: i for i, t in enumerate([*SPECIALS, *WORDS])}))
    backend.model.unk_token = "[UNK]"
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))


def test_tokenizer_json_alone_says_its_own_options(tmp_path: Path) -> None:
    cased_json(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer("É").tokens() == ["[CLS]", "É", "[SEP]"]
    assert not tokenizer.do_lower_case and not tokenizer.tokenize_chinese_chars
    assert BertTokenizer.from_pretrained(tmp_path, do_lower_case=True)("É").tokens()[1] == "e"
    kept = BertTokenizer.from_pretrained(tmp_path, tokenize_chinese_chars=True)
    assert kept.tokenize_chinese_chars and not kept.do_lower_case


@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast", None])
def test_tokenizer_config_overrules_tokenizer_json(tmp_path: Path, name: str | None) -> None:
    cased_json(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name} if name else {})
    ours, theirs = both(tmp_path)
    assert_same_tokenizer(ours, theirs)
    assert ours("É").tokens() == ["[CLS]", "e", "[SEP]"]


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_generic_class_keeps_the_pipeline(tmp_path: Path, name: str) -> None:
    transformers_tokenizer()
    from transformers import AutoTokenizer

    cased_json(tmp_path)
    special = {f"{token.strip('[]').lower()}_token": token for token in SPECIALS}
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, **special})
    ours = BertTokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    texts = ["É <x> a\u4e2db", "a", ""]
    assert ours("É a").tokens() == ["É", "a"]
    assert ours(texts).input_ids == theirs(texts)["input_ids"]
    ours.save_pretrained(tmp_path / "saved")
    for again in (
        BertTokenizer.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(str(tmp_path / "saved")),
    ):
        assert again(texts)["input_ids"] == ours(texts).input_ids


def test_round_trip_through_transformers(data: Path, tmp_path: Path) -> None:
    config = {"do_lower_case": True, "strip_accents": False, "model_max_length": 77}
    vocab = data / "vocab" / "bert-base-uncased.vocab.txt"
    ours = BertTokenizer.from_pretrained(write_directory(tmp_path / "a", vocab, config))
    ours.add_tokens(["zürich", AddedToken("<kept>", lstrip=True, normalized=False)])
    ours.add_special_tokens({"extra_special_tokens": ["<e1>"], "mask_token": "<mask>"})
    ours.padding_side = "left"
    paths = ours.save_pretrained(tmp_path / "b")
    assert sorted(Path(path).name for path in paths) == sorted(
        path.name for path in (tmp_path / "b").iterdir()
    )
    texts = [*TRICKY, "in Zürich <kept>x <e1>y <mask>", *sms_texts(data)[:200]]
    theirs = transformers_tokenizer().from_pretrained(str(tmp_path / "b"))
    assert_same_tokenizer(ours, theirs)
    assert_same_call(ours, theirs, texts, padding=True)
    again = BertTokenizer.from_pretrained(tmp_path / "b")
    assert_same_tokenizer(again, theirs)
    assert again.strip_accents is False
    theirs.save_pretrained(str(tmp_path / "c"))
    assert_same_tokenizer(BertTokenizer.from_pretrained(tmp_path / "c"), theirs)
    (tmp_path / "b" / "tokenizer.json").unlink()
    assert BertTokenizer.from_pretrained(tmp_path / "b").get_vocab() == ours.get_vocab()


def test_published_model_round_trip(tmp_path: Path) -> None:
    ours = BertTokenizer.from_pretrained(minilm_directory())
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert written["truncation"] is None and written["padding"] is None
    assert (tmp_path / "vocab.txt").read_bytes() == (minilm_directory() / "vocab.txt").read_bytes()
    assert_same_tokenizer(*both(tmp_path))


def test_every_vocabulary_is_read_as_transformers_reads_it(data: Path, tmp_path: Path) -> None:
    odd = [*SPECIALS, "a\u2028", "b\x1c", "c ", "\u3000", "", "d\r", "e\x85f", "a", "a"]
    (tmp_path / "odd").mkdir()
    path = write_vocab(tmp_path / "odd", *odd)
    assert BertTokenizer(path).get_vocab() == transformers_tokenizer()(str(path)).get_vocab()
    ours = BertTokenizer(path)
    ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    assert BertTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == ours.get_vocab()


def test_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_vocab(tmp_path, *SPECIALS, *WORDS)
    tokenizer = BertTokenizer(path)
    tokenizer.save_pretrained(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    tokenizer.add_tokens(["new"])

    def fail(self: Path, content: bytes) -> int:
        with builtins.open(self, "wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save_pretrained(tmp_path / "out")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_local_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="reads the cache of the hub")
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    write_vocab(snapshot, *SPECIALS, *WORDS)
    write_json(snapshot / "tokenizer_config.json", {"do_lower_case": False})
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    tokenizer = BertTokenizer.from_pretrained("some/model", cache_dir=tmp_path)
    assert tokenizer("É").tokens() == ["[CLS]", "É", "[SEP]"]
    with pytest.raises(OSError, match="other/model"):
        BertTokenizer.from_pretrained("other/model", cache_dir=tmp_path)


def break_nothing(folder: Path) -> None:
    pass


def break_vocab_bytes(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(b"[UNK]\n[PAD]\n\xff\xfe\n")


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": \n {,}', encoding="utf-8")


def break_config(folder: Path) -> None:
    write_vocab(folder, *SPECIALS)
    (folder / "tokenizer_config.json").write_text("[1]", encoding="utf-8")


def break_config_bytes(folder: Path) -> None:
    write_vocab(folder, *SPECIALS)
    (folder / "tokenizer_config.json").write_bytes(b'{"cls_token": "\xff"}')


def break_pipeline(folder: Path) -> None:
    write_json(folder / "tokenizer.json", {"version": "1.0", "model": {"type": "Unheard"}})


def break_model(folder: Path) -> None:
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))


def break_emptiness(folder: Path) -> None:
    write_vocab(folder)


def break_specials(folder: Path) -> None:
    write_vocab(folder, "[pad]", "[unk]", "[cls]")


def break_flag(folder: Path) -> None:
    write_vocab(folder, *SPECIALS)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": "no"})


def break_limit(folder: Path) -> None:
    write_vocab(folder, *SPECIALS)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 0})


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (break_nothing, FileNotFoundError, "must hold tokenizer.json or vocab.txt"),
        (break_vocab_bytes, ValueError, r"vocab\.txt must be UTF-8, got an invalid byte in line 3"),
        (break_json, ValueError, r"tokenizer\.json must be JSON, got .* in line 2 column 3"),
        (break_config, ValueError, r"tokenizer_config\.json must hold a JSON object, got list"),
        (break_config_bytes, ValueError, r"tokenizer_config\.json must be UTF-8"),
        (break_pipeline, ValueError, r"tokenizer\.json must be a file of the tokenizers library"),
        (break_model, ValueError, "must hold a WordPiece model, got BPE"),
        (break_emptiness, ValueError, r"vocab\.txt must hold one word piece a line, got an empty"),
        (break_specials, ValueError, r"must hold the unknown token '\[UNK\]', got 3 entries"),
        (break_flag, TypeError, "do_lower_case must be a bool, got 'no'"),
        (break_limit, ValueError, "model_max_length must be at least 1, got 0"),
    ],
)
def test_bad_directories(tmp_path: Path, damage: Any, error: type, message: str) -> None:
    damage(tmp_path)
    with pytest.raises(error, match=message):
        BertTokenizer.from_pretrained(tmp_path)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        BertTokenizer.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no such file: .*missing.txt"):
        BertTokenizer(tmp_path / "missing.txt")
    with pytest.raises(
        ValueError, match="vocab_file and tokenizer_file must be given, got neither"
    ):
        BertTokenizer()
    path = write_vocab(tmp_path, *SPECIALS)
    with pytest.raises(ValueError, match="got both"):
        BertTokenizer(path, tokenizer_file=path)
    with pytest.raises(TypeError, match="vocab_file must be a path, got int"):
        BertTokenizer(5)
    with pytest.raises(NotADirectoryError, match="vocab.txt"):
        BertTokenizer(path).save_pretrained(path)
    with pytest.warns(UserWarning, match=r"special token '\[MASK\]', got 4 tokens .* id is now 4"):
        BertTokenizer(write_vocab(tmp_path, *SPECIALS[:4]))
    write_json(tmp_path / "added_tokens.json", {"<new>": 9})
    write_vocab(tmp_path, *SPECIALS)
    with pytest.warns(UserWarning, match="added token '<new>' must have the id .* 9, got 5"):
        BertTokenizer.from_pretrained(tmp_path)
