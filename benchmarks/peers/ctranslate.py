"""CTranslate2: its own encoder runtime, float32 and int8. It removes the padding itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import scratch
from ..case import Candidate, Case
from ..plain_bert import Shape, read_weights
from ..workloads.bert import Batch, BertInputs

NAME = "ctranslate2"
_ACTIVATIONS = {"gelu": "GELU", "gelu_new": "GELUTanh", "relu": "RELU"}


def library() -> Any:
    """ctranslate2 with the OpenMP library that it brings.

    Otherwise its symbols are found in torch's, which is global. That one would count the threads of both, and because
    they are more than the processors, let the workers of both sleep between parallel regions instead of spin: 60
    microseconds a region for everybody in the process.
    """
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        import ctranslate2
    finally:
        sys.setdlopenflags(flags)
    return ctranslate2


def version() -> str:
    return library().__version__


def bert(case: Case) -> Iterator[Candidate]:
    ctranslate2 = library()
    inputs: BertInputs = case.inputs
    directory = inputs.directory

    def write(folder: Path) -> None:
        convert(inputs.shape, read_weights(directory, torch.float32)).save(str(folder))

    folder = scratch.converted(directory, NAME, write)
    encoders = {
        dtype: ctranslate2.Encoder(
            str(folder),
            device="cpu",
            compute_type=dtype,
            intra_threads=torch.get_num_threads(),
            inter_threads=1,
        )
        for dtype in ("float32", "int8")
    }
    for dtype, encoder in encoders.items():
        yield _candidate(inputs, dtype, encoder)


def _candidate(inputs: BertInputs, dtype: str, encoder: Any) -> Candidate:
    sentences = [_sentences(batch) for batch in inputs.batches]

    def result(outputs: list[Any]) -> Tensor:
        return inputs.valid([torch.from_numpy(np.array(o.last_hidden_state)) for o in outputs])

    return Candidate(
        peer=NAME,
        label="CTranslate2",
        dtype=dtype,
        run=lambda: [encoder.forward_batch(batch) for batch in sentences],
        result=result,
    )


def _sentences(batch: Batch) -> list[list[int]]:
    rows = zip(batch.ids.tolist(), batch.lengths, strict=True)
    return [ids[:length] for ids, length in rows]


def convert(shape: Shape, weights: Mapping[str, Tensor]) -> Any:
    """CTranslate2's description of the encoder with these weights.

    Its converter for transformers models reads attributes that transformers 5 no longer has.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    encoder = transformer_spec.TransformerEncoderSpec(
        shape.num_hidden_layers,
        shape.num_attention_heads,
        pre_norm=False,
        activation=getattr(common_spec.Activation, _ACTIVATIONS[shape.hidden_act]),
        layernorm_embedding=True,
        num_source_embeddings=2,
        embeddings_merge=common_spec.EmbeddingsMerge.ADD,
    )
    encoder.scale_embeddings = False

    def array(*names: str) -> Any:
        return np.concatenate([weights[name].numpy() for name in names])

    def linear(target: Any, *names: str) -> None:
        target.weight = array(*(f"{name}.weight" for name in names))
        target.bias = array(*(f"{name}.bias" for name in names))

    def norm(target: Any, name: str) -> None:
        target.gamma, target.beta = array(f"{name}.weight"), array(f"{name}.bias")

    encoder.embeddings[0].weight = array("embeddings.word_embeddings.weight")
    encoder.embeddings[1].weight = array("embeddings.token_type_embeddings.weight")
    encoder.position_encodings.encodings = array("embeddings.position_embeddings.weight")
    norm(encoder.layernorm_embedding, "embeddings.LayerNorm")
    for i, layer in enumerate(encoder.layer):
        name = f"encoder.layer.{i}"
        projections = [f"{name}.attention.self.{x}" for x in ("query", "key", "value")]
        linear(layer.self_attention.linear[0], *projections)
        linear(layer.self_attention.linear[1], f"{name}.attention.output.dense")
        norm(layer.self_attention.layer_norm, f"{name}.attention.output.LayerNorm")
        linear(layer.ffn.linear_0, f"{name}.intermediate.dense")
        linear(layer.ffn.linear_1, f"{name}.output.dense")
        norm(layer.ffn.layer_norm, f"{name}.output.LayerNorm")
    specification = transformer_spec.TransformerEncoderModelSpec(encoder)
    specification.register_vocabulary([f"token{i}" for i in range(shape.vocab_size)])
    specification.config.layer_norm_epsilon = shape.layer_norm_eps
    specification.config.unk_token = "token0"
    specification.validate()
    specification.optimize()
    return specification
