"""transformers' Trainer on an accelerated model: the same columns, the same losses, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ctxfast
from tests.integrations.lifecycle_cases import fused
from tests.integrations.model_cases import VOCABULARY, build, close, twin

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 30


@pytest.fixture(autouse=True)
def one_thread(seeded: None) -> None:
    """Enough for models of this size."""
    torch.set_num_threads(1)


def examples() -> list[dict[str, Any]]:
    """A raw dataset, with a column that no model takes: does the word 7 occur?"""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(64):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        ids = torch.randint(8, VOCABULARY, (length,), generator=generator)
        if index % 2:
            ids[int(torch.randint(length, (1,), generator=generator))] = 7
        rows.append({"input_ids": ids.tolist(), "label": index % 2, "text": f"row {index}"})
    return rows


class Collator:
    """Pads to the longest row, and notes the columns that reach it."""

    def __init__(self) -> None:
        self.columns: set[str] = set()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.columns |= {name for row in rows for name in row}
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=1),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.tensor([row["label"] for row in rows]),
        }


def fine_tune(model: nn.Module, folder: Path, **options: Any) -> tuple[Any, Collator, list[float]]:
    collator = Collator()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        ),
        train_dataset=examples(),
        eval_dataset=examples(),
        data_collator=collator,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, collator, losses


def _small(lora: bool) -> nn.Module:
    model = build("bert", "ForSequenceClassification", num_labels=2, initializer_range=0.1)
    if not lora:
        return model
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value", "dense"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "LoRA"])
def test_the_loss_curve_is_that_of_the_stock_model(lora: bool, tmp_path: Path) -> None:
    theirs = _small(lora)
    ours = ctxfast.accelerate(twin(theirs))
    got, seen, losses = fine_tune(ours, tmp_path / "ours")
    want, expected, curve = fine_tune(theirs, tmp_path / "theirs")
    assert seen.columns == expected.columns == {"input_ids", "label"}
    assert len(losses) == STEPS and sum(curve[-5:]) < sum(curve[:5]) - 0.1  # it learns
    for a, b in zip(losses, curve, strict=True):
        assert abs(a - b) <= 1e-4
    assert fused(ours)
    assert got.evaluate()["eval_loss"] == pytest.approx(want.evaluate()["eval_loss"], abs=1e-4)
    predictions = [torch.from_numpy(x.predict(examples()).predictions) for x in (got, want)]
    close(*predictions, 1e-3)
    if not lora:
        got.save_model(str(tmp_path / "saved"))
        loaded = type(theirs).from_pretrained(tmp_path / "saved")
        for a, b in zip(loaded.parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b)


def test_checkpointing_and_accumulation(tmp_path: Path) -> None:
    theirs = _small(False)
    ours = ctxfast.accelerate(twin(theirs))
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    losses = fine_tune(ours, tmp_path / "ours", **options)[2]
    curve = fine_tune(theirs, tmp_path / "theirs", **options)[2]
    for a, b in zip(losses, curve, strict=True):
        assert abs(a - b) <= 1e-4
