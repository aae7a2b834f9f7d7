"""ctxfast.accelerate and its relatives: one line for the model that people already have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ctxfast.integrations._families import SUPPORTED, family_of
from ctxfast.integrations._swap import Options, is_accelerated, state_of, swap, swap_back
from ctxfast.integrations._targets import head_forward, model_forward
from ctxfast.nn import packed_linear
from ctxfast.ops.linear_int8 import int8_unavailable_reason

M = TypeVar("M")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerate(
    model: M,
    *,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    unpad: bool = True,
    cuda_graphs: bool = False,
) -> M:
    """Makes every supported encoder inside `model` fast, in place, for inference and training; returns `model`.

    model: a module of transformers, anything that holds one (SentenceTransformer, CrossEncoder, SparseEncoder, a
           module of your own), or a pipeline
    dtype: what the layers compute in, by default the type of the parameters; float32, bfloat16 or float16. Parameters,
           outputs, model.dtype and state_dict keep theirs
    quantization: None, or "int8": products of 8-bit integers, one scale for each output channel and for each token,
           taken at run time; on a CPU, for inference: a call in training mode or with gradients raises RuntimeError
    unpad: compute valid tokens only. Outputs are those of each sentence alone and zero in padding; logits of question
           answering are the lowest value of their type there; labels in padding count as -100. False computes padded
           rows as well and gives what transformers gives for the padded batch
    cuda_graphs: capture the layers of short calls without gradients as CUDA graphs, one for each bucket of tokens,
           sequences and lengths, and launch these; longer calls, and those that want attention weights, hidden states
           or a 4-dimensional mask, launch their kernels one by one. Not yet run on a GPU

    Names of modules, state_dict, configuration, signature and save_pretrained stay as they are; `restore` undoes it.
    Accelerating twice replaces the options. `ctxfast.explain(model)` says which layers are fused, and why others not.

    Raises ValueError where no supported encoder is inside, for decoders, for ONNX and OpenVINO backends, where 8-bit
    products are not available, and for cuda_graphs where the model is not on a CUDA device.
    """
    options = _options(dtype, quantization, unpad, cuda_graphs)
    root = _module(model, "accelerate")
    encoders, refused = _encoders(root)
    if not encoders:
        raise ValueError(_nothing_found(model, root, refused))
    if quantization is not None:
        _require_int8(encoders, dtype)
    if cuda_graphs:
        _require_cuda(encoders)
    for module in encoders:
        swap(module, model_forward(type(module)), options)
    for module in root.modules():
        if is_accelerated(module):
            if module not in encoders:
                swap(module, None, options)
            continue
        forward = head_forward(type(module))
        if forward is not None and any(map(is_accelerated, module.children())):
            swap(module, forward, options)
    return model


def restore(model: M) -> M:
    """Gives every accelerated module in `model` its stock class back; returns `model`."""
    for module in list(_module(model, "restore").modules()):
        if is_accelerated(module):
            swap_back(module)
    return model


def refresh(model: M) -> M:
    """Forgets every packed weight in `model`, after a write that nothing announced; returns `model`."""
    root = _module(model, "refresh")
    packed_linear.refresh(root)
    for module in root.modules():
        if is_accelerated(module):
            state_of(module).drop()
    return model


@contextlib.contextmanager
def accelerated(
    model: M,
    *,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    unpad: bool = True,
    cuda_graphs: bool = False,
) -> Iterator[M]:
    """`accelerate` inside a `with` block; afterwards the model is as it was, accelerated or not."""
    root = _module(model, "accelerated")
    before = {m: state_of(m).options for m in root.modules() if is_accelerated(m)}
    try:
        yield accelerate(
            model, dtype=dtype, quantization=quantization, unpad=unpad, cuda_graphs=cuda_graphs
        )
    finally:
        for module in list(root.modules()):
            if module in before:
                swap(module, None, before[module])
            elif is_accelerated(module):
                swap_back(module)


def _options(
    dtype: torch.dtype | None, quantization: str | None, unpad: bool, cuda_graphs: bool
) -> Options:
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(str(allowed) for allowed in _DTYPES)
        raise ValueError(f"accelerate: dtype must be None or one of {names}, got {dtype!r}")
    if quantization not in (None, "int8"):
        raise ValueError(f"accelerate: quantization must be None or 'int8', got {quantization!r}")
    for name, value in (("unpad", unpad), ("cuda_graphs", cuda_graphs)):
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} must be a bool, got {type(value).__name__}")
    return Options(dtype, quantization, unpad, cuda_graphs)


def _require_int8(encoders: list[nn.Module], dtype: torch.dtype | None) -> None:
    """Raises ValueError where these encoders cannot compute in 8-bit integers."""
    reason = int8_unavailable_reason()
    for parameter in (p for module in encoders for p in module.parameters()):
        if parameter.device.type not in ("cpu", "meta"):
            reason = f"it computes on a CPU, and the model is on {parameter.device.type}"
        elif (dtype or parameter.dtype) == torch.float16:
            reason = "beside it a layer computes in float32 or bfloat16, not in torch.float16"
    if reason is not None:
        raise ValueError(f"accelerate: quantization='int8' is not available here: {reason}")


def _require_cuda(encoders: list[nn.Module]) -> None:
    """Raises ValueError unless graphs of these encoders can be captured."""
    for parameter in (p for module in encoders for p in module.parameters()):
        if parameter.device.type != "cuda":
            raise ValueError(
                f"accelerate: cuda_graphs=True needs the model on a CUDA device, got {parameter.device}"
            )


def _module(model: Any, function: str) -> nn.Module:
    """The module itself, or the one that a pipeline holds."""
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    for found in (model, root):
        backend = getattr(found, "backend", None)
        if backend in ("onnx", "openvino") or type(found).__module__.startswith("optimum."):
            raise ValueError(
                f"{function}: the model runs on {backend or type(found).__module__}, not on PyTorch; "
                "load it with backend='torch'"
            )
    if not isinstance(root, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch module or a pipeline that holds one, got {type(model).__name__}"
        )
    return root


def _encoders(root: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """Every encoder to accelerate, and what else there is with the reason why not."""
    encoders, refused = [], []
    for module in root.modules():
        cls = type(module)
        if family_of(cls) is None:
            continue
        config: Any = module.config
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            refused.append(f"{cls.__name__} is a decoder or has cross attention")
        elif is_accelerated(module) or model_forward(cls) is not None:
            encoders.append(module)
        else:
            refused.append(f"{cls.__name__} has a forward of its own")
    return encoders, refused


def _nothing_found(model: Any, root: nn.Module, refused: list[str]) -> str:
    if refused:
        return f"accelerate: nothing to accelerate: {'; '.join(dict.fromkeys(refused))}"
    types = {getattr(getattr(m, "config", None), "model_type", None) for m in root.modules()}
    found = ", ".join(sorted(map(repr, types - {None}))) or type(model).__name__
    return f"accelerate: model must hold an encoder of {SUPPORTED}, got {found}"
