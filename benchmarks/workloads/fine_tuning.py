"""One step of fine-tuning a BERT classifier on a ragged batch: loss, gradients, AdamW; all parameters, or LoRA's.

The timed step has dropout, as training has. What is checked is the same step without it: the loss and gradients from
one end of the model to the other, against float64 on each text alone. LoRA (Hu et al., 2021) adds (alpha / r) B A to
the weights of queries and values; B is not zero here, so that a missing adapter is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lengths as length_sets
from .. import scratch
from ..case import Case
from ..plain_bert import Shape, alone, write_weights
from .bert import SHAPES, Batch, make_batch

LABELS = 2
RANK, ALPHA = 8, 16
TARGETS = ("query", "value")
LEARNING_RATE = 2e-5
_PEFT = {"classifier.weight": "classifier.modules_to_save.default.weight"}


@dataclass(frozen=True)
class FineTuningInputs:
    """A directory with a classifier, one batch and its labels [B]."""

    make_directory: Callable[[], Path]
    shape: Shape
    batch: Batch
    labels: Tensor
    lora: bool

    @property
    def directory(self) -> Path:
        return self.make_directory()

    @property
    def checked(self) -> list[str]:
        """Parameters whose gradients are compared, under their names before PEFT renames them."""
        last = self.shape.num_hidden_layers - 1
        first = "bert.encoder.layer.0.attention.self.query"
        final = f"bert.encoder.layer.{last}.attention.self.value"
        if self.lora:
            names = [f"{name}.lora_{side}" for name in (first, final) for side in "AB"]
            return [*names, "classifier.weight"]
        return [
            "bert.embeddings.LayerNorm.weight",
            f"{first}.weight",
            f"{final}.weight",
            f"bert.encoder.layer.{last}.output.dense.weight",
            "bert.pooler.dense.weight",
            "classifier.weight",
        ]

    def adapters(self) -> dict[str, Tensor]:
        """A [r, hidden] and B [hidden, r] of every adapted layer."""
        generator = torch.Generator().manual_seed(3)
        hidden, found = self.shape.hidden_size, {}
        for layer in range(self.shape.num_hidden_layers):
            for name in TARGETS:
                path = f"bert.encoder.layer.{layer}.attention.self.{name}"
                a = torch.randn(RANK, hidden, generator=generator) * hidden**-0.5
                b = torch.randn(hidden, RANK, generator=generator) * 0.05
                found |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        return found

    def prepare(self, model: Any) -> Any:
        """The model itself, or with its adapters, for training."""
        if not self.lora:
            return model.train()
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="SEQ_CLS"
        )
        model = peft.get_peft_model(model, config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.adapters().items():
                parameters[f"base_model.model.{name}.default.weight"].copy_(value)
        return model.train()

    def arguments(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.batch.ids,
            "attention_mask": self.batch.mask.long(),
            "labels": self.labels,
        }

    def step(self, model: Any) -> Callable[[], float]:
        """The step that is timed."""
        arguments = self.arguments()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01, fused=True)

        def run() -> float:
            with torch.inference_mode(False), torch.enable_grad():
                loss = model(**arguments).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return float(loss.detach())

        return run

    def result(self, model: Any) -> Tensor:
        """[N]: loss and gradients of a model without dropout."""
        with torch.inference_mode(False), torch.enable_grad():
            loss = model(**self.arguments()).loss
            loss.backward()
        parameters = dict(model.named_parameters())

        def gradient(name: str) -> Tensor:
            if self.lora:
                name = f"base_model.model.{_PEFT.get(name, f'{name}.default.weight')}"
            return parameters[name].grad.flatten()

        return torch.cat([loss.detach().view(1), *map(gradient, self.checked)])

    def truth(self) -> Tensor:
        """The same in plain PyTorch, float64, each text alone."""
        from safetensors.torch import load_file

        with torch.inference_mode(False), torch.enable_grad():
            stored = load_file(self.directory / "model.safetensors")
            weights = {name: t.double().requires_grad_() for name, t in stored.items()}
            used = dict(weights)
            if self.lora:
                weights |= {n: t.double().requires_grad_() for n, t in self.adapters().items()}
                for name in [n.removesuffix(".lora_A") for n in weights if n.endswith(".lora_A")]:
                    change = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
                    used[f"{name}.weight"] = used[f"{name}.weight"] + ALPHA / RANK * change
            encoder = {n.removeprefix("bert."): t for n, t in used.items() if n.startswith("bert.")}
            ids, lengths = self.batch.ids[self.batch.mask], self.batch.lengths
            hidden = alone(encoder, self.shape, ids, lengths)
            starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            pooled = torch.tanh(_linear(used, "bert.pooler.dense", hidden[starts]))
            loss = F.cross_entropy(_linear(used, "classifier", pooled), self.labels)
            found = torch.autograd.grad(loss, [weights[name] for name in self.checked])
        return torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in found)])


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _write(shape: Shape, directory: Path) -> None:
    """The encoder of `write_weights` with a random classifier, under the names of BertForSequenceClassification."""
    from safetensors.torch import load_file, save_file

    write_weights(directory, shape)
    path = directory / "model.safetensors"
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("bert.pooler.dense", shape.hidden_size), ("classifier", LABELS)):
        weight = torch.randn(rows, shape.hidden_size, generator=generator)
        tensors[f"{name}.weight"] = weight * shape.hidden_size**-0.5
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.2
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["BertForSequenceClassification"]}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def fine_tuning(workload: str, size: str) -> Iterator[Case]:
    """A batch of 16 (tiny: 4) texts with the lengths of short messages, all parameters and LoRA."""
    shape, count = SHAPES[size], {"tiny": 4, "base": 16}[size]
    lengths = length_sets.draw_batches("sms_spam", 1, count)[0]
    batch = make_batch(lengths, shape, 0)
    labels = torch.randint(LABELS, (count,), generator=torch.Generator().manual_seed(2))
    directory = partial(scratch.folder, f"classifier-{size}", partial(_write, shape))
    for lora in (False, True):
        what = f"LoRA of rank {RANK}" if lora else "all parameters"
        parameters = shape.linear_parameters() + (shape.vocab_size + 512) * shape.hidden_size
        inputs = FineTuningInputs(directory, shape, batch, labels, lora)
        yield Case(
            workload=workload,
            name=f"{'lora' if lora else 'fine-tuning'}-{count}",
            kind="fine_tuning",
            description=(
                f"fine-tuning step of a BERT classifier, {shape.num_hidden_layers} layers of {shape.hidden_size}, "
                f"{what}, AdamW included, {count} texts with sms_spam lengths"
            ),
            inputs=inputs,
            truth=inputs.truth,
            dtypes=("float32",),
            # LoRA needs no product for the gradients of the weights
            flop=(2.0 if lora else 3.0) * shape.flop(lengths),
            # weights for three products; weight, gradient and two moments read, three of them written
            traffic=partial(_traffic, parameters * (2 if lora else 10)),
            items=count,
            unit="texts",
            facts={
                "texts": count,
                "tokens": sum(lengths),
                "padded_tokens": batch.mask.numel(),
                "fill": round(sum(lengths) / batch.mask.numel(), 3),
            },
        )


def _traffic(elements: int, element_size: int) -> float:
    return float(elements * element_size)
