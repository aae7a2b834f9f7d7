"""`ctxfast embed`: streams, exit statuses, and that nothing half-written is left."""

import fcntl
import gzip
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from ctxfast import load_embeddings
from tests.cli.conftest import ENVIRONMENT

LINES = ["The old dog sleeps in the house.", "", "one two three", "never"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_summary_on_stderr_and_nothing_on_stdout(cli, model_directory, text):
    output = text.with_name("out.h5")
    status, out, err = cli("embed", model_directory, text, "-o", output)
    assert (status, out) == (0, "")
    assert err.count("\n") == 1 and "float32 [4, 32], 4 lines" in err and "1 blank" in err
    assert len(load_embeddings(output)) == 4


def test_json_on_stdout(cli, model_directory, text):
    output = text.with_name("out.npz")
    arguments = ["--pooling", "tokens", "--layers", "-1,-2", "--max-length", "4", "--json"]
    status, out, err = cli("embed", model_directory, text, "-o", output, *arguments)
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["shape"] == [11, 2, 32]
    assert (report["lines"], report["blank_lines"], report["overlong_lines"]) == (4, 1, 2)
    assert (report["format"], report["output"]) == ("npz", str(output))


def test_truncation_is_told(cli, model_directory, text):
    output = text.with_name("out.npz")
    _, _, err = cli("embed", model_directory, text, "-o", output, "--max-length", "5")
    assert "1 overlong: truncated" in err


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_standard_input_plain_and_compressed(
    command, cli, monkeypatch, model_directory, text, tmp_path, suffix
):
    source = tmp_path / f"input{suffix}"
    content = text.read_bytes()
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    arguments = ["embed", model_directory, "-", "-o"]
    done = command(*arguments, tmp_path / "pipe.safetensors", input=source.read_bytes())
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    with source.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        status, out, err = cli(*arguments, tmp_path / "file.safetensors")
    assert (status, out) == (0, ""), err
    piped, read = (load_embeddings(tmp_path / f"{name}.safetensors") for name in ("pipe", "file"))
    np.testing.assert_array_equal(np.asarray(piped.embeddings), np.asarray(read.embeddings))
    assert piped.metadata["text"] == "standard input" and len(piped) == 4


def test_progress_only_on_a_terminal(command, model_directory, text):
    arguments = ["embed", model_directory, text, "-o", text.with_name("out.h5")]
    assert b"\r" not in command(*arguments).stderr
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    line = [sys.executable, "-m", "ctxfast", *map(str, arguments), "--force"]
    streams = {"stdout": subprocess.PIPE, "stderr": slave}
    done = subprocess.run(line, **streams, env=ENVIRONMENT, timeout=240)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "100%" in shown and "4/4" in shown


def test_existing_output_is_kept_without_force(cli, model_directory, text):
    output = text.with_name("out.npz")
    output.write_text("precious")
    status, out, err = cli("embed", model_directory, text, "-o", output)
    assert (status, out) == (1, "") and "must be a new file" in err
    assert output.read_text() == "precious"
    assert cli("embed", model_directory, text, "-o", output, "--force")[0] == 0
    assert len(load_embeddings(output)) == 4


def damaged(model_directory, tmp_path, change):
    directory = tmp_path / "model"
    directory.mkdir()
    for path in model_directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    change(directory)
    return directory


def truncate_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def break_json(directory):
    (directory / "config.json").write_text('{"hidden_size": 32,')


MODEL_DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken config": (break_json, "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (truncate_weights, "model.safetensors"),
    "no vocabulary": (lambda d: (d / "vocab.txt").unlink(), "vocab"),
}


@pytest.mark.parametrize("kind", MODEL_DAMAGE)
def test_damaged_models_exit_1_with_one_sentence(cli, model_directory, text, tmp_path, kind):
    change, words = MODEL_DAMAGE[kind]
    directory = damaged(model_directory, tmp_path, change)
    status, out, err = cli("embed", directory, text, "-o", tmp_path / "out.h5")
    assert (status, out) == (1, "")
    assert err.startswith("ctxfast embed: ") and err.count("\n") == 1, err
    assert words in err and str(directory) in err
    assert names(tmp_path) == ["model", "text.txt"]


