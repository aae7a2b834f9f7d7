"""The gate before the clock: planted faults of every kind, in operators and in a whole BERT, are refused."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops
from ctxfast.benchmarks import checks, peers, runner, timing, workloads
from ctxfast.benchmarks.ceilings import Ceilings
from ctxfast.benchmarks.peers import own
from ctxfast.ops import _native
from ctxfast.ops.linear_int8 import int8_unavailable_reason

NO_CEILINGS = Ceilings({}, {})


def run(case):
    """The case measured with ctxfast and eager alone, two rounds."""
    options = runner.Options(size="tiny", repeats=2)
    found = [p for p in peers.find(()) if p.name in (peers.OWN, peers.EAGER)]
    return runner.run_case(case, options, found, NO_CEILINGS)


def mine(result):
    return {r.dtype: r for r in result.results if r.peer == peers.OWN}


def find_case(workload, name):
    return next(case for case in workloads.cases(workload, "tiny") if name in case.name)


def wrong_sign(output):
    return -output


def one_wrong_sign(output):
    output = output.clone()
    output[-1] = -output[-1]
    return output


def uninitialised_row(output):
    fresh = torch.empty_like(output)
    fresh[:-1] = output[:-1]
    return fresh


def stale_row(output):
    """A row that an earlier call left behind."""
    output = output.clone()
    output[-1] = output[0]
    return output


FAULTS = [wrong_sign, one_wrong_sign, uninitialised_row, stale_row]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("workload", "name", "operator"),
    [
        ("attention", "sms_spam", "attention_varlen"),
        ("attention", "dense", "attention"),
        ("linear", "gelu-48", "linear"),
        ("layer-norm", "", "add_layer_norm"),
    ],
)
def test_a_faulty_operator_gets_no_time(monkeypatch, fault, workload, name, operator):
    real = getattr(ops, operator)
    monkeypatch.setattr(own.ops, operator, lambda *args, **kwargs: fault(real(*args, **kwargs)))
    result = run(find_case(workload, name))
    assert {r.status for r in mine(result).values()} == {"refused"}
    assert all(r.seconds is None and not r.samples and r.reason for r in mine(result).values())
    assert result.find("eager") is not None


@pytest.mark.parametrize(
    ("workload", "name"),
    [("attention", "sms_spam"), ("attention", "dense"), ("linear", "gelu-48"), ("layer-norm", "")],
)
def test_the_right_operator_gets_its_time(workload, name):
    result = mine(run(find_case(workload, name)))
    assert {r.status for r in result.values()} == {"ok"}
    assert all(len(r.samples) == 2 and r.speedup for r in result.values())


def test_missing_mask_in_attention_is_refused(monkeypatch):
    """Sequences that see their neighbours: one segment over all packed tokens."""
    real = ops.attention_varlen

    def blind(query, key, value, **arguments):
        total = query.shape[0]
        offsets = torch.tensor([0, total], dtype=torch.int32)
        arguments |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)
        arguments |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), total)
        return real(query, key, value, **arguments)

    monkeypatch.setattr(own.ops, "attention_varlen", blind)
    result = mine(run(find_case("attention", "sms_spam")))
    assert {r.status for r in result.values()} == {"refused"}


@pytest.mark.parametrize(
    ("name", "operator"),
    [("train-sms_spam", "attention_varlen"), ("train-dense", "attention")],
)
def test_a_faulty_gradient_of_attention_is_refused(monkeypatch, name, operator):
    """The output is right and the gradients are 5 % too large."""
    real = getattr(ops, operator)

    def scaled(*args, **kwargs):
        output = real(*args, **kwargs)
        return output.detach() + 1.05 * (output - output.detach())

    case = find_case("attention", name)
    assert {r.status for r in mine(run(case)).values()} == {"ok"}
    monkeypatch.setattr(own.ops, operator, scaled)
    assert mine(run(case))["float32"].status == "refused"


BERT_FAULTS = {
    "no mask": lambda model, ids, mask: model(ids, None),
    "mask of the neighbour": lambda model, ids, mask: model(ids, mask.roll(1, 0)),
    "segments": lambda model, ids, mask: model(ids, mask, torch.ones_like(ids)),
    "one id": lambda model, ids, mask: model(torch.where(ids == ids[0, 0], 1, ids), mask),
}


@pytest.mark.parametrize("fault", BERT_FAULTS.values(), ids=BERT_FAULTS)
def test_a_faulty_model_gets_no_time(monkeypatch, fault):
    from ctxfast.bert import BertModel

    def faulty(self, input_ids, attention_mask):
        monkeypatch.setattr(BertModel, "forward", real)
        try:
            return fault(self, input_ids, attention_mask)
        finally:
            monkeypatch.setattr(BertModel, "forward", faulty)

    real = BertModel.forward
    monkeypatch.setattr(BertModel, "forward", faulty)
    result = mine(run(find_case("bert-inference", "")))
    assert {r.status for r in result.values()} == {"refused"}, result
    assert all(r.seconds is None for r in result.values())


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.LayerNorm.bias",
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.1.attention.self.query.bias",
        "encoder.layer.1.output.dense.bias",
    ],
)
def test_every_parameter_counts(monkeypatch, name):
    """The random weights are such that a lost parameter changes the output beyond what any dtype allows."""
    from ctxfast.bert import BertModel

    real = BertModel.from_pretrained

    def without(*args, **kwargs):
        model = real(*args, **kwargs)
        model.get_parameter(name).data.zero_()
        return model

    monkeypatch.setattr(BertModel, "from_pretrained", without)
    result = mine(run(find_case("bert-inference", "")))
    assert {r.status for r in result.values()} == {"refused"}, result


def one_channel_fourfold(weight):
    weight.scales[0] *= 4.0
    weight.sums[0] *= 4.0


def scales_of_the_neighbours(weight):
    weight.sums[:] = weight.sums / weight.scales * weight.scales.roll(1)
    weight.scales[:] = weight.scales.roll(1)


def no_sums(weight):
    weight.sums.zero_()


@pytest.mark.parametrize("fault", [one_channel_fourfold, scales_of_the_neighbours, no_sums])
@pytest.mark.parametrize("which", range(8))
def test_a_faulty_scale_of_8_bits_is_refused(monkeypatch, fault, which):
    """In one of the four weights of one of the two layers; the other dtypes get their times."""
    if int8_unavailable_reason() is not None:
        pytest.skip(int8_unavailable_reason())
    real, quantized = ops.quantize_weight, []

    def faulty(weight):
        quantized.append(real(weight))
        if len(quantized) == which + 1:
            fault(quantized[-1])
        return quantized[-1]

    monkeypatch.setattr(ops, "quantize_weight", faulty)
    result = mine(run(find_case("bert-inference", "")))
    assert len(quantized) == 8
    outcomes = {dtype: r.status for dtype, r in result.items()}
    assert outcomes == {dtype: "refused" if dtype == "int8" else "ok" for dtype in outcomes}, result


@pytest.mark.skipif(
    not _native.available() or _native.isa() != "amx", reason="no products of fewer parts here"
)
def test_less_precision_than_was_allowed_is_refused(monkeypatch):
    monkeypatch.setitem(_native._FLOAT_PARTS, "tf32", 1)
    outcomes = {dtype: r.status for dtype, r in mine(run(find_case("bert-inference", ""))).items()}
    assert outcomes == {dtype: "refused" if dtype == "tf32" else "ok" for dtype in outcomes}


def test_uninitialised_row_of_layers_that_are_one_call_is_refused(monkeypatch):
    """What is timed is checked, too, not only the calls of the parts that the record sees."""
    from ctxfast.nn.encoder_layer import EncoderRun

    real, calls = EncoderRun.stack, []

    def unfinished(self, layers, hidden):
        calls.append(1)
        return uninitialised_row(real(self, layers, hidden))

    monkeypatch.setattr(EncoderRun, "stack", unfinished)
    result = mine(run(find_case("bert-inference", "")))
    if not calls:
        pytest.skip("no native layers here")
    assert result["float32"].status == "refused" and "not finite" in result["float32"].reason


def test_the_right_model_gets_its_time():
    result = mine(run(find_case("bert-inference", "")))
    assert {r.status for r in result.values()} == {"ok"}, result


@pytest.mark.unpoisoned
def test_memory_is_poisoned_during_the_check_alone():
    with checks.poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_candidate_that_goes_wrong_while_it_is_timed_is_refused(monkeypatch):
    real, calls = ops.add_layer_norm, []

    def wears_out(*args, **kwargs):
        calls.append(1)
        output = real(*args, **kwargs)
        return output if len(calls) < 6 else -output

    monkeypatch.setattr(own.ops, "add_layer_norm", wears_out)
    result = mine(run(find_case("layer-norm", "")))
    assert {r.status for r in result.values()} == {"refused"}
    assert all(r.seconds is None for r in result.values())


def test_the_strict_rule_is_twice_the_eager_error():
    truth = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).reshape(8, 8)
    eager = checks.Deviation(max=1e-6, rms=1e-6)
    ulp = torch.finfo(torch.float32).eps
    inside, outside = 1.99 * (1e-6 + ulp), 2.01 * (1e-6 + ulp)
    assert checks.check(truth + inside, truth, "float32", eager=eager).max == pytest.approx(inside)
    with pytest.raises(checks.WrongResult, match="twice that of the eager path"):
        checks.check(truth + outside, truth, "float32", eager=eager)
    assert checks.check(truth + outside, truth, "float32").max == pytest.approx(outside)


def test_the_cap_holds_where_the_eager_path_is_bad():
    truth = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(checks.WrongResult, match="at most 2.00e-05"):
        checks.check(truth + 1e-3, truth, "float32", eager=checks.Deviation(1.0, 1.0))
    with pytest.raises(checks.WrongResult, match="shape"):
        checks.check(truth[:3], truth, "float32")


def test_8_bits_are_measured_by_the_emulation_and_by_angles():
    result = run(find_case("bert-inference", ""))
    eager = next(r for r in result.results if r.key == "eager · int8")
    assert eager.error is not None and eager.seconds is None and eager.status == "ok"
    assert 0.99 < eager.error.cosine_min < eager.error.cosine_mean < 1.0
    assert result.find("eager").error.cosine_min is None
    own = mine(result)["int8"].error
    assert 0.5 * eager.error.rms < own.rms < 1.5 * eager.error.rms


def test_cosines_are_those_of_rows():
    truth = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    error = checks.deviation(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), truth, angles=True)
    assert error.cosine_min == pytest.approx(0.5**0.5) and error.max == 1.0
    assert error.cosine_mean == pytest.approx((1.0 + 0.5**0.5) / 2)


def test_a_noisy_machine_is_marked(monkeypatch):
    monkeypatch.setattr(timing._CpuLoad, "foreign_share", lambda self: 0.5)
    assert run(find_case("layer-norm", "")).noisy
