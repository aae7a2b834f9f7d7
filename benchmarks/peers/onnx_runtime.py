"""ONNX Runtime's CPU provider on the optimised BERT graph, float32, and int8 by its dynamic quantisation.

The graph is written with the fused operators (`com.microsoft`: EmbedLayerNormalization, Attention, BiasGelu,
SkipLayerNormalization) to which its own BERT optimiser rewrites an exported model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import scratch
from ..case import Candidate, Case, Unavailable
from ..plain_bert import Shape, read_weights
from ..workloads.bert import Batch, BertInputs
from .padded import Forward, variants

NAME = "onnxruntime"
_EXACT, _QUANTISED = "model.onnx", "int8.onnx"


def version() -> str:
    import onnx  # noqa: F401  the graph is written with it
    import onnxruntime

    return onnxruntime.__version__


def bert(case: Case) -> Iterator[Candidate]:
    import onnx

    inputs: BertInputs = case.inputs
    if inputs.shape.hidden_act != "gelu":
        raise Unavailable(f"its fused operators know gelu alone, not {inputs.shape.hidden_act}")
    directory = inputs.directory

    def write(folder: Path) -> None:
        path = folder / _EXACT
        onnx.save(build(inputs.shape, read_weights(directory, torch.float32)), path)
        _quantise(path)

    folder = scratch.converted(directory, NAME, write)
    exact, quantised = _forward(folder / _EXACT), _forward(folder / _QUANTISED)
    yield from variants(NAME, "ONNX Runtime", "float32", case, exact)
    yield from variants(NAME, "ONNX Runtime", "int8", case, quantised, layouts=("buckets",))


def _quantise(path: Path) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"DefaultTensorType": TensorProto.FLOAT}  # shape inference knows no fused operator
    logging.disable(logging.WARNING)  # it recommends preprocessing, which this graph has had
    try:
        quantize_dynamic(
            path,
            path.with_name(_QUANTISED),
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options=options,
        )
    finally:
        logging.disable(logging.NOTSET)


def _forward(path: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # its threads rest between calls, so that they do not disturb the peer that is measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(batch: Batch) -> Tensor:
        feed = {
            "input_ids": batch.ids.to(torch.int32).numpy(),
            "attention_mask": batch.mask.to(torch.int32).numpy(),
        }
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def build(shape: Shape, weights: Mapping[str, Tensor]) -> Any:
    """The ONNX model: input_ids and attention_mask int32 [B, S] -> last_hidden_state [B, S, hidden]."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    hidden, epsilon = shape.hidden_size, shape.layer_norm_eps

    def constant(name: str, value: Tensor) -> str:
        constants[name] = np.ascontiguousarray(value.numpy())
        return name

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        domain = "" if kind == "MatMul" else "com.microsoft"
        made = helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes)
        nodes.append(made)
        return outputs[0]

    def product(x: str, name: str) -> str:
        weight = constant(f"{name}.weight", weights[f"{name}.weight"].t())
        return node("MatMul", [x, weight], f"{name}.product")

    def parameters(name: str) -> list[str]:
        return [constant(f"{name}.{x}", weights[f"{name}.{x}"]) for x in ("weight", "bias")]

    def bias(name: str) -> str:
        return constant(f"{name}.bias", weights[f"{name}.bias"])

    tables = {
        x: weights[f"embeddings.{x}_embeddings.weight"] for x in ("word", "position", "token_type")
    }
    word = constant("word", tables["word"])
    position = constant("position", tables["position"] + tables["token_type"][0])
    embedding = [word, position, "", *parameters("embeddings.LayerNorm")]
    embedding = ["input_ids", "", *embedding]
    h = node("EmbedLayerNormalization", embedding, "embeddings", "mask_index", epsilon=epsilon)
    for i in range(shape.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        projections = [f"{layer}.attention.self.{x}" for x in ("query", "key", "value")]
        weight = torch.cat([weights[f"{name}.weight"] for name in projections]).t()
        qkv = [
            constant(f"{layer}.qkv.weight", weight),
            constant(
                f"{layer}.qkv.bias", torch.cat([weights[f"{name}.bias"] for name in projections])
            ),
        ]
        heads = shape.num_attention_heads
        context = node(
            "Attention", [h, *qkv, "attention_mask"], f"{layer}.context", num_heads=heads
        )
        for kind, source in (("attention.output", context), ("output", None)):
            if source is None:
                inner = product(h, f"{layer}.intermediate.dense")
                source = node(
                    "BiasGelu", [inner, bias(f"{layer}.intermediate.dense")], f"{layer}.gelu"
                )
            dense, norm = f"{layer}.{kind}.dense", parameters(f"{layer}.{kind}.LayerNorm")
            summands = [product(source, dense), h, *norm, bias(dense)]
            h = node("SkipLayerNormalization", summands, f"{layer}.{kind}", epsilon=epsilon)
    grid = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "bert",
        [
            helper.make_tensor_value_info(name, TensorProto.INT32, grid)
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info(h, TensorProto.FLOAT, [*grid, hidden])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)
