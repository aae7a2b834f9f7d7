"""embed_file against transformers in float64, one sentence at a time."""

import json
import sys

import numpy as np
import pytest
import torch

from ctxfast import load_embeddings
from ctxfast.embeddings import EmbedOptions, OptionError, embed_file

LINES = [
    "The old dog sleeps in the house.",
    "",
    "a",
    "unbelievable! seven cats, never one train",
    "   ",
    "The old dog sleeps in the house.",
    "café 日本 #1 -- it's 2019",
    "the river runs slowly " * 12,  # 50 tokens
    "\u200b",
    "the small green train is not new " * 30,  # 212 tokens: too long
    "zzzz",
]
BLANK = [1, 4, 8]
LIMIT = 64


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def run(model_directory, text, suffix=".npz", **options):
    output = text.with_name(f"out{suffix}")
    report = embed_file(model_directory, text, output, EmbedOptions(**options), overwrite=True)
    return report, load_embeddings(output)


def chosen_layers(layers, name):
    """[L, T, D] -> [T, D] or [T, L, D], in float64."""
    if name == "top":
        return layers[-1]
    if name == "mix":
        return layers.mean(0)
    if name == "all":
        return layers.transpose(1, 0, 2)
    found = layers[list(name)].transpose(1, 0, 2)
    return found[:, 0] if len(name) == 1 else found


# Largest absolute value of the hidden states is about 4: float32 through three layers.
TOLERANCE = 2e-5


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".safetensors"])
@pytest.mark.parametrize("layers", ["top", "all", "mix", (-1, -2), (0,)])
def test_tokens_agree_with_single_sentences(model_directory, oracle, text, suffix, layers):
    report, found = run(model_directory, text, suffix, pooling="tokens", layers=layers)
    assert len(found) == len(LINES) == report.lines
    for i, line in enumerate(LINES):
        if i in BLANK:
            assert len(found[i]) == 0
            continue
        tokens, expected, _ = oracle(line, LIMIT)
        words = found.tokens[found.offsets[i] : found.offsets[i + 1]]
        assert list(words) == tokens
        difference = np.abs(found[i] - chosen_layers(expected, layers))
        assert difference.max() < TOLERANCE
    assert report.tokens == found.offsets[-1] == len(found.vectors)
    assert (report.blank_lines, report.overlong_lines) == (3, 1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("layers", ["top", "all", "mix", (1,)])
def test_pooled_agree_with_single_sentences(model_directory, oracle, text, pooling, layers):
    _, found = run(model_directory, text, pooling=pooling, layers=layers)
    for i, line in enumerate(LINES):
        if i in BLANK:
            assert not found[i].any()
            continue
        rows = chosen_layers(oracle(line, LIMIT)[1], layers)
        pooled = {"mean": rows.mean(0), "cls": rows[0], "max": rows.max(0)}[pooling]
        assert np.abs(found[i] - pooled).max() < TOLERANCE


def test_pooler_agrees_with_single_sentences(model_directory, oracle, text):
    _, found = run(model_directory, text, pooling="pooler")
    for i, line in enumerate(LINES):
        expected = 0 if i in BLANK else oracle(line, LIMIT)[2]
        assert np.abs(found[i] - expected).max() < TOLERANCE


def test_mix_weights_are_a_softmax(model_directory, oracle, text):
    weights = (0.5, -1.0, 2.0, 0.0)
    _, found = run(model_directory, text, layers="mix", mix_weights=weights)
    share = np.exp(weights) / np.exp(weights).sum()
    expected = np.tensordot(share, oracle(LINES[0])[1], 1).mean(0)
    assert np.abs(found[0] - expected).max() < TOLERANCE


def test_normalize_gives_unit_vectors(model_directory, oracle, text):
    _, found = run(model_directory, text, normalize=True)
    lengths = np.linalg.norm(np.asarray(found.embeddings), axis=1)
    for i in range(len(LINES)):
        assert abs(lengths[i] - (0 if i in BLANK else 1)) < 1e-6
    mean = oracle(LINES[0])[1][-1].mean(0)
    assert np.abs(found[0] - mean / np.linalg.norm(mean)).max() < TOLERANCE


def split_oracle(oracle, line):
    """Rows of a split line: every piece alone, inner [SEP] and [CLS] dropped."""
    words = line.split()
    parts = [" ".join(words[i : i + LIMIT - 2]) for i in range(0, len(words), LIMIT - 2)]
    rows = [oracle(part)[1][-1] for part in parts]
    rows[1:] = [row[1:] for row in rows[1:]]
    rows[:-1] = [row[:-1] for row in rows[:-1]]
    return np.concatenate(rows), [oracle(part) for part in parts]


def test_split_lines_keep_every_token(model_directory, oracle, text):
    line = LINES[9]
    rows, pieces = split_oracle(oracle, line)
    report, found = run(model_directory, text, pooling="tokens", overlong="split")
    assert report.overlong_lines == 1
    assert list(found.tokens[found.offsets[9] : found.offsets[10]]) == [
        "[CLS]",
        *line.split(),
        "[SEP]",
    ]
    assert np.abs(found[9] - rows).max() < TOLERANCE
    firsts = np.mean([layers[-1, 0] for _, layers, _ in pieces], axis=0)
    pooled = np.mean([pooler for _, _, pooler in pieces], axis=0)
    expected = {"mean": rows.mean(0), "max": rows.max(0), "cls": firsts, "pooler": pooled}
    for pooling, vector in expected.items():
        _, found = run(model_directory, text, pooling=pooling, overlong="split")
        assert np.abs(found[9] - vector).max() < TOLERANCE, pooling


def test_overlong_error_names_the_line_and_leaves_nothing(model_directory, text):
    with pytest.raises(ValueError, match="at most 64 tokens, got 212 in line 10"):
        run(model_directory, text, overlong="error")
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]


