"""ElmoEmbedder and the files of `allennlp elmo`."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from ctxfast.elmo import ConfigurationError, ElmoEmbedder
from ctxfast.elmo.embedder import token_batches
from tests.elmo import models
from tests.elmo.models import SENTENCES
from tests.oracle import assert_matches

h5py = pytest.importorskip("h5py")


@pytest.fixture
def folder(tmp_path):
    models.model().save(tmp_path / "elmo", form="hdf5")
    return tmp_path / "elmo"


def test_arrays(folder):
    embedder = ElmoEmbedder(folder)
    first = embedder.embed_sentence(SENTENCES[0])
    assert first.shape == (3, 4, 16) and first.dtype == np.float32
    assert not np.allclose(embedder.embed_sentence(SENTENCES[0]), first)  # states are carried
    vectors, mask = embedder.batch_to_embeddings(SENTENCES)
    assert vectors.shape == (3, 3, 9, 16) and mask.sum(1).tolist() == [4, 2, 9]
    assert not vectors.requires_grad
    batch = embedder.embed_batch([["a"], [], ["b", "c"]])
    assert [x.shape for x in batch] == [(3, 1, 16), (3, 0, 16), (3, 2, 16)]
    assert embedder.embed_sentence([]).shape == (3, 0, 16) and embedder.embed_batch([]) == []
    assert embedder.cuda_device == -1 and embedder.elmo_bilm.num_layers == 3


def test_many_sentences_in_their_order(folder):
    sentences = [SENTENCES[i % 3] for i in range(20)]
    carried = list(ElmoEmbedder(folder).embed_sentences(sentences, batch_size=4))
    same = list(ElmoEmbedder(folder).embed_sentences(sentences, 4, batch_tokens=10**6))
    reset = ElmoEmbedder(folder, stateful="reset")
    sorted_ = list(reset.embed_sentences(sentences, 8, batch_tokens=40))
    for i, sentence in enumerate(sentences):
        assert carried[i].shape == (3, len(sentence), 16)
        np.testing.assert_array_equal(carried[i], same[i])
    eager, exact = (
        torch.cat(models.word_layers(folder, sentences, dtype), 1)
        for dtype in (torch.float32, torch.float64)
    )
    assert_matches(torch.from_numpy(np.concatenate(sorted_, 1)), eager, exact)


def test_token_batches_hold_what_they_may():
    lengths = [3, 9, 1, 1, 50, 2]
    groups = list(token_batches(range(6), lengths, 3, 24))
    assert groups == [[0, 1], [2, 3], [4], [5]]  # 2 x 11, 2 x 3, and one that is over the limit
    assert list(token_batches(range(4), [1, 1, 1, 1], 3, 1000)) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("output_format", ["all", "top", "average"])
def test_file_of_the_old_command(folder, tmp_path, output_format):
    text = "The cat sat .\nWhy ?\nThe cat sat .\n"
    path = tmp_path / "out.hdf5"
    ElmoEmbedder(folder).embed_file(io.StringIO(text), path, output_format, batch_size=2)
    embedder = ElmoEmbedder(folder)
    expected = list(embedder.embed_sentences([line.split() for line in text.splitlines()], 2))
    with h5py.File(path) as file:
        assert set(file) == {"0", "1", "2", "sentence_to_index"}
        index = json.loads(file["sentence_to_index"][0])
        assert index == {"The cat sat .": "2", "Why ?": "1"}
        for i, layers in enumerate(expected):
            wanted = {"all": layers, "top": layers[2], "average": layers.mean(0)}[output_format]
            assert file[str(i)].dtype == np.float32
            np.testing.assert_array_equal(file[str(i)][...], wanted)


def test_keys_of_sentences(folder, tmp_path):
    embedder, path = ElmoEmbedder(folder), tmp_path / "out.hdf5"
    embedder.embed_file(io.StringIO("a b\nc\n"), path, "top", use_sentence_keys=True)
    with h5py.File(path) as file:
        assert set(file) == {"a b", "c"}
    embedder.embed_file(io.StringIO("a b\n"), path, "top", forget_sentences=True)
    with h5py.File(path) as file:
        assert set(file) == {"0"}
    before = path.read_bytes()
    for text, message in (
        ("a\n\nb\n \n", r"no blank lines, got 2 at \(from 0\) \[1, 3\]"),
        ("a\na\n", "must differ as keys, got 'a' twice"),
        ("a/b\n", "must hold no '/' as keys"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            embedder.embed_file(io.StringIO(text), path, "top", use_sentence_keys=True)
    with pytest.raises(ConfigurationError, match="output_format must be one of all, top, average"):
        embedder.embed_file(io.StringIO("a\n"), path, "some")
    assert path.read_bytes() == before  # nothing is left of a failure
