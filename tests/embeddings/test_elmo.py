"""`embed_file` with an ELMo."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ctxfast.embeddings import EmbedOptions, OptionError, embed_file, load_embeddings
from tests.elmo import models
from tests.oracle import assert_matches

h5py = pytest.importorskip("h5py")
TEXT = "The cat sat .\n\nWhy ?\nÜber lange Wörter\nThe cat\n"


@pytest.fixture
def folder(tmp_path):
    models.model().save(tmp_path / "elmo", form="hdf5")
    return tmp_path / "elmo"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def check(found, folder, choose, **arguments):
    """found, one array for all lines, against `choose` of each line's layers [3, n, 16] in float64."""
    lines = [line.split() for line in TEXT.splitlines() if line]
    eager, exact = (
        torch.cat([choose(x) for x in models.word_layers(folder, lines, dtype, **arguments)])
        for dtype in (torch.float32, torch.float64)
    )
    assert_matches(torch.from_numpy(np.array(found)), eager, exact)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".safetensors"])
@pytest.mark.parametrize("layers", ["all", "top", (-2,), (0, 2), "mix"])
def test_vectors_of_words(folder, text, tmp_path, suffix, layers):
    output = tmp_path / f"out{suffix}"
    report = embed_file(folder, text, output, EmbedOptions(pooling="tokens", layers=layers))
    assert (report.lines, report.blank_lines, report.tokens) == (5, 1, 11)
    found = load_embeddings(output)
    assert list(found.tokens)[:2] == ["The", "cat"] and "Wörter" in list(found.tokens)
    assert found.offsets.tolist() == [0, 4, 4, 6, 9, 11]
    choose = {
        "all": lambda x: x.transpose(0, 1),
        "top": lambda x: x[2],
        (-2,): lambda x: x[1],
        (0, 2): lambda x: x[[0, 2]].transpose(0, 1),
        "mix": lambda x: x.mean(0),
    }[layers]
    check(found.vectors, folder, choose)


def test_vectors_of_lines(folder, text, tmp_path):
    embed_file(folder, text, tmp_path / "out.npz", EmbedOptions(batch_tokens=5))
    found = np.asarray(load_embeddings(tmp_path / "out.npz").embeddings)
    assert not found[1].any()
    check(found[[0, 2, 3, 4]], folder, lambda x: x[2].mean(0, keepdim=True))


def test_carried_states_follow_the_file(folder, text, tmp_path):
    options = EmbedOptions(pooling="tokens", stateful="carry", batch_size=2)
    embed_file(folder, text, tmp_path / "out.h5", options)
    found = load_embeddings(tmp_path / "out.h5").vectors
    check(found, folder, lambda x: x[2], stateful="carry", batch_size=2)


@pytest.mark.parametrize(("layers", "stateful"), [("all", "carry"), ("average", "reset")])
def test_layout_of_allennlp_through_the_command(folder, tmp_path, layers, stateful):
    lines = [line for line in TEXT.splitlines() if line]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "ctxfast", "embed", str(folder), str(tmp_path / "in.txt")]
    command += ["-o", str(tmp_path / "out.hdf5"), "--layout", "allennlp", "--layers", layers]
    command += ["--stateful", stateful, "--batch-size", "2", "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["tokens"] == 11
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert json.loads(file["sentence_to_index"][0])["The cat"] == "3"
        rows = [file[str(i)][...] for i in range(4)]
        if layers == "all":
            assert rows[0].shape == (3, 4, 16)
            rows = [row.transpose(1, 0, 2) for row in rows]
    choose = (lambda x: x.transpose(0, 1)) if layers == "all" else (lambda x: x.mean(0))
    check(np.concatenate(rows), folder, choose, stateful=stateful, batch_size=2)


def test_long_lines(folder, tmp_path):
    (tmp_path / "in.txt").write_text("a b c d e\n")
    for overlong, count in (("truncate", 3), ("split", 5)):
        options = EmbedOptions(pooling="tokens", max_length=3, overlong=overlong)
        output = tmp_path / f"{overlong}.h5"
        report = embed_file(folder, tmp_path / "in.txt", output, options)
        assert (report.tokens, report.overlong_lines) == (count, 1)
    options = EmbedOptions(max_length=3, overlong="error")
    with pytest.raises(ValueError, match="at most 3 words, got 5 in line 1"):
        embed_file(folder, tmp_path / "in.txt", tmp_path / "e.h5", options)


def test_options_that_do_not_fit(folder, text, tmp_path):
    for options, message in (
        (dict(pooling="cls"), "must be tokens, mean or max for an ELMo, got cls"),
        (dict(layers=(3,)), "layers must be between -3 and 2"),
        (dict(layers="mix", mix_weights=(1.0,)), "mix_weights must be 3 numbers"),
        (dict(pooling="tokens", layout="allennlp", layers=(1,)), "must be all, top or average"),
    ):
        with pytest.raises(OptionError, match=message):
            embed_file(folder, text, tmp_path / "out.hdf5", EmbedOptions(**options))
    assert not (tmp_path / "out.hdf5").exists()
    with pytest.raises(OptionError, match="stateful must be one of reset, carry, got 'warm'"):
        EmbedOptions(stateful="warm")
    with pytest.raises(OptionError, match="pooling must be tokens"):
        EmbedOptions(layout="allennlp")


def test_convert_command(folder, tmp_path):
    command = [sys.executable, "-m", "ctxfast", "convert", str(folder), str(tmp_path / "new")]
    run = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert run.returncode == 0 and json.loads(run.stdout)["form"] == "safetensors", run.stderr
    assert (tmp_path / "new" / "model.safetensors").is_file()
    run = subprocess.run(
        [*command[:4], "none", str(tmp_path / "x")], capture_output=True, text=True
    )
    assert run.returncode == 1 and "weights.hdf5" in run.stderr and "Traceback" not in run.stderr
