"""Reading lines: endings, encodings, compression, pipes, and what is refused."""

import gzip
import hashlib
import os
import threading

import pytest

from ctxfast.embeddings.text import TextLines


def read(source):
    with TextLines(source) as text:
        text.check()
        return text, list(text)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\n\na\n\n", ["", "", "a", ""]),
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        ("a\u2028b\x0bc\u0085d\n".encode(), ["a\u2028b\x0bc\u0085d"]),
        (b"a\rb\n", ["a\rb"]),
        (b"a\x00b\n", ["a\x00b"]),
    ],
)
def test_lines_end_at_line_feeds_only(tmp_path, content, lines):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    text, found = read(path)
    assert found == lines
    assert text.count == len(lines)
    assert text.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["text.txt.gz", "misnamed.txt"])
def test_gzip_is_recognised_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"one\ntwo\n") + gzip.compress(b"three\n"))
    text, found = read(path)
    assert found == ["one", "two", "three"]
    assert text.sha256 == hashlib.sha256(b"one\ntwo\nthree\n").hexdigest()


def test_a_pipe_is_read_once_and_kept(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b"one\n\ntwo"))
    writer.start()
    text, found = read(path)
    writer.join()
    assert (text.count, found) == (3, ["one", "", "two"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold at least one line"),
        (b"\xef\xbb\xbf", "must hold at least one line"),
        (gzip.compress(b"", mtime=0), "must hold at least one line"),
        (b"ok\nfine\nbad \xff here\n", "byte 0xff in line 3 of"),
        ("ok\n".encode("utf-16"), "byte 0xff in line 1 of"),
        (b"cut \xe2\x82", "byte 0xe2 in line 1 of"),
        (gzip.compress(b"one\n" * 1000, mtime=0)[:-12], "intact gzip"),
        (gzip.compress(b"one\n" * 1000, mtime=0)[:20] + b"\x00" * 30, "intact gzip"),
    ],
)
def test_unusable_text_is_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message), TextLines(path) as text:
        text.check()


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing file, got .*nothing.txt"):
        TextLines(tmp_path / "nothing.txt")
    with pytest.raises(IsADirectoryError, match="got the directory"):
        TextLines(tmp_path)


def test_a_file_that_changes_between_the_passes_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n")
    with TextLines(path) as text:
        text.check()
        path.write_text("one\nsix\n")
        with pytest.raises(ValueError, match="changed"):
            list(text)


def test_chunks_are_bounded_by_lines_and_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{'x' * size}\n" for size in (1, 1, 1, 9, 9, 1)))
    with TextLines(path) as text:
        text.check()
        chunks = list(text.chunks(lines=3, characters=10))
    assert [[len(line) for line in chunk] for chunk in chunks] == [[1, 1, 1], [9, 9], [1]]
