"""Options and weights: every published form, and what is wrong with damaged ones."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from ctxfast import elmo
from ctxfast.elmo import ConfigurationError, Elmo, ElmoBiLm, ElmoEmbedder, ElmoOptions
from ctxfast.elmo.weights import hdf5_arrays, initial_weights
from tests.elmo import models
from tests.oracle import ulp

h5py = pytest.importorskip("h5py")

CONTENT = models.options().to_dict()


def changed(path: str, value=None, remove=False):
    content = json.loads(json.dumps(CONTENT))
    *parents, name = path.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    if remove:
        del section[name]
    else:
        section[name] = value
    return content


def assert_same_weights(result, model):
    """Bit for bit, but for the forget bias, which is rounded when it loses its 1 in a file and when it gets it back."""
    for name, value in model.state_dict().items():
        bound = ulp(value.dtype, float(value.abs().max())) if name.endswith("y.bias") else 0.0
        assert (result.state_dict()[name] - value).abs().max() <= bound, name


@pytest.mark.parametrize("changes", [{}, {"n_highway": 0}, {"projection_dim": 24, "n_layers": 1},
                                     {"filters": ((1, 8),)}], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["hdf5", "safetensors"])
def test_writing_and_reading(tmp_path, changes, form):
    model = models.model(**changes)
    model.save(tmp_path, form=form)
    assert ElmoOptions.from_file(tmp_path / "options.json") == models.options(**changes)
    other = ElmoBiLm(tmp_path)
    assert_same_weights(other, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["options.json", "weights.hdf5" if form == "hdf5" else "model.safetensors"]
    )


def test_hdf5_written_twice_is_the_same_up_to_the_forget_bias(tmp_path):
    model = models.model()
    arrays = hdf5_arrays(model.state_dict(), model.options)
    model.save(tmp_path, form="hdf5")
    again = hdf5_arrays(ElmoBiLm(tmp_path).state_dict(), model.options)
    for name, array in arrays.items():
        assert (again[name] == array).all(), name


def test_262_rows_missing_projection_and_single_layer_names(tmp_path):
    model = models.model(n_layers=1)
    model.save(tmp_path, form="hdf5")
    with h5py.File(tmp_path / "weights.hdf5", "r+") as file:
        table = file["char_embed"][...]
        del file["char_embed"]
        file["char_embed"] = torch.cat((torch.full((1, 4), 0.5), torch.from_numpy(table))).numpy()
        for d in (0, 1):
            file.move(f"RNN_{d}/RNN/MultiRNNCell/Cell0/LSTMCell", f"RNN_{d}/RNN/LSTMCell")
    other = ElmoBiLm(tmp_path)
    assert other._token_embedder._char_embedding_weights[0].eq(0.5).all()
    name = "_elmo_lstm.backward_layer_0.state_linearity.weight"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])
    plain = models.model(projection_dim=18)
    assert plain._token_embedder._projection is None


def test_training_keys_are_ignored():
    content = {**CONTENT, "n_epochs": 10, "batch_size": 128, "unroll_steps": 20, "dropout": 0.1}
    content["char_cnn"] = {**content["char_cnn"], "n_characters": 261}
    assert ElmoOptions.from_dict(content) == models.options()
    for off in (None, 0, 0.0):
        clipless = ElmoOptions.from_dict(changed("lstm.cell_clip", off))
        assert clipless.cell_clip is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "lstm must be an object, got list"),
        ({"lstm": 3}, "lstm must be an object, got 3"),
        (changed("lstm.dim", remove=True), "lstm.dim must be given"),
        (changed("lstm.dim", "64"), "lstm.dim must be an integer, got '64'"),
        (changed("lstm.dim", 0), r"lstm.dim must be in \[1"),
        (changed("lstm.projection_dim", 99), "lstm.projection_dim must be at most lstm.dim"),
        (changed("lstm.n_layers", True), "lstm.n_layers must be an integer, got True"),
        (changed("lstm.cell_clip", -1), "lstm.cell_clip must be a number of at least 0"),
        (changed("lstm.use_skip_connections", 1), "use_skip_connections must be true or false"),
        (changed("char_cnn.activation", "gelu"), 'activation must be "relu" or "tanh", got \'gelu'),
        (changed("char_cnn.filters", []), "filters must be a list of pairs"),
        (changed("char_cnn.filters", [[51, 4]]), r"pairs \[width, count\] with a width of 1 to 50"),
        (changed("char_cnn.filters", [[1]]), "filters must be pairs"),
        (changed("char_cnn.n_characters", 260), r"n_characters must be 262 \(261 in training\)"),
        (changed("char_cnn.embedding", 4), "embedding must be an object, got 4"),
        (changed("char_cnn.n_highway", -1), r"n_highway must be in \[0"),
        ({"lstm": CONTENT["lstm"]}, "n_tokens_vocab must be given"),
    ],
)
def test_invalid_options(content, message):
    with pytest.raises(ConfigurationError, match=message):
        ElmoOptions.from_dict(content)


def test_options_that_are_no_json(tmp_path):
    (tmp_path / "options.json").write_text("{")
    with pytest.raises(ConfigurationError, match="must be a JSON file"):
        ElmoOptions.from_file(tmp_path / "options.json")


def test_damaged_weights(tmp_path):
    models.model().save(tmp_path, form="hdf5")
    weights = tmp_path / "weights.hdf5"
    whole = weights.read_bytes()
    lstm = "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell"
    for change, message in (
        (lambda f: f.__delitem__(f"{lstm}/W_0"), f"must hold {lstm}/W_0 .*got none"),
        (lambda f: f.__delitem__("char_embed"), "char_embed of 261 or 262 rows, got 0"),
    ):
        weights.write_bytes(whole)
        with h5py.File(weights, "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=message):
            ElmoBiLm(tmp_path)
    weights.write_bytes(whole)
    with h5py.File(weights, "r+") as file:
        del file[f"{lstm}/B"]
        file[f"{lstm}/B"] = torch.zeros(95).numpy()
    with pytest.raises(ValueError, match=r"B as numbers of shape \(96,\) by the options, got"):
        ElmoBiLm(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="weight_file must be"):
        ElmoBiLm(tmp_path)
    weights.write_bytes(b"no hdf5 at all")
    with pytest.raises(ValueError, match="must be an hdf5 file"):
        ElmoBiLm(tmp_path)


def test_wrong_options_for_the_weights(tmp_path):
    models.model().save(tmp_path, form="hdf5")
    (tmp_path / "options.json").write_text(json.dumps(changed("lstm.dim", 25)))
    with pytest.raises(ValueError, match="by the options, got float32"):
        ElmoBiLm(tmp_path)
    with pytest.raises(ValueError, match="weights must be those of the options, got none for"):
        ElmoBiLm(options=models.options(), tensors={})
    tensors = initial_weights(models.options())
    tensors["_token_embedder._projection.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"_projection.bias must have shape \(8,\)"):
        ElmoBiLm(options=models.options(), tensors=tensors)


def test_state_dicts_without_an_elmo(tmp_path):
    models.model().save(tmp_path, form="hdf5")
    torch.save({"bert.weight": torch.ones(2)}, tmp_path / "other.th")
    with pytest.raises(ValueError, match="must hold an ELMo, got 1 other tensors"):
        ElmoBiLm(tmp_path / "options.json", tmp_path / "other.th")

    torch.save({"x": ElmoOptions}, tmp_path / "code.th")
    with pytest.raises(ValueError, match="nothing but tensors"):
        ElmoBiLm(tmp_path / "options.json", tmp_path / "code.th")


@pytest.mark.parametrize(
    "arguments",
    [(), ("https://example.org/options.json", "https://example.org/weights.hdf5"),
     ("no/options.json", "no/weights.hdf5"), ("no-such-directory",)],
)  # fmt: skip
@pytest.mark.parametrize("cls", [Elmo, ElmoBiLm, ElmoEmbedder, elmo.ElmoTokenEmbedder])
def test_without_files_the_error_names_both(cls, arguments):
    expected = "fetch <stem>_options.json and <stem>_weights.hdf5.*2x4096_512_2048cnn_2xhighway"
    with pytest.raises((ConfigurationError, FileNotFoundError), match=expected):
        cls(*arguments)


def test_directories_and_zips_of_the_nlpl_repository(tmp_path):
    model = models.model()
    model.save(tmp_path / "plain", form="hdf5")
    packed = tmp_path / "193.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "plain" / "options.json", "options.json")
        archive.write(tmp_path / "plain" / "weights.hdf5", "model.hdf5")
        archive.writestr("vocab.txt", "<S>\n</S>\n<UNK>\n")
        archive.writestr("meta.json", "{}")
    assert elmo.is_elmo(packed) and elmo.is_elmo(tmp_path / "plain")
    assert not elmo.is_elmo(tmp_path) and not elmo.is_elmo(tmp_path / "nothing")
    other = ElmoBiLm(packed)
    assert_same_weights(other, model)
    published = tmp_path / "published"
    published.mkdir()
    stem = "elmo_2x4096_512_2048cnn_2xhighway"
    (tmp_path / "plain" / "options.json").rename(published / f"{stem}_options.json")
    (tmp_path / "plain" / "weights.hdf5").rename(published / f"{stem}_weights.hdf5")
    assert ElmoBiLm(published).num_layers == 3
    (published / "more_options.json").write_text("{}")
    with pytest.raises(ValueError, match="must have one file of options"):
        ElmoBiLm(published)


def test_convert(tmp_path):
    models.model().save(tmp_path / "a", form="hdf5")
    elmo.convert(tmp_path / "a", tmp_path / "b")
    elmo.convert(tmp_path / "b", tmp_path / "c", form="hdf5")
    first, last = (h5py.File(tmp_path / name / "weights.hdf5") for name in "ac")
    names: list[str] = []
    first.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    assert len(names) == 1 + 6 + 8 + 2 + 12
    assert all((first[name][...] == last[name][...]).all() for name in names)
    with pytest.raises(ValueError, match='form must be "safetensors" or "hdf5"'):
        elmo.convert(tmp_path / "a", tmp_path / "d", form="onnx")


def test_the_published_size_has_93_6_million_parameters():
    filters = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    chosen = models.options(dim=4096, projection_dim=512, filters=filters, character_dim=16)
    with torch.device("meta"):
        count = sum(x.numel() for x in initial_weights(chosen).values())
    assert count == 93_600_848 + 16  # the row of padding is not in the file
