"""ElmoBiLm and Elmo: numbers against the formulas, and AllenNLP's interface."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from ctxfast import elmo, nn, ops
from ctxfast.elmo import Elmo, ElmoBiLm, ElmoTokenEmbedder, batch_to_ids
from ctxfast.elmo import lstm as lstm_module
from ctxfast.elmo.weights import hdf5_arrays
from tests.elmo import models
from tests.elmo.models import SENTENCES
from tests.oracle import assert_matches


@pytest.fixture
def folder(tmp_path):
    models.model().save(tmp_path / "elmo", form="hdf5")
    return tmp_path / "elmo"


def eager_layers(folder, dtype, sentences=SENTENCES):
    """Layers [3, B, T + 2, 16] and mask of a fresh model in eager PyTorch: the truth in float64."""
    with ops.use_backend("reference"):
        return ElmoBiLm(folder).to(dtype).layers(batch_to_ids(sentences))


def check_layers(result, folder, choose, sentences=SENTENCES):
    """result against `choose` of the layers and the mask, by the error of eager PyTorch."""
    assert_matches(
        result,
        *(
            choose(*eager_layers(folder, dtype, sentences))
            for dtype in (torch.float32, torch.float64)
        ),
    )


VARIANTS = [
    {},
    {"activation": "tanh", "n_highway": 0},
    {"use_skip_connections": False, "cell_clip": None, "proj_clip": None},
    {"n_layers": 1},
    {"projection_dim": 24},
    {"projection_dim": 18, "filters": ((1, 8), (2, 10))},
    {"max_characters_per_token": 20},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_layers_follow_the_formulas(changes):
    """Each sentence alone and step by step, with the states of the call before."""
    chosen = models.options(**changes)
    model, eager = models.model(**changes), models.model(**changes)
    arrays = hdf5_arrays(model.state_dict(), chosen)
    ids = batch_to_ids(SENTENCES)[..., : chosen.max_characters_per_token]
    states = [None] * 3
    for ids_now in (ids, ids.flip(0)):
        output = model(ids_now)
        with ops.use_backend("reference"):
            baseline = eager(ids_now)["activations"]
        with_ends, mask = model._token_embedder.with_boundaries(ids_now)
        assert torch.equal(output["mask"], mask) and mask.dtype == torch.bool
        rows = []
        for row in range(3):
            layers, states[row] = models.arrays_forward(
                arrays, chosen, with_ends[row, : int(mask[row].sum())], states[row]
            )
            rows.append(layers)
        for layer, got in enumerate(output["activations"]):
            exact = torch.cat([layers[layer] for layers in rows])
            assert_matches(got[mask], baseline[layer][mask], exact, name=f"layer {layer}")
            assert not got[~mask].any()


def test_interface_of_the_language_model(folder):
    model = ElmoBiLm(folder)
    assert elmo._ElmoBiLm is ElmoBiLm and model.num_layers == 3 and model.get_output_dim() == 16
    assert not any(p.requires_grad for p in model.parameters())
    assert not list(model.buffers())
    names = set(model.state_dict())
    assert "_token_embedder._highways._layers.1.bias" in names
    assert "_elmo_lstm.backward_layer_1.state_projection.weight" in names
    encoded = model._token_embedder(batch_to_ids(SENTENCES))
    assert encoded["token_embedding"].shape == (3, 11, 8) and encoded["mask"].shape == (3, 11)
    padding = model._token_embedder.encode(torch.zeros(1, 1, 50, dtype=torch.int64))[0, 0]
    assert torch.equal(encoded["token_embedding"][1, -1], padding)


def test_equal_tokens_are_encoded_once_and_kept_between_calls(folder):
    model = ElmoBiLm(folder)
    encoder = model._token_embedder
    encoder.max_cached_tokens = 3
    counts = []
    original = nn.CharacterEncoder.forward

    def counting(self, ids):
        counts.append(len(ids))
        return original(self, ids)

    nn.CharacterEncoder.forward = counting
    try:
        first = encoder(batch_to_ids([["a", "b", "a", "a"], ["b"]]))["token_embedding"]
        again = encoder(batch_to_ids([["b", "a", "c"]]))["token_embedding"]
        encoder(batch_to_ids([["d", "e", "f", "g"]]))
        encoder(batch_to_ids([["a"]]))
    finally:
        nn.CharacterEncoder.forward = original
    assert counts == [5, 1, 4, 1]  # a b <S> </S> padding; c; d e f g, which push out a, b and c; a
    assert torch.equal(first[0, 1], again[0, 2]) and torch.equal(first[0, 2], again[0, 1])
    with torch.no_grad():
        encoder._projection.bias += 1.0
    assert not torch.allclose(encoder(batch_to_ids([["f"]]))["token_embedding"], first[0, :3])
    with pytest.raises(ValueError, match="max_cached_tokens must be an integer"):
        encoder.max_cached_tokens = -1


def test_a_write_that_torch_does_not_see_needs_refresh(folder):
    model = ElmoBiLm(folder).eval()
    ids = batch_to_ids([["x"]])
    model(ids)
    model._token_embedder._projection.bias.data += 1.0
    nn.refresh(model)
    fresh = ElmoBiLm(folder).eval()
    fresh._token_embedder._projection.bias.data += 1.0
    assert torch.equal(model(ids)["activations"][0], fresh(ids)["activations"][0])


def test_elmo_outputs(folder):
    model = Elmo(folder, None, 2, dropout=0.0)
    output = model(batch_to_ids(SENTENCES))
    assert sorted(output) == ["elmo_representations", "mask"]
    vectors, mask = output["elmo_representations"], output["mask"]
    assert [x.shape for x in vectors] == [(3, 9, 16)] * 2 and mask.sum(1).tolist() == [4, 2, 9]
    assert torch.equal(vectors[0], vectors[1]) and vectors[0].requires_grad
    check_layers(vectors[0][mask], folder, lambda x, _: (sum(x) / 3)[:, 1:-1][mask])
    assert not vectors[0][~mask].any()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    expected_names = [f"scalar_mix_{k}.gamma" for k in (0, 1)]
    expected_names += [f"scalar_mix_{k}.scalar_parameters.{j}" for k in (0, 1) for j in (0, 1, 2)]
    assert sorted(names) == sorted(expected_names)
    kept = Elmo(folder, None, 1, dropout=0.0, keep_sentence_boundaries=True)
    output = kept(batch_to_ids(SENTENCES))
    check_layers(output["elmo_representations"][0], folder, lambda x, _: sum(x) / 3)
    assert output["mask"].shape == (3, 11)


def test_more_dimensions_are_flattened(folder):
    ids = batch_to_ids([*SENTENCES, *SENTENCES[:1]]).view(2, 2, 9, 50)
    flat = Elmo(folder, None, 1, dropout=0.0)(ids.view(4, 9, 50))
    deep = Elmo(folder, None, 1, dropout=0.0)(ids)
    assert deep["mask"].shape == (2, 2, 9)
    vectors = deep["elmo_representations"][0]
    assert torch.equal(vectors.view(4, 9, 16), flat["elmo_representations"][0])
    kept = Elmo(folder, None, 1, keep_sentence_boundaries=True)(ids)
    assert kept["elmo_representations"][0].shape == (2, 2, 11, 16)


def test_empty_sentences_and_no_words_at_all(folder):
    model = Elmo(folder, None, 1, dropout=0.0)
    output = model(batch_to_ids([["one", "two"], []]))
    assert output["mask"].tolist() == [[True, True], [False, False]]
    assert not output["elmo_representations"][0][1].any()
    states = model._elmo_lstm._elmo_lstm._states
    assert states[0][:, 1].abs().sum() > 0  # begin and end were read
    assert model(batch_to_ids([[], []]))["elmo_representations"][0].shape == (2, 0, 16)
    assert model(batch_to_ids([]))["elmo_representations"][0].shape == (0, 0, 16)
    assert ElmoBiLm(folder)(batch_to_ids([[]]))["activations"][1].shape == (1, 2, 16)


def test_dropout_acts_in_training_even_when_frozen(folder):
    model = Elmo(folder, None, 2, dropout=0.5)
    model._elmo_lstm.stateful = False
    a, b = model(batch_to_ids(SENTENCES))["elmo_representations"]
    assert not torch.equal(a, b) and (a == 0).float().mean() > 0.4
    model.eval()
    a, b = model(batch_to_ids(SENTENCES))["elmo_representations"]
    assert torch.equal(a, b)


def test_only_layers_that_count_are_computed(folder):
    fixed = Elmo(folder, None, 1, dropout=0.0, scalar_mix_parameters=[-9e10, 1, -9e10])
    ran = []
    run = fixed._elmo_lstm._elmo_lstm._run
    fixed._elmo_lstm._elmo_lstm._run = lambda layer, *rest: ran.append(layer) or run(layer, *rest)
    vectors = fixed(batch_to_ids(SENTENCES))["elmo_representations"][0]
    check_layers(vectors, folder, lambda x, mask: elmo.remove_sentence_boundaries(x[1], mask)[0])
    assert ran == [0] and not vectors.requires_grad


@pytest.mark.parametrize("layer_norm_batch", [True, False])
def test_layer_norm_mask_includes_the_boundaries(folder, layer_norm_batch):
    def by_hand(layers, mask):
        if layer_norm_batch:
            layers = [
                (x - x[mask].mean()) / (x[mask].var(correction=0) + 1e-13).sqrt() for x in layers
            ]
        return elmo.remove_sentence_boundaries(sum(layers) / 3, mask)[0]

    model = Elmo(folder, None, 1, do_layer_norm=layer_norm_batch, dropout=0.0)
    check_layers(model(batch_to_ids(SENTENCES))["elmo_representations"][0], folder, by_hand)


def test_cached_vocabulary(folder):
    words = ["<pad>", "@@UNKNOWN@@", "The", "cat", "sat"]
    model = Elmo(folder, None, 1, dropout=0.0, vocab_to_cache=words)
    assert model._elmo_lstm._word_embedding.weight.shape == (5, 8)
    assert "_elmo_lstm._word_embedding.weight" in model.state_dict()
    assert not model._elmo_lstm._word_embedding.weight.requires_grad
    assert not model._elmo_lstm._word_embedding.weight[0].any()  # no word
    numbers = torch.tensor([[2, 3, 4], [2, 0, 0]])
    sentences = [["The", "cat", "sat"], ["The"]]
    ids = batch_to_ids(sentences)

    def mean(layers, mask):
        return elmo.remove_sentence_boundaries(sum(layers) / 3, mask)[0]

    by_number = model(None, numbers)
    by_characters = Elmo(folder, None, 1, dropout=0.0)(ids)
    assert torch.equal(by_number["mask"], by_characters["mask"])
    check_layers(by_number["elmo_representations"][0], folder, mean, sentences)
    fresh = Elmo(folder, None, 1, dropout=0.0, vocab_to_cache=words)
    outside = fresh(ids, torch.tensor([[2, 99, 4], [2, 0, 0]]))  # that word by its characters
    check_layers(outside["elmo_representations"][0], folder, mean, sentences)
    deep = fresh(None, numbers.view(1, 2, 3))
    assert deep["elmo_representations"][0].shape == (1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"word_inputs must be in \[0, 5\) without inputs, got 99"):
        model(None, torch.tensor([[99]]))
    negative = Elmo(folder, None, 1, dropout=0.0, vocab_to_cache=words)
    negative._elmo_lstm._word_embedding.weight.data[2] = -1.0  # a word all the same
    assert negative(None, numbers)["mask"].tolist() == [[True] * 3, [True, False, False]]
    with pytest.warns(UserWarning, match="get no gradient from cached words"):
        trained = Elmo(folder, None, 1, requires_grad=True, vocab_to_cache=words)
    assert trained._elmo_lstm._word_embedding.weight.requires_grad


def test_word_numbers_without_a_vocabulary_are_ignored(folder, caplog):
    model = Elmo(folder, None, 1, dropout=0.0)
    model(batch_to_ids(SENTENCES), torch.zeros(3, 9, dtype=torch.int64))
    assert "does not have a cached vocab" in caplog.text


def test_frozen_records_no_graph_and_training_reaches_everything(folder):
    frozen = ElmoBiLm(folder)
    assert not any(x.requires_grad for x in frozen(batch_to_ids(SENTENCES))["activations"])
    model = Elmo(folder, None, 1, requires_grad=True, dropout=0.0)
    ids = batch_to_ids(SENTENCES)
    for _ in range(2):  # the states of the first step must not drag its graph along
        loss = model(ids)["elmo_representations"][0].square().sum()
        loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_against_float64(folder):
    def gradients(dtype):
        model = ElmoBiLm(folder, requires_grad=True).to(dtype)
        model(batch_to_ids(SENTENCES))["activations"][2].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    found = gradients(torch.float32)
    with ops.use_backend("reference"):
        eager, exact = gradients(torch.float32), gradients(torch.float64)
    for name, grad in found.items():
        assert_matches(grad, eager[name], exact[name], name=name)


def test_a_module_of_ones_own(folder):
    bilm = ElmoBiLm(folder)
    model = Elmo(None, None, 1, module=bilm, dropout=0.0)
    assert model.get_output_dim() == 16
    model(batch_to_ids(SENTENCES))

    class Constant(torch.nn.Module):
        num_layers = 2

        def get_output_dim(self):
            return 4

        def forward(self, inputs, word_inputs):
            ones = torch.ones(inputs.shape[0], inputs.shape[1] + 2, 4)
            return {"activations": [ones, 3 * ones], "mask": torch.ones(ones.shape[:2]).bool()}

    output = Elmo(None, None, 1, module=Constant(), dropout=0.0)(batch_to_ids(SENTENCES))
    two = torch.full((3, 9, 4), 2.0)
    assert_matches(output["elmo_representations"][0], two, two.double())
    with pytest.raises(elmo.ConfigurationError, match="must be None with module"):
        Elmo(folder, None, 1, module=bilm)
    with pytest.raises(TypeError, match="module must be an ElmoBiLm to have states"):
        Elmo(None, None, 1, module=Constant()).stateful = "reset"


def test_token_embedder(folder):
    embedder = ElmoTokenEmbedder(folder, projection_dim=5, dropout=0.0)
    assert embedder.get_output_dim() == 5
    assert embedder(batch_to_ids(SENTENCES)).shape == (3, 9, 5)
    assert embedder(inputs=batch_to_ids(SENTENCES)).shape == (3, 9, 5)
    names = set(embedder.state_dict())
    assert {"_projection.weight", "_elmo.scalar_mix_0.gamma"} <= names
    assert ElmoTokenEmbedder(folder).get_output_dim() == 16


def test_old_state_dicts_load(folder, tmp_path):
    model = Elmo(folder, None, 1, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    torch.save(model.state_dict(), tmp_path / "best.th")
    other = Elmo(folder, None, 1, dropout=0.0)
    other.load_state_dict(torch.load(tmp_path / "best.th", weights_only=True))
    ids = batch_to_ids(SENTENCES)
    expected = model(ids)["elmo_representations"][0]
    assert torch.equal(other(ids)["elmo_representations"][0], expected)
    tagger = {f"text_field_embedder.elmo.{k}": v for k, v in model.state_dict().items()}
    torch.save(tagger, tmp_path / "tagger.th")
    read = ElmoBiLm(folder / "options.json", tmp_path / "tagger.th")
    assert all(
        torch.equal(read.state_dict()[k], v) for k, v in model._elmo_lstm.state_dict().items()
    )


def test_copies_and_pickles(folder):
    model = Elmo(folder, None, 1, dropout=0.0).eval()
    ids = batch_to_ids(SENTENCES)
    model(ids)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(ids)["elmo_representations"][0]
    for other in copies:  # with their states
        assert torch.equal(other(ids)["elmo_representations"][0], expected)


def test_long_inputs_run_in_parts(folder, monkeypatch):
    sentences = [["word"] * 40, ["other", "words"] * 6, []]
    ids = batch_to_ids(sentences)
    for stateful in (True, "reset"):
        parts, eager, exact = ElmoBiLm(folder), ElmoBiLm(folder), ElmoBiLm(folder).double()
        parts.stateful = eager.stateful = exact.stateful = stateful
        for _ in range(2):
            monkeypatch.setattr(lstm_module, "CHUNK_BYTES", 256 << 20)
            with ops.use_backend("reference"):
                whole = [model(ids)["activations"] for model in (eager, exact)]
            monkeypatch.setattr(lstm_module, "CHUNK_BYTES", 3 * 2 * 4 * 24 * 4 * 7)  # 7 steps
            for got, *wanted in zip(parts(ids)["activations"], *whole, strict=True):
                assert_matches(got, *wanted)


def test_threads_share_a_model(folder):
    model = ElmoBiLm(folder).eval()
    model.stateful = "reset"
    model._token_embedder.max_cached_tokens = 4
    batches = [batch_to_ids([[f"word{i}", "the", "a", f"x{i}"]]) for i in range(8)]
    expected = [model(ids)["activations"][2] for ids in batches]
    wrong = []

    def work(offset):
        for i in range(16):
            k = (i + offset) % 8
            if not torch.equal(model(batches[k])["activations"][2], expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_of_word_ids(tmp_path):
    changes = dict(filters=(), n_tokens_vocab=9, character_dim=16)
    model = models.model(**changes)
    model.save(tmp_path, form="hdf5")
    loaded = ElmoBiLm(tmp_path).eval()
    ids = torch.tensor([[4, 5, 9], [6, 0, 0]])
    output = loaded(ids)
    assert [x.shape for x in output["activations"]] == [(2, 5, 16)] * 3
    assert output["mask"].sum(1).tolist() == [5, 3]
    table = loaded._word_embedding.weight
    assert torch.equal(output["activations"][0][0, :, :8], table[[1, 4, 5, 9, 2]])
    assert Elmo(tmp_path, None, 1)(ids)["elmo_representations"][0].shape == (2, 3, 16)
    with pytest.raises(ValueError, match=r"word ids must be in \[0, 10\), got 0 to 10"):
        loaded(torch.tensor([[10, 0]]))
