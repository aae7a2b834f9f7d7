"""The vectors of the original TensorFlow implementation, and mistakes that they must catch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxfast import ops
from ctxfast.elmo import ElmoBiLm, batch_to_ids, remove_sentence_boundaries
from ctxfast.elmo.characters import ELMoCharacterMapper
from ctxfast.ops import _native
from tests.oracle import assert_matches, errors

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def fixtures(request) -> Path:
    import os

    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("CTXFAST_TEST_DATA", root.parent / "shared" / "data"))
    folder = data / "elmo_fixtures_allennlp"
    if not folder.is_dir():
        pytest.skip(f"no ELMo fixtures at {folder} (set CTXFAST_TEST_DATA)")
    return folder


@pytest.fixture(scope="module")
def batches(fixtures):
    """Ten batches of three sentences, and the top layer of each."""
    sentences = json.loads((fixtures / "sentences.json").read_text())
    files = [h5py.File(fixtures / f"lm_embeddings_{k}.hdf5") for k in range(3)]
    found = []
    for i in range(10):
        batch = [sentences[k][i].split() for k in range(3)]
        golden = [np.concatenate(list(f[str(i)][...]), -1) for f in files]
        found.append((batch, golden))
    return found


def load(fixtures) -> ElmoBiLm:
    return ElmoBiLm(fixtures / "options.json", fixtures / "lm_weights.hdf5").eval()


def largest_violation(model, batches, mode=True) -> float:
    """The most that any value exceeds atol 5e-6 + rtol 1e-5 of the golden one; at most 0 is right."""
    model.stateful = mode
    worst = -1.0
    for batch, golden in batches:
        output = model(batch_to_ids(batch))
        top, _ = remove_sentence_boundaries(output["activations"][-1], output["mask"])
        for row, expected in enumerate(golden):
            difference = np.abs(top[row, : len(batch[row])].numpy() - expected)
            worst = max(worst, float((difference - 5e-6 - 1e-5 * np.abs(expected)).max()))
    return worst


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_top_layer(fixtures, batches, backend):
    if backend == "native" and not _native.available():
        pytest.skip(f"native module absent: {_native.unavailable_reason()}")
    with ops.use_backend(backend):
        assert largest_violation(load(fixtures), batches) <= 0.0


@pytest.mark.parametrize("isa", _native.available_isas() if _native.available() else [])
def test_top_layer_on_every_instruction_set(fixtures, batches, isa):
    before = _native.isa()
    try:
        _native.set_isa(isa)
        assert largest_violation(load(fixtures), batches) <= 0.0
    finally:
        _native.set_isa(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_top_layer_on_a_gpu(fixtures, batches):
    model = load(fixtures).cuda()
    for batch, golden in batches:
        output = model(batch_to_ids(batch).cuda())
        top, _ = remove_sentence_boundaries(output["activations"][-1], output["mask"])
        for row, expected in enumerate(golden):
            result = top[row, : len(batch[row])].cpu().numpy()
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_token_table(fixtures, backend):
    vocabulary = (fixtures / "vocab_test.txt").read_text(encoding="utf-8").split("\n")[:458]
    with h5py.File(fixtures / "elmo_token_embeddings.hdf5") as file:
        expected = file["embedding"][...]
    with ops.use_backend(backend):
        encoder = load(fixtures)._token_embedder
        vectors = encoder.encode(batch_to_ids([[word.strip() for word in vocabulary]]))[0]
    np.testing.assert_allclose(vectors.detach().numpy(), expected, rtol=1e-5, atol=5e-6)


def test_in_bfloat16_and_with_bfloat16_weights(fixtures, batches):
    """What rounding costs: recurrent weights alone less than everything, and everything no more than in eager."""
    weights, half, eager, exact = (load(fixtures) for _ in range(4))
    weights._elmo_lstm.weight_dtype = torch.bfloat16
    for model, dtype in (half, torch.bfloat16), (eager, torch.bfloat16), (exact, torch.float64):
        model.to(dtype)
    for batch, _ in batches[:3]:
        ids = batch_to_ids(batch)
        rounded, result = (model.layers(ids)[0] for model in (weights, half))
        with ops.use_backend("reference"):
            baseline, truth = (model.layers(ids)[0] for model in (eager, exact))
        assert_matches(result, baseline, truth)
        assert 0.0 < errors(rounded, truth)[0] < errors(baseline, truth)[0]


def _cells(model):
    return [cell for layer in range(2) for cell in model._elmo_lstm.cells(layer)]


def no_cell_clip(model):
    for cell in _cells(model):
        cell.memory_cell_clip_value = None


def no_projection_clip(model):
    for cell in _cells(model):
        cell.state_projection_clip_value = None


def no_forget_bias(model):
    for cell in _cells(model):
        cell.state_linearity.bias.data[64:128] -= 1.0


def gates_in_another_order(model):
    for cell in _cells(model):
        for parameter in cell.input_linearity.weight, cell.state_linearity.weight:
            i, f, g, o = parameter.data.clone().chunk(4)
            parameter.data.copy_(torch.cat((i, g, f, o)))


def directions_swapped(model):
    lstm = model._elmo_lstm
    for layer in range(2):
        forward, backward = lstm.cells(layer)
        one, other = forward.state_dict(), backward.state_dict()
        one = {name: x.clone() for name, x in one.items()}
        forward.load_state_dict(other)
        backward.load_state_dict(one)


def highway_gate_inverted(model):
    for layer in model._token_embedder._highways._layers:
        layer.weight.data[124:] *= -1
        layer.bias.data[124:] *= -1


def no_skip(model):
    model._elmo_lstm.use_skip_connections = False


def tanh(model):
    model._token_embedder.activation = "tanh"


def padding_character_is_zero(model):
    model._token_embedder._char_embedding_weights.data[261] = 0.0


def character_ids_not_shifted(model):
    table = model._token_embedder._char_embedding_weights
    table.data.copy_(table.data.roll(-1, 0))


def boundaries_swapped(model):
    encoder = model._token_embedder
    encoder._boundaries = encoder._boundaries[::-1]


MISTAKES = [
    no_cell_clip,
    no_projection_clip,
    no_forget_bias,
    gates_in_another_order,
    directions_swapped,
    highway_gate_inverted,
    no_skip,
    tanh,
    padding_character_is_zero,
    character_ids_not_shifted,
    boundaries_swapped,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_caught(fixtures, batches, mistake):
    model = load(fixtures)
    mistake(model)
    assert largest_violation(model, batches) > 1e-4


def test_forgetting_the_states_is_caught(fixtures, batches):
    assert largest_violation(load(fixtures), batches, mode=False) > 1e-4


def test_a_repeated_sentence_forgets_its_past(fixtures):
    """The second pass differs much, later ones geometrically less."""
    model = load(fixtures)
    ids = batch_to_ids([["The", "same", "words", "again", "."]])
    tops = [model(ids)["activations"][-1] for _ in range(5)]
    changes = [float((b - a).abs().max()) for a, b in zip(tops, tops[1:], strict=False)]
    assert changes[0] > 0.1 and changes[-1] < 0.05 * changes[0]


def test_character_mapper_examples():
    convert = ELMoCharacterMapper().convert_word_to_char_ids
    assert convert("<S>") == [259, 257, 260] + [261] * 47
    assert convert("</S>") == [259, 258, 260] + [261] * 47
    assert convert("Second") == [259, 84, 102, 100, 112, 111, 101, 260] + [261] * 42
    assert convert("Āt") == [259, 197, 129, 117, 260] + [261] * 45
    assert convert("x" * 60) == [259] + [121] * 48 + [260]
    assert convert("\ud800a") == convert("a")
    assert ELMoCharacterMapper({"[X]": 260}).convert_word_to_char_ids("[X]")[:3] == [259, 261, 260]