def test_incomplete_weights_exit_1(cli, model_directory, text, tmp_path):
    from safetensors.torch import load_file, save_file

    def forget(directory):
        tensors = load_file(directory / "model.safetensors")
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, directory / "model.safetensors")

    directory = damaged(model_directory, tmp_path, forget)
    status, _, err = cli("embed", directory, text, "-o", tmp_path / "out.h5")
    assert status == 1 and err.count("\n") == 1
    assert "got none for encoder.layer.1.output.dense.weight" in err
    assert names(tmp_path) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least one line"),
        (b"fine\n\xc3\x28\n", "byte 0xc3 in line 2 of"),
        (gzip.compress(b"line\n" * 99, mtime=0)[:-9], "intact gzip"),
        (None, "existing file"),
    ],
)
def test_unusable_text_exits_1_with_one_sentence(cli, model_directory, tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    status, out, err = cli("embed", model_directory, path, "-o", tmp_path / "out.h5")
    assert (status, out) == (1, "")
    assert words in err and str(path) in err and err.count("\n") == 1
    assert names(tmp_path) == ([] if content is None else ["text.txt"])


def test_unusable_outputs(cli, model_directory, text, tmp_path):
    (tmp_path / "folder.h5").mkdir()
    places = {
        tmp_path / "missing" / "out.h5": (1, "existing directory"),
        text / "out.h5": (1, "existing directory"),
        tmp_path / "folder.h5": (1, "got the directory"),
        "/proc/ctxfast.h5": (1, "must be writable"),
        tmp_path / "out.txt": (2, "must end in"),
        tmp_path / "out": (2, "must end in"),
    }
    for place, (expected, words) in places.items():
        status, out, err = cli("embed", model_directory, text, "-o", place)
        assert (status, out) == (expected, ""), err
        assert words in err and err.count("\n") == 1
    assert names(tmp_path) == ["folder.h5", "text.txt"]


def test_a_read_only_directory(command, model_directory, text, tmp_path):
    directory = tmp_path / "locked"
    directory.mkdir()
    directory.chmod(0o555)
    if os.access(directory, os.W_OK):  # this user may write to any file system that takes files
        directory = Path("/proc")
        if not directory.is_dir():
            pytest.skip("this user may write anywhere")
    done = command("embed", model_directory, text, "-o", directory / "out.h5")
    assert done.returncode == 1 and b"must be writable" in done.stderr


def test_input_is_not_overwritten(cli, model_directory, tmp_path):
    path = tmp_path / "text.h5"
    path.write_text("one\n")
    status, _, err = cli("embed", model_directory, path, "-o", path, "--force")
    assert status == 2 and "must not be the input" in err
    assert path.read_text() == "one\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pooling", "sum"],
        ["--layers", "first"],
        ["--layers", "9"],
        ["--pooling", "pooler", "--layers", "all"],
        ["--mix-weights", "1,x", "--layers", "mix"],
        ["--overlong", "drop"],
        ["--max-length", "1000"],
        ["--dtype", "bfloat16"],
        ["--device", "tpu"],
    ],
)
def test_bad_options_exit_2_with_one_sentence(cli, model_directory, text, arguments):
    status, out, err = cli("embed", model_directory, text, "-o", text.with_name("o.h5"), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ctxfast embed: ") and err.count("\n") == 1
    assert names(text.parent) == ["text.txt"]


def test_overlong_error_exits_1(cli, model_directory, text):
    output = text.with_name("out.h5")
    arguments = ["--max-length", "5", "--overlong", "error"]
    status, _, err = cli("embed", model_directory, text, "-o", output, *arguments)
    assert status == 1 and "at most 5 tokens, got 10 in line 1" in err


@pytest.mark.parametrize("suffix", ["h5", "npz", "safetensors"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(model_directory, tmp_path, suffix, number, status):
    path = tmp_path / "text.txt"
    path.write_text("the small green train runs slowly to the river , one two three\n" * 200_000)
    line = [sys.executable, "-m", "ctxfast", "embed", str(model_directory), str(path)]
    line += ["-o", str(tmp_path / f"out.{suffix}"), "--pooling", "tokens"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(line, **streams, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    # Blocks written tell that encoding has begun; NPZ and safetensors collect them in unnamed files.
    while not written(process.pid, tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, b""), err
    assert b"Traceback" not in err
    assert names(tmp_path) == ["text.txt"]


def written(pid, directory):
    """Whether the process has an output file of more than 1 MB open in `directory`."""
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(entry.path).startswith(
                f"{directory}/"
            ) and "text.txt" not in os.readlink(entry.path):
                found = max(found, os.stat(entry.path).st_size)
        except FileNotFoundError:
            continue
    return found > 1 << 20


# Vectors alone are 4000 * 9 * 32 * 4 = 4,608,000 bytes; offsets and tokens come on top of them.
@pytest.mark.parametrize("room", [1_000_000, 4_700_000])
@pytest.mark.parametrize("suffix", ["h5", "npz", "safetensors"])
def test_a_full_disk_leaves_nothing(cli, model_directory, tmp_path, suffix, room):
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven\n" * 4000)
    output = tmp_path / f"out.{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands in for the disk: larger files cannot be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status, out, err = cli("embed", model_directory, path, "-o", output, "--pooling", "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out) == (1, ""), err
    assert "file too large" in err and err.count("\n") == 1
    assert names(tmp_path) == ["text.txt"]
