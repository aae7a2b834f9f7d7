"""OpenVINO's CPU plugin, float32 and bfloat16, converted from the transformers model; int8 by its dynamic
quantisation, for which the weights of the linear layers are rounded to 8 bits, one scale for each output channel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..case import Candidate, Case
from ..workloads.bert import Batch, BertInputs
from . import huggingface
from .padded import Forward, variants

NAME = "openvino"
_PRECISION = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
_GROUP = 128  # of an activation row, with one scale each: the fastest here of 32, 128, 384, 768


def version() -> str:
    import openvino

    huggingface.version()  # the model comes from there
    return openvino.__version__


def bert(case: Case) -> Iterator[Candidate]:
    import openvino

    model = convert(case.inputs)
    for dtype in case.dtypes:
        compiled = openvino.compile_model(model, "CPU", settings(dtype))
        yield from variants(NAME, "OpenVINO", dtype, case, _forward(compiled))
    round_weights(model)
    compiled = openvino.compile_model(model, "CPU", settings("int8"))
    yield from variants(NAME, "OpenVINO", "int8", case, _forward(compiled), layouts=("buckets",))


def settings(dtype: str) -> dict[str, Any]:
    """One stream with torch's number of threads: the batch is done as one piece, as everywhere else."""
    quantised = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP} if dtype == "int8" else {}
    return quantised | {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
    }


def _forward(compiled: Any) -> Forward:
    def forward(batch: Batch) -> Tensor:
        outputs = compiled([batch.ids.numpy(), batch.mask.long().numpy()])
        return torch.from_numpy(outputs[0])

    return forward


def convert(inputs: BertInputs) -> Any:
    """The OpenVINO model of a case, any batch size and length."""
    import openvino

    model = huggingface.load(inputs, "float32", "sdpa")

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return outputs.last_hidden_state

    ids = torch.ones(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with warnings.catch_warnings(), huggingface.quiet():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch of the model
        return openvino.convert_model(LastHiddenState(), example_input=(ids, mask))


def round_weights(model: Any) -> None:
    """Replace the weight [N, K] of every linear layer by 8-bit integers times a scale, which the plugin recognises."""
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
            continue
        source = node.input_value(1).get_node()
        if source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        if source.get_type_name() != "Constant" or len(source.get_output_shape(0)) != 2:
            continue
        weight = source.get_data().astype(np.float32)
        scale = np.abs(weight).max(1, keepdims=True).clip(1e-30) / 127.0
        rounded = opset13.constant(np.round(weight / scale).astype(np.int8))
        product = opset13.multiply(opset13.convert(rounded, "f32"), opset13.constant(scale))
        node.input(1).replace_source_output(product.output(0))
    model.validate_nodes_and_infer_types()
