"""Writers and readers: the three formats agree, and other programs can read them."""

import json
import os

import h5py
import numpy as np
import pytest
from safetensors import safe_open

from ctxfast import load_embeddings
from ctxfast.embeddings.options import OptionError
from ctxfast.embeddings.output import replacing
from ctxfast.embeddings.writers import WRITERS, file_format

SUFFIXES = [".h5", ".hdf5", ".npz", ".safetensors"]
WORDS = ["[CLS]", "naïve", "##ü", "日本", "[SEP]", "x"]


def write_pooled(path, blocks, dtype="float32", row_shape=(5,)):
    writer = WRITERS[file_format(path)](path, row_shape, dtype, None)
    for block in blocks:
        writer.append_rows(block)
    writer.finish({"lines": sum(map(len, blocks)), "note": "ünïcode"})
    writer.close()


def write_tokens(path, rows, counts, dtype="float32"):
    spellings = np.array([word.encode() for word in WORDS])
    writer = WRITERS[file_format(path)](path, rows.shape[1:], dtype, spellings)
    ids = np.arange(len(rows)) % len(WORDS)
    half = len(rows) // 2
    for part in (slice(0, half), slice(half, None)):
        writer.append_rows(rows[part], ids[part])
    writer.append_counts(np.array(counts[:1], np.int64))
    writer.append_counts(np.array(counts[1:], np.int64))
    writer.finish({"lines": len(counts)})
    writer.close()
    return [WORDS[i] for i in ids]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("row_shape", [(5,), (3, 5)])
def test_pooled_round_trip(tmp_path, suffix, row_shape):
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((n, *row_shape)).astype(np.float32) for n in (3, 0, 4)]
    path = tmp_path / f"out{suffix}"
    write_pooled(path, blocks, row_shape=row_shape)
    expected = np.concatenate(blocks)
    with load_embeddings(path) as found:
        assert len(found) == 7
        assert found.vectors is None and found.offsets is None and found.tokens is None
        np.testing.assert_array_equal(np.asarray(found.embeddings), expected)
        np.testing.assert_array_equal(found[-1], expected[-1])
        np.testing.assert_array_equal(np.stack(list(found)), expected)
        assert found.metadata == {"lines": 7, "note": "ünïcode"}
        assert repr(found) == f"Embeddings(7 lines, embeddings {[7, *row_shape]})"
        with pytest.raises(IndexError, match="below 7, got 7"):
            found[7]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("row_shape", [(5,), (2, 5)])
def test_token_round_trip(tmp_path, suffix, row_shape):
    rows = np.random.default_rng(1).standard_normal((7, *row_shape)).astype(np.float32)
    path = tmp_path / f"out{suffix}"
    words = write_tokens(path, rows, [3, 0, 4])
    with load_embeddings(path) as found:
        assert len(found) == 3 and found.embeddings is None
        assert found.offsets.dtype == np.int64
        assert found.offsets.tolist() == [0, 3, 3, 7]
        assert [len(vectors) for vectors in found] == [3, 0, 4]
        np.testing.assert_array_equal(found[2], rows[3:])
        assert found[1].shape == (0, *row_shape)
        assert list(found.tokens) == words
        assert found.tokens[3:7].tolist() == words[3:7]
        assert found.tokens[1] == words[1]
        assert np.asarray(found.tokens).tolist() == words


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_tokens_at_all(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_tokens(path, np.empty((0, 5), np.float32), [0, 0])
    with load_embeddings(path) as found:
        assert len(found) == 2 and found[0].shape == (0, 5)
        assert list(found.tokens) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float16_rows_keep_their_bits(tmp_path, suffix):
    rows = np.random.default_rng(2).standard_normal((4, 5)).astype(np.float16)
    write_pooled(tmp_path / f"out{suffix}", [rows], "float16")
    with load_embeddings(tmp_path / f"out{suffix}") as found:
        assert np.asarray(found.embeddings).dtype == np.float16
        np.testing.assert_array_equal(np.asarray(found.embeddings), rows)


def test_bfloat16_rows_come_back_as_float32(tmp_path):
    values = np.array([[1.0, -2.5, 3.140625, 0.0, 2.0**100]], np.float32)  # exact in bfloat16
    path = tmp_path / "out.safetensors"
    write_pooled(path, [(values.view(np.uint32) >> 16).astype(np.uint16)], "bfloat16")
    found = load_embeddings(path)
    np.testing.assert_array_equal(np.asarray(found.embeddings), values)
    np.testing.assert_array_equal(found[0], values[0])
    with safe_open(path, "pt") as file:
        assert str(file.get_tensor("embeddings").dtype) == "torch.bfloat16"
        np.testing.assert_array_equal(file.get_tensor("embeddings").float().numpy(), values)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_other_programs_read_the_files(tmp_path, count):
    rows = np.arange(count * 5, dtype=np.float16).reshape(count, 5)
    words = write_tokens(tmp_path / "a.h5", rows, [count], "float16")
    write_tokens(tmp_path / "a.npz", rows, [count], "float16")
    write_tokens(tmp_path / "a.safetensors", rows, [count], "float16")
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["vectors"][:], rows)
        assert list(file["tokens"].asstr()[:]) == words
        assert json.loads(file.attrs["metadata"]) == {"lines": 1}
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file) == {"vectors", "offsets", "tokens", "metadata"}
        np.testing.assert_array_equal(file["vectors"], rows)
        assert file["tokens"].tolist() == words
        assert json.loads(str(file["metadata"])) == {"lines": 1}
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("vectors"), rows)
        assert file.get_tensor("offsets").tolist() == [0, count]
        bytes_of_words = file.get_tensor("tokens")
        found = [bytes(row).rstrip(b"\0").decode() for row in bytes_of_words]
        assert found == words
        assert json.loads(file.metadata()["metadata"]) == {"lines": 1}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_broken_or_foreign_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_pooled(path, [np.ones((300, 5), np.float32)])
    whole = path.read_bytes()
    for content in (b"", b"not a file of ours", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a file that ctxfast embed wrote"):
            load_embeddings(path)


def test_load_refuses_other_suffixes_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        load_embeddings(tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match="existing file"):
        load_embeddings(tmp_path / "out.npz")
    with pytest.raises(OptionError, match="must end in .*, got out.csv"):
        file_format("out.csv")


def test_replacing_leaves_nothing_after_an_error(tmp_path):
    target = tmp_path / "out.npz"
    target.write_text("before")
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), replacing(target, overwrite=True) as partial:
            partial.write_text("half")
            raise error
        assert [file.name for file in tmp_path.iterdir()] == ["out.npz"]
        assert target.read_text() == "before"
    with replacing(target, overwrite=True) as partial:
        partial.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"


def test_replacing_respects_files_links_and_umask(tmp_path):
    target = tmp_path / "out.npz"
    target.write_text("before")
    with pytest.raises(FileExistsError, match="which exists"), replacing(target):
        raise AssertionError("unreachable")
    link = tmp_path / "link.npz"
    link.symlink_to(target)
    with replacing(link, overwrite=True) as partial:
        partial.write_text("after")
    assert link.is_symlink() and target.read_text() == "after"
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "new.npz") as partial:
            partial.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "new.npz").stat().st_mode & 0o777 == 0o640


def test_replacing_does_not_overwrite_what_appeared_meanwhile(tmp_path):
    target = tmp_path / "out.npz"
    with pytest.raises(FileExistsError), replacing(target) as partial:
        partial.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["out.npz"]
