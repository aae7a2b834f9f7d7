"""`embed_file` with an ELMo."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ctxfast.elmo import ElmoEmbedder
from ctxfast.embeddings import EmbedOptions, OptionError, embed_file, load_embeddings
from tests.elmo import models

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


def expected(folder, stateful="reset", batch=64):
    embedder = ElmoEmbedder(folder, stateful=stateful)
    lines = [line.split() for line in TEXT.splitlines() if line]
    return list(embedder.embed_sentences(lines, batch))


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
        "all": lambda x: x.transpose(1, 0, 2),
        "top": lambda x: x[2],
        (-2,): lambda x: x[1],
        (0, 2): lambda x: x[[0, 2]].transpose(1, 0, 2),
        "mix": lambda x: x.mean(0),
    }[layers]
    wanted = np.concatenate([choose(x) for x in expected(folder)])
    np.testing.assert_allclose(np.asarray(found.vectors), wanted, rtol=1e-5, atol=1e-5)


def test_vectors_of_lines(folder, text, tmp_path):
    embed_file(folder, text, tmp_path / "out.npz", EmbedOptions(batch_tokens=5))
    found = np.asarray(load_embeddings(tmp_path / "out.npz").embeddings)
    assert not found[1].any()
    wanted = np.stack([x[2].mean(0) for x in expected(folder)])
    np.testing.assert_allclose(found[[0, 2, 3, 4]], wanted, rtol=1e-5, atol=1e-5)


def test_carried_states_follow_the_file(folder, text, tmp_path):
    options = EmbedOptions(pooling="tokens", stateful="carry", batch_size=2)
    embed_file(folder, text, tmp_path / "out.h5", options)
    found = np.asarray(load_embeddings(tmp_path / "out.h5").vectors)
    wanted = np.concatenate([x[2] for x in expected(folder, "carry", 2)])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


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
        for i, wanted in enumerate(expected(folder, stateful, 2)):
            wanted = wanted if layers == "all" else wanted.mean(0)
            np.testing.assert_allclose(file[str(i)][...], wanted, rtol=1e-5, atol=1e-5)


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
