"""A user's own BERT directory and text as benchmark cases: `ctxfast bench --model DIR --input FILE`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from .case import BadOption, Case
from .plain_bert import ACTIVATIONS, Shape
from .workloads.bert import encoder_case, pad_rows

WORKLOAD = "own-model"
BATCH = 32


@dataclass(frozen=True)
class UserModel:
    """directory: a Hugging Face BERT directory; file: UTF-8 text, one sentence a line, of which `lines` are used."""

    directory: Path
    file: str
    lines: int = 256

    @classmethod
    def at(cls, directory: str, file: str, lines: int) -> UserModel:
        """With the path as a string, as a command line has it."""
        return cls(Path(directory).expanduser(), file, lines)

    @property
    def source(self) -> tuple[str, ...]:
        """What `memory.find_case` finds the cases by."""
        return (
            "model",
            str(self.directory.absolute()),
            str(Path(self.file).absolute()),
            str(self.lines),
        )


def cases(model: UserModel) -> Iterator[Case]:
    """The text in batches of 32 lines, in its own order; then the line of median length alone.

    Raises BadOption for a directory, a configuration or a text that cannot be measured, before it yields anything.
    """
    shape = read_shape(model.directory)
    token_ids = _tokenize(model, shape)
    return _cases(model, shape, token_ids)


def _cases(model: UserModel, shape: Shape, token_ids: list[list[int]]) -> Iterator[Case]:
    name = model.directory.resolve().name
    about = f"{name}, {shape.num_hidden_layers} layers of {shape.hidden_size}"
    batches = [token_ids[i : i + BATCH] for i in range(0, len(token_ids), BATCH)]
    middle = sorted(token_ids, key=len)[len(token_ids) // 2]
    for title, rows, text in (
        ("batches", batches, f"{len(token_ids)} lines of {Path(model.file).name}"),
        ("one-line", [[middle]], f"one line of {len(middle)} tokens"),
    ):
        yield encoder_case(
            WORKLOAD,
            title,
            f"{about}, {text}",
            lambda: model.directory,
            shape,
            tuple(map(pad_rows, rows)),
        )


def read_shape(directory: Path) -> Shape:
    """The sizes in a directory's config.json; BadOption where it is no BERT that every peer could run."""
    path = directory / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption(
            f"model must be a directory with a config.json, got {directory} ({error})"
        ) from None
    kind = entries.get("model_type", "bert") if isinstance(entries, dict) else None
    if kind != "bert":
        raise BadOption(f"model must be of type bert, got {kind!r}")
    if entries.get("position_embedding_type", "absolute") != "absolute":
        raise BadOption(
            f"model must have absolute positions, got {entries['position_embedding_type']!r}"
        )
    shape = Shape(**{f.name: entries[f.name] for f in fields(Shape) if f.name in entries})
    if shape.hidden_act not in ACTIVATIONS:
        raise BadOption(f"model must use one of {', '.join(ACTIVATIONS)}, got {shape.hidden_act!r}")
    return shape


def _tokenize(model: UserModel, shape: Shape) -> list[list[int]]:
    from ctxfast.bert import BertTokenizer

    if model.lines < 1:
        raise BadOption(f"lines must be at least 1, got {model.lines}")
    try:
        with Path(model.file).open(encoding="utf-8") as stream:
            texts = [line for line in map(str.strip, stream) if line][: model.lines]
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"input must be a UTF-8 text file, got {model.file} ({error})") from None
    if not texts:
        raise BadOption(f"input must hold at least one line of text, got none in {model.file}")
    tokenizer = BertTokenizer.from_pretrained(model.directory)
    longest = min(shape.max_position_embeddings, tokenizer.model_max_length)
    return tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
