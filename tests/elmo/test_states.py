"""What is carried from call to call."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops
from ctxfast.elmo import Elmo, ElmoBiLm, ElmoLstm, LstmCellWithProjection, batch_to_ids
from tests.elmo import models
from tests.elmo.models import SENTENCES
from tests.oracle import assert_matches

IDS = batch_to_ids(SENTENCES)


def lstm(**changes) -> ElmoLstm:
    torch.manual_seed(3)
    return ElmoLstm(
        6, 5, 9, 2, memory_cell_clip_value=2.0, state_projection_clip_value=0.4, **changes
    )


def run(module, batch, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, 7, 6, generator=generator)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    return module(inputs, mask)


def test_states_grow_shrink_and_stay():
    module = lstm()
    assert module._states is None and module.stateful is True
    run(module, 2, [7, 3])
    assert [x.shape for x in module._states] == [(2, 2, 10), (2, 2, 18)]
    first = module.get_states()
    run(module, 5, [7, 1, 2, 3, 4])
    assert [x.shape[1] for x in module._states] == [5, 5]
    large = module.get_states()
    run(module, 2, [2, 2], seed=5)
    assert [x.shape[1] for x in module._states] == [5, 5]
    assert torch.equal(module._states[0][:, 2:], large[0][:, 2:])
    assert not torch.equal(module._states[0][:, :2], large[0][:, :2])
    other = lstm()  # rows beyond those that had states start from zero
    other.set_states(first)
    got = run(other, 5, [7, 1, 2, 3, 4])
    fresh = run(lstm(), 5, [7, 1, 2, 3, 4])
    assert torch.equal(got[:, 2:], fresh[:, 2:]) and not torch.equal(got[:, :2], fresh[:, :2])


def test_rows_without_tokens_keep_their_state_and_give_zero():
    module = lstm()
    run(module, 3, [4, 5, 6])
    before = module.get_states()
    output = run(module, 3, [2, 0, 7], seed=1)
    assert not output[:, 1].any()
    assert torch.equal(module._states[0][:, 1], before[0][:, 1])
    assert torch.equal(module._states[1][:, 1], before[1][:, 1])
    assert not torch.equal(module._states[0][:, 0], before[0][:, 0])


def test_states_are_those_of_one_long_sequence_in_the_forward_direction():
    inputs, ones = torch.randn(1, 10, 6), torch.ones(1, 10)
    module = lstm()
    parts = [module(inputs[:, a:b], ones[:, a:b]) for a, b in ((0, 4), (4, 10))]
    with ops.use_backend("reference"):
        eager, exact = lstm()(inputs, ones), lstm().double()(inputs.double(), ones)
    assert_matches(torch.cat(parts, 2)[..., :5], eager[..., :5], exact[..., :5])


def test_reset_states():
    module = lstm()
    module.reset_states()
    run(module, 3, [4, 5, 6])
    before = module.get_states()
    module.reset_states(torch.tensor([False, True, False]))
    assert not module._states[0][:, 1].any() and not module._states[1][:, 1].any()
    assert torch.equal(module._states[0][:, ::2], before[0][:, ::2])
    with pytest.raises(ValueError, match=r"mask must be \[3\].*got shape \(2,\)"):
        module.reset_states(torch.tensor([True, False]))
    module.reset_states()
    assert module._states is None


def test_modes():
    model = models.model()
    first = model(IDS)["activations"][2]
    assert not torch.allclose(model(IDS)["activations"][2], first)  # carried
    for reset in (False, "reset"):
        model.stateful = reset
        assert model.stateful is False
        assert torch.equal(model(IDS)["activations"][2], first)
        assert torch.equal(model(IDS)["activations"][2], first)
    model.stateful = "warm"
    warm = model(IDS)["activations"][2]
    assert not torch.allclose(warm, first)
    assert torch.equal(model(IDS)["activations"][2], warm)
    model.stateful = "carry"
    assert model.stateful is True
    with pytest.raises(ValueError, match="stateful must be True, False, 'carry'.*got 'cold'"):
        model.stateful = "cold"


def test_warm_states_are_the_same_for_every_row_and_call(tmp_path):
    models.model().save(tmp_path)
    model = Elmo(tmp_path, None, 1, dropout=0.0)
    model.warmup(batch_to_ids([["Some", "typical", "words", "."]]), repeats=2)
    assert model.stateful == "warm"
    states = model._elmo_lstm._elmo_lstm.get_states()
    together = model(IDS)["elmo_representations"][0]
    eager, exact = Elmo(tmp_path, None, 1, dropout=0.0), Elmo(tmp_path, None, 1, dropout=0.0)
    with ops.use_backend("reference"):
        alone = []
        for other in (eager, exact.double()):
            other._elmo_lstm._elmo_lstm.set_states(states)
            other.stateful = "warm"
            alone.append(other(IDS[1:2])["elmo_representations"][0])
    assert_matches(together[1:2], *alone)
    assert torch.equal(model(IDS)["elmo_representations"][0], together)
    kept = model._elmo_lstm._elmo_lstm.get_states()
    assert all(torch.equal(a, b) for a, b in zip(states, kept, strict=True))


def test_set_states_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"h must be \[2, rows, 10\], got shape \(1, 2, 10\)"):
        lstm().set_states((torch.zeros(1, 2, 10), torch.zeros(2, 2, 18)))
    with pytest.raises(ValueError, match="must be"):
        lstm().set_states((torch.zeros(2, 3, 10), torch.zeros(2, 2, 18)))


def test_states_move_with_the_module_and_stay_out_of_the_state_dict():
    model = models.model()
    names = set(model.state_dict())
    model(IDS)
    assert set(model.state_dict()) == names
    model.double()
    assert [x.dtype for x in model._elmo_lstm._states] == [torch.float64] * 2
    model(IDS)
    model.to("meta")
    assert model._elmo_lstm._states[0].is_meta


def test_states_of_inference_mode_serve_training():
    model = models.model()
    with torch.inference_mode():
        model(IDS)
    model.requires_grad_(True)
    model(IDS)["activations"][2].sum().backward()
    assert not model._elmo_lstm._states[0].requires_grad


def test_carried_in_training_and_evaluation_alike():
    outputs = []
    for training in (True, False):
        model = models.model().train(training)
        model(IDS)
        outputs.append(model(IDS)["activations"][2])
    assert torch.equal(*outputs)


def test_layers_that_are_not_computed_keep_their_states():
    model = models.model()
    model(IDS)
    before = model._elmo_lstm.get_states()
    model.layers(IDS, num_layers=2)
    after = model._elmo_lstm.get_states()
    assert torch.equal(before[0][1], after[0][1]) and not torch.equal(before[0][0], after[0][0])
    with pytest.raises(ValueError, match=r"num_layers must be in \[1, 3\], got 4"):
        model.layers(IDS, num_layers=4)


@pytest.mark.parametrize("forward", [True, False])
def test_cell_with_projection(forward):
    torch.manual_seed(1)
    cell = LstmCellWithProjection(6, 5, 9, forward, 0.0, 2.0, 0.4)
    assert set(cell.state_dict()) == {
        "input_linearity.weight",
        "state_linearity.weight",
        "state_linearity.bias",
        "state_projection.weight",
    }
    bias = cell.state_linearity.bias
    assert bias[9:18].eq(1).all() and bias[:9].eq(0).all() and bias[18:].eq(0).all()
    inputs = torch.randn(2, 4, 6)
    output, (h, c) = cell(inputs, [4, 2])
    assert output.shape == (2, 4, 5) and h.shape == (1, 2, 5) and c.shape == (1, 2, 9)
    assert not output[1, 2:].any() and output.abs().max() <= 0.4
    last = output[0, -1 if forward else 0]
    assert torch.equal(h[0, 0], last)
    more, _ = cell(inputs, [4, 2], (h, c))
    assert not torch.allclose(more, output)


def test_recurrent_dropout_is_one_mask_a_row():
    torch.manual_seed(1)
    cell = LstmCellWithProjection(6, 50, 9, recurrent_dropout_probability=0.5)
    output, _ = cell(torch.randn(3, 4, 6), [4, 4, 4])
    dropped = output == 0
    assert torch.equal(dropped[:, :1].expand_as(dropped), dropped)
    assert 0.3 < dropped.float().mean() < 0.7 and not torch.equal(dropped[0], dropped[1])
    cell.eval()
    assert not (cell(torch.randn(3, 4, 6), [4, 4, 4])[0] == 0).any()


def test_load_weights_of_the_lstm_alone(tmp_path):
    model = models.model()
    model.save(tmp_path, form="hdf5")
    module = ElmoLstm(8, 8, 24, 2, requires_grad=True)
    module.load_weights(tmp_path / "weights.hdf5")
    for name, value in model._elmo_lstm.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert all(p.requires_grad for p in module.parameters())


def test_data_parallel_replicas_have_their_mix():
    """A replica holds its parameters as plain attributes, as torch.nn.parallel.replicate leaves them."""
    model = Elmo(None, None, 1, module=models.model(), dropout=0.0)
    mix = model.scalar_mix_0.scalar_parameters
    values = [mix[j].detach().clone() for j in range(3)]
    replica = mix._replicate_for_data_parallel()
    for j, value in enumerate(values):
        setattr(replica, str(j), value)
    assert [float(x) for x in replica] == [0.0] * 3 and len(replica) == 3
    assert isinstance(model._elmo_lstm, ElmoBiLm)
