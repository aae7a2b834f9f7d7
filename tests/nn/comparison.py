"""torch.nn's modules beside ours: the same parameters, the same inputs, outputs and all gradients compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from tests.oracle import CAPS, assert_matches

DOUBLE = torch.float64
RUNS = 4


def twin(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both with the parameters of ours, redrawn so that no bias is zero and no norm trivial."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_equal(result: Tensor, expected: Tensor, name: str = "result") -> None:
    """float64: the two differ by rounding alone."""
    assert result.dtype == expected.dtype == DOUBLE and result.shape == expected.shape, name
    assert torch.isfinite(result).all(), name
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (result - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= CAPS[DOUBLE] * scale, f"{name}: {error:.3e}"


def gradients(
    module: nn.Module,
    call: Callable[..., tuple[Tensor, ...]],
    inputs: Iterable[Tensor],
    weights: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Outputs of call(module, *inputs), and the gradients of sum(weight * output) for all inputs and parameters."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    outputs = call(module, *inputs)
    sum((w.to(o.dtype) * o).sum() for w, o in zip(weights, outputs, strict=True)).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return found


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[..., tuple[Tensor, ...]],
    inputs: Iterable[Tensor],
) -> None:
    """Outputs and gradients: equal in float64; in float32 by the rule of the oracle.

    That rule is about one operator. In a module of many the error of a single result, or of a single run, is a matter
    of luck: so all results are judged together, each in units of its largest exact value, and torch's error is the
    largest of a few runs, which differ in the last bit of their inputs and parameters.
    """
    inputs = list(inputs)
    with torch.no_grad():
        weights = [torch.randn_like(o) for o in call(theirs, *inputs)]
    exact = gradients(theirs, call, inputs, weights)
    found = gradients(ours, call, inputs, weights)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert_equal(found[name], value, name)
    units = {name: value.abs().max().clamp(min=1e-30) for name, value in exact.items()}

    def single(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the module gives in float32, and what torch's gives for the same numbers in float64."""
        module, inputs = deepcopy(module).float(), [x.float() for x in inputs]
        rounded = deepcopy(theirs)
        rounded.load_state_dict(module.state_dict())
        results = gradients(module, call, inputs, weights)
        truth = gradients(rounded, call, [x.double() for x in inputs], weights)
        return together(results, units), together(truth, units)

    result, exact_result = single(ours, inputs)
    deviations = []
    for run in range(RUNS):
        nudged = deepcopy(theirs)
        with torch.no_grad():
            for parameter in nudged.parameters():
                parameter.copy_(nudge(parameter) if run else parameter)
        eager, truth = single(nudged, [nudge(x) if run else x for x in inputs])
        deviations.append(eager - truth)
    worst = max(deviations, key=lambda deviation: deviation.abs().max().item())
    assert_matches(result.float(), exact_result + worst, exact_result, name="float32")


def together(values: dict[str, Tensor], units: dict[str, Tensor]) -> Tensor:
    """All values in one vector of float64, in their units."""
    return torch.cat([(values[name].double() / unit).flatten() for name, unit in units.items()])


def nudge(x: Tensor) -> Tensor:
    """x with another last bit of float32 here and there."""
    return x * (1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(x) - 1))
