"""What holds for every command: help, version, exit statuses, streams."""

import json
import subprocess
import sys

import pytest

import ctxfast

COMMANDS = ["info", "embed", "convert", "demo", "bench"]


def one_line(text):
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(cli, arguments):
    status, out, err = cli(*arguments)
    assert (status, err) == (0, "")
    listed = out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert not any(line.endswith("...") for line in listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli, name):
    status, out, err = cli(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: ctxfast {name}")
    assert "\x1b" not in out


def test_version(cli):
    assert cli("--version") == (0, f"ctxfast {ctxfast.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command 'nonsense' (see ctxfast --help)"),
        (["--nonsense"], "No such option"),
        (["embed"], "Missing argument 'MODEL' (see ctxfast embed --help)"),
        (["embed", "a", "b"], "Missing option '--output'"),
        (["embed", "a", "b", "-o", "c.npz", "--batch-tokens", "many"], "--batch-tokens"),
        (["info", "extra"], "extra"),
    ],
)
def test_bad_arguments_exit_2_with_one_sentence(cli, arguments, words):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert words in one_line(err)


def test_debug_shows_the_traceback_before_or_after_the_command(cli, tmp_path):
    failing = ["embed", tmp_path / "model", tmp_path / "text", "-o", tmp_path / "out.npz"]
    assert "Traceback" not in cli(*failing)[2]
    for arguments in (["--debug", *failing], [*failing, "--debug"]):
        status, out, err = cli(*arguments)
        assert (status, out) == (1, "")
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("ctxfast embed: input must be an existing file")
    assert "Traceback" not in cli(*failing)[2]


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from ctxfast.cli import main
assert main(["--help"]) == 0 and main(["embed", "--help"]) == 0 and main(["--version"]) == 0
heavy = {"torch", "numpy", "transformers", "h5py", "triton", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_python_m_is_the_command(command):
    done = command("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"ctxfast {ctxfast.__version__}\n")
    done = command("nonsense")
    assert done.returncode == 2 and done.stdout == b""
    one_line(done.stderr.decode())


def test_a_closed_pipe_ends_quietly():
    line = f"{sys.executable} -m ctxfast info | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) in ((0, b"v"), (1, b"v"))
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_info_as_json(cli):
    status, out, err = cli("info", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["ctxfast"] == ctxfast.__version__
    assert facts["versions"]["torch"] and facts["cpu"]["model"]
    names = {entry["name"] for entry in facts["environment"]}
    assert {"CTXFAST_BACKEND", "CTXFAST_CPU_ISA", "CTXFAST_NATIVE"} <= names
    for half in ("cpu", "cuda"):
        module = facts["native"][half]
        assert (module["path"] is None) <= bool(module["reason"])
