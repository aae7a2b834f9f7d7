"""One step of BERT's pretraining on a ragged batch: both losses, all gradients, AdamW.

The timed step has dropout, as training has. What is checked is the same step without it: the loss, and the gradients of
parameters from one end of the model to the other, against float64 on each text alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lengths as length_sets
from ..case import Case
from ..plain_bert import Shape, alone, write_weights
from .bert import SHAPES, Batch, make_batch

IGNORED = -100
LEARNING_RATE = 1e-4
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class PretrainingInputs:
    """A directory with both heads, and one batch; labels [B, S] are -100 but at one token in seven, following [B]."""

    make_directory: Callable[[], Path]
    shape: Shape
    batch: Batch
    labels: Tensor
    following: Tensor

    @property
    def directory(self) -> Path:
        return self.make_directory()

    @property
    def checked(self) -> list[str]:
        """Names of the parameters whose gradients are compared."""
        last = self.shape.num_hidden_layers - 1
        return [
            "bert.embeddings.LayerNorm.weight",
            "bert.encoder.layer.0.attention.self.query.weight",
            f"bert.encoder.layer.{last}.attention.self.value.weight",
            f"bert.encoder.layer.{last}.output.dense.weight",
            "bert.pooler.dense.weight",
            "cls.predictions.transform.dense.weight",
            "cls.predictions.bias",
        ]

    def arguments(self) -> dict[str, Tensor]:
        """Of a forward call."""
        return {
            "input_ids": self.batch.ids,
            "attention_mask": self.batch.mask.long(),
            "labels": self.labels,
            "next_sentence_label": self.following,
        }

    def result(self, loss: Tensor, gradient: Callable[[str], Tensor]) -> Tensor:
        """[N]: what is compared, of a step without dropout."""
        parts = [loss.detach().view(1), *(gradient(name).flatten() for name in self.checked)]
        return torch.cat(parts)


def step(model: Any, inputs: PretrainingInputs) -> Callable[[], float]:
    """The step that is timed, on a model with the interface of transformers.BertForPreTraining."""
    arguments = inputs.arguments()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True
    )

    def run() -> float:
        with torch.inference_mode(False), torch.enable_grad():
            loss = model(**arguments).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

    return run


def checked_step(model: Any, inputs: PretrainingInputs) -> Tensor:
    """What is compared, of a model without dropout."""
    with torch.inference_mode(False), torch.enable_grad():
        loss = model.train()(**inputs.arguments()).loss
        loss.backward()
        parameters = dict(model.named_parameters())
        return inputs.result(loss, lambda name: parameters[name].grad)


def write_directory(directory: Path, shape: Shape) -> None:
    """The encoder of `write_weights` with random heads, under the names of BertForPreTraining."""
    from safetensors.torch import load_file, save_file

    write_weights(directory, shape)
    path = directory / "model.safetensors"
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(1)
    hidden = shape.hidden_size
    for name, rows in (
        ("bert.pooler.dense", hidden),
        ("cls.predictions.transform.dense", hidden),
        ("cls.seq_relationship", 2),
    ):
        tensors[f"{name}.weight"] = torch.randn(rows, hidden, generator=generator) * hidden**-0.5
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.2
    tensors["cls.predictions.transform.LayerNorm.weight"] = torch.ones(hidden)
    tensors["cls.predictions.transform.LayerNorm.bias"] = torch.zeros(hidden)
    tensors["cls.predictions.bias"] = torch.zeros(shape.vocab_size)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForPreTraining"]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def loss_of(
    weights: dict[str, Tensor], shape: Shape, hidden: Tensor, inputs: PretrainingInputs
) -> Tensor:
    """Both losses of packed states [T, hidden] in plain PyTorch."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    head = "cls.predictions"
    labels = inputs.labels[inputs.batch.mask]
    words = F.gelu(linear(f"{head}.transform.dense", hidden[labels != IGNORED]))
    norm = f"{head}.transform.LayerNorm"
    words = F.layer_norm(
        words,
        words.shape[-1:],
        weights[f"{norm}.weight"],
        weights[f"{norm}.bias"],
        shape.layer_norm_eps,
    )
    table = weights["bert.embeddings.word_embeddings.weight"]
    scores = F.linear(words, table, weights[f"{head}.bias"])
    starts = torch.tensor([0, *inputs.batch.lengths[:-1]]).cumsum(0)
    pooled = torch.tanh(linear("bert.pooler.dense", hidden[starts]))
    following = F.cross_entropy(linear("cls.seq_relationship", pooled), inputs.following)
    return F.cross_entropy(scores, labels[labels != IGNORED]) + following