def test_max_length_and_tiny_batches_change_nothing_else(model_directory, oracle, text):
    report, found = run(model_directory, text, pooling="tokens", max_length=10, batch_tokens=1)
    assert report.overlong_lines == 4
    for i, line in enumerate(LINES):
        if i not in BLANK:
            tokens, layers, _ = oracle(line, 10)
            assert len(found[i]) == len(tokens) <= 10
            assert np.abs(found[i] - layers[-1]).max() < TOLERANCE


def test_order_survives_many_chunks(model_directory, text, monkeypatch):
    job = sys.modules["ctxfast.embeddings.job"]
    _, whole = run(model_directory, text, ".npz", pooling="tokens", layers="all")
    monkeypatch.setattr(job, "_CHUNK_LINES", 3)
    monkeypatch.setattr(job, "_WINDOW_BYTES", 4096)
    report, parts = run(model_directory, text, ".h5", pooling="tokens", layers="all")
    assert (report.lines, report.blank_lines) == (len(LINES), len(BLANK))
    assert report.tokens == len(parts.vectors)
    assert whole.offsets.tolist() == parts.offsets.tolist()
    assert list(whole.tokens) == list(parts.tokens)
    assert np.abs(np.asarray(whole.vectors) - np.asarray(parts.vectors)).max() < TOLERANCE
    _, whole = run(model_directory, text, ".npz", overlong="split")
    monkeypatch.setattr(job, "_CHUNK_LINES", 2048)
    _, parts = run(model_directory, text, ".safetensors", overlong="split")
    assert np.abs(np.asarray(whole.embeddings) - np.asarray(parts.embeddings)).max() < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "suffix", "bound"),
    [("float16", ".h5", 2**-10), ("float16", ".npz", 2**-10), ("bfloat16", ".safetensors", 2**-7)],
)
def test_storage_types_round_once(model_directory, text, dtype, suffix, bound):
    _, exact = run(model_directory, text)
    report, found = run(model_directory, text, suffix, dtype=dtype)
    exact, stored = np.asarray(exact.embeddings), np.asarray(found.embeddings, dtype=np.float32)
    assert report.dtype == dtype
    assert (np.abs(stored - exact) <= bound / 2 * np.abs(exact) + 1e-7).all()
    assert stored.any()


def test_compute_in_bfloat16_is_close(model_directory, text):
    _, exact = run(model_directory, text)
    _, found = run(model_directory, text, compute_dtype="bfloat16")
    difference = np.abs(np.asarray(found.embeddings) - np.asarray(exact.embeddings)).max()
    assert 0 < difference < 0.15


def test_float16_overflow_is_refused(model_directory, text):
    from ctxfast.embeddings.job import _Job

    job = object.__new__(_Job)
    job.options = EmbedOptions(dtype="float16")
    with pytest.raises(ValueError, match="below 65504 for dtype float16, got 100000"):
        job._stored(torch.tensor([[1.0, 1e5]]))
    assert np.isinf(job._stored(torch.tensor([[float("inf")]]))).all()


def test_metadata_tells_text_model_and_options(model_directory, text):
    import hashlib

    import ctxfast

    report, found = run(model_directory, text, max_length=20, pooling="cls")
    metadata = found.metadata
    assert metadata["ctxfast"] == ctxfast.__version__
    assert metadata["torch"] == torch.__version__
    assert metadata["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    weights = (model_directory / "model.safetensors").read_bytes()
    expected = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert metadata["weights_sha256"] == expected
    assert metadata["model"] == str(model_directory)
    assert metadata["options"]["max_length"] == 20 and metadata["options"]["pooling"] == "cls"
    assert metadata["lines"] == report.lines and metadata["overlong_lines"] == report.overlong_lines
    json.dumps(report.as_dict())


def test_progress_reaches_the_end_and_never_falls(model_directory, text, monkeypatch):
    seen = []
    embed_file(
        model_directory,
        text,
        text.with_name("out.h5"),
        EmbedOptions(batch_tokens=20),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(LINES), len(LINES))
    assert seen == sorted(seen) and len(seen) > 3


def test_only_blank_lines_are_still_lines(model_directory, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n  \n")
    report, found = run(model_directory, path)
    assert report.shape == (3, 32) and report.blank_lines == 3
    assert not np.asarray(found.embeddings).any()
    report, found = run(model_directory, path, pooling="tokens")
    assert report.shape == (0, 32) and len(found) == 3


def test_weights_without_pooler_serve_all_but_the_pooler(model_directory, text, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "no-pooler"
    directory.mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (directory / name).write_bytes((model_directory / name).read_bytes())
    tensors = load_file(model_directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    _, expected = run(model_directory, text)
    _, found = run(directory, text)
    np.testing.assert_array_equal(np.asarray(found.embeddings), np.asarray(expected.embeddings))
    with pytest.raises(ValueError, match="complete, got none for pooler.dense.bias and 1 more"):
        run(directory, text, pooling="pooler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (4,)}, "between -4 and 3 for this model, got 4"),
        ({"layers": (-5, 0)}, "between -4 and 3"),
        ({"layers": "mix", "mix_weights": (1.0,)}, "4 numbers for this model, got 1"),
        ({"max_length": 65}, "at most the model's 64, got 65"),
        ({"dtype": "bfloat16"}, "must end in .safetensors for bfloat16"),
        ({"device": "tpu"}, "device must be auto"),
        ({"device": "mps"}, "device must be auto"),
        ({"device": "cuda:99"}, "must be present"),
        ({"compute_dtype": "float16", "device": "cpu"}, "float32, bfloat16 or int8 on a CPU"),
    ],
)
def test_options_that_do_not_fit_are_refused(model_directory, text, options, message):
    with pytest.raises(OptionError, match=message):
        run(model_directory, text, **options)
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "sum"}, "pooling must be one of"),
        ({"layers": "bottom"}, "layers must be one of"),
        ({"layers": ()}, "at least one layer"),
        ({"pooling": "pooler", "layers": "all"}, '"top" with pooling "pooler"'),
        ({"mix_weights": (1.0,)}, 'come with layers "mix"'),
        ({"layers": "mix", "mix_weights": (float("nan"),)}, "finite"),
        ({"normalize": True, "pooling": "tokens"}, "pooled output"),
        ({"overlong": "drop"}, "overlong must be one of"),
        ({"max_length": 2}, "at least 3"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"compute_dtype": "int4"}, "compute_dtype must be one of"),
    ],
)
def test_options_that_are_never_right_are_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        EmbedOptions(**options)