def plain_step(
    inputs: PretrainingInputs,
    dtype: torch.dtype,
    encode: Callable[[dict[str, Tensor], Tensor], Tensor],
) -> Tensor:
    """What is compared, from a plain encoder: weights and packed ids [T] -> packed states [T, hidden]."""
    from safetensors.torch import load_file

    with torch.inference_mode(False), torch.enable_grad():
        tensors = load_file(inputs.directory / "model.safetensors")
        weights = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        encoder = {
            name.removeprefix("bert."): t for name, t in weights.items() if name.startswith("bert.")
        }
        ids = inputs.batch.ids[inputs.batch.mask]
        loss = loss_of(weights, inputs.shape, encode(encoder, ids), inputs)
        found = torch.autograd.grad(loss, [weights[name] for name in inputs.checked])
        gradients = dict(zip(inputs.checked, found, strict=True))
        return inputs.result(loss, lambda name: gradients[name])


@cache
def _keep(size: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="ctxfast-bench-")
    write_directory(Path(folder.name), SHAPES[size])
    return folder


def _directory(size: str) -> Path:
    return Path(_keep(size).name)


def pretraining(size: str) -> Iterator[Case]:
    """A batch of 16 (tiny: 4) texts with the lengths of short messages."""
    shape, count = SHAPES[size], {"tiny": 4, "base": 16}[size]
    text_set = "sms_spam"
    lengths = length_sets.draw_batches(text_set, 1, count)[0]
    batch = make_batch(lengths, shape, 0)
    generator = torch.Generator().manual_seed(2)
    chosen = (torch.rand(batch.ids.shape, generator=generator) < 0.15) & batch.mask
    chosen[0, 0] = True
    labels = torch.randint(shape.vocab_size, batch.ids.shape, generator=generator)
    following = torch.randint(2, (count,), generator=generator)
    inputs = PretrainingInputs(
        partial(_directory, size), shape, batch, labels.masked_fill(~chosen, IGNORED), following
    )

    def truth() -> Tensor:
        return plain_step(
            inputs, torch.float64, lambda weights, ids: alone(weights, shape, ids, lengths)
        )

    hidden, words, tokens = shape.hidden_size, int(chosen.sum()), sum(lengths)
    head = 2.0 * words * hidden * (hidden + shape.vocab_size) + 2.0 * count * hidden**2
    parameters = shape.linear_parameters() + (shape.vocab_size + 512) * hidden
    yield Case(
        workload="bert-pretraining",
        name=f"{text_set}-{count}",
        kind="bert_pretraining",
        description=(
            f"pretraining step of BERT, {shape.num_hidden_layers} layers of {hidden}, masked words and next "
            f"sentences, AdamW included, {count} texts with {text_set} lengths"
        ),
        inputs=inputs,
        truth=truth,
        dtypes=("float32",),
        flop=3.0 * (shape.flop(lengths) + head),
        # weights for three products; weight, gradient and two moments read, three of them written
        traffic=lambda element: float(element * parameters * 10),
        items=tokens,
        unit="tokens",
        facts={
            "texts": count,
            "tokens": tokens,
            "labelled": words,
            "padded_tokens": batch.mask.numel(),
            "fill": round(tokens / batch.mask.numel(), 3),
        },
    )
