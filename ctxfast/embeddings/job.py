"""`embed_file`: text in, vectors out, in bounded memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxfast.elmo.files import is_elmo
from ctxfast.embeddings import allennlp_file
from ctxfast.embeddings.elmo_encoder import ElmoEncoder
from ctxfast.embeddings.encoder import BertEncoder
from ctxfast.embeddings.options import EmbedOptions, OptionError
from ctxfast.embeddings.output import replacing
from ctxfast.embeddings.pieces import Piece, windows
from ctxfast.embeddings.pooling import LinePool
from ctxfast.embeddings.text import TextLines
from ctxfast.embeddings.writers import WRITERS, Writer, file_format

_CHUNK_LINES = 2048
_CHUNK_CHARACTERS = 1 << 20
_WINDOW_BYTES = 64 << 20

Encoder = BertEncoder | ElmoEncoder


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_file` did."""

    output: str
    format: str
    lines: int
    blank_lines: int
    tokens: int
    overlong_lines: int
    shape: tuple[int, ...]
    dtype: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def embed_file(
    model: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: EmbedOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """Write contextual vectors of the lines of a text file.

    Lines without a word piece (blank ones) keep their place: a zero vector when pooled, no token
    otherwise. Equal lines get equal vectors up to rounding, whatever stands beside them. Memory does
    not grow with the text; the disk needs room for twice the output while it is put together.

    Args:
        model: a BERT directory, or an ELMo directory or zip file.
        input: UTF-8 text, one sentence a line, gzip-compressed or not; "-" is standard input.
        output: .h5, .hdf5, .npz or .safetensors; it appears when it is complete.
        options: see `EmbedOptions`.
        overwrite: replace an existing `output`.
        progress: called with (lines done, lines in all) after each batch.

    Raises:
        OptionError: an option does not fit, by itself or with this model.
        OSError: a file cannot be read or written.
        ValueError: the text or the model directory is not usable.
    """
    options = EmbedOptions() if options is None else options
    kind = file_format(output)
    if options.dtype == "bfloat16" and kind != "safetensors":
        raise OptionError(f"embed: output must end in .safetensors for bfloat16, got {output}")
    if os.fspath(input) != "-" and _same_file(input, output):
        raise OptionError(f"embed: output must not be the input, got {output} twice")
    started = time.perf_counter()
    with replacing(output, overwrite=overwrite) as partial, TextLines(input) as text:
        encoder = _encoder(model, options)
        text.check()
        if options.layout == "allennlp":
            if kind != "hdf5":
                raise OptionError(
                    f"embed: output must be .hdf5 in the layout allennlp, got {output}"
                )
            return _in_allennlp_layout(partial, text, encoder, output, started, progress)
        if isinstance(encoder, ElmoEncoder) and options.pooling == "tokens":
            encoder.tokenizer.read_vocabulary(text)
        spellings = encoder.tokenizer.spellings if options.pooling == "tokens" else None
        writer = WRITERS[kind](partial, encoder.row_shape, options.dtype, spellings)
        with closing(writer):
            job = _Job(encoder, writer, text.count, progress)
            carried = options.stateful == "carry"  # then only whole batches
            size = options.batch_size * max(_CHUNK_LINES // options.batch_size, 1)
            most = min(_CHUNK_LINES, max(1, _WINDOW_BYTES // job.row_bytes))
            limits = (size, 1 << 62) if carried else (most, _CHUNK_CHARACTERS)
            for lines in text.chunks(*limits):
                job.run(lines)
            writer.finish(_metadata(model, text, encoder, job.counts()))
    rows = job.tokens if options.pooling == "tokens" else job.lines
    return EmbedReport(
        output=os.fspath(output),
        format=kind,
        shape=(rows, *encoder.row_shape),
        dtype=options.dtype,
        seconds=time.perf_counter() - started,
        **job.counts(),
    )


def _encoder(model: str | os.PathLike[str], options: EmbedOptions) -> Encoder:
    return ElmoEncoder(model, options) if is_elmo(model) else BertEncoder(model, options)


def _in_allennlp_layout(
    partial: Path,
    text: TextLines,
    encoder: Encoder,
    output: str | os.PathLike[str],
    started: float,
    progress: Callable[[int, int], None] | None,
) -> EmbedReport:
    assert isinstance(encoder, ElmoEncoder)
    words = allennlp_file.write(partial, text, encoder, progress)
    return EmbedReport(
        output=os.fspath(output),
        format="hdf5",
        lines=text.count,
        blank_lines=0,
        tokens=words,
        overlong_lines=encoder.tokenizer.overlong_lines,
        shape=(words, *encoder.row_shape),
        dtype="float32",
        seconds=time.perf_counter() - started,
    )


class _Job:
    """Encodes chunks of lines and appends them to the writer in order."""

    def __init__(
        self,
        encoder: Encoder,
        writer: Writer,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.options = encoder.options
        self.encoder = encoder
        self.writer = writer
        self.total = total
        self.progress = progress
        self.row_bytes = 4 * math.prod(encoder.row_shape)
        self.lines = 0
        self.blank = 0
        self.tokens = 0

    def counts(self) -> dict[str, int]:
        return {
            "lines": self.lines,
            "blank_lines": self.blank,
            "tokens": self.tokens,
            "overlong_lines": self.encoder.tokenizer.overlong_lines,
        }

    def run(self, lines: Sequence[str]) -> None:
        pieces = self.encoder.tokenizer(lines)
        counts = np.zeros(len(lines), np.int64)
        np.add.at(counts, [piece.line for piece in pieces], [piece.kept for piece in pieces])
        if self.options.pooling == "tokens":
            self._write_tokens(pieces, len(lines))
            self.writer.append_counts(counts)
        else:
            self._write_pooled(pieces, len(lines))
        self.lines += len(lines)
        self.blank += int((counts == 0).sum())
        self.tokens += int(counts.sum())
        self._report(0)

    def _write_pooled(self, pieces: Sequence[Piece], lines: int) -> None:
        pool = LinePool(lines, self.encoder.row_shape, self.options.pooling)
        done = 0
        for batch in self.encoder.batches(pieces):
            chosen = [pieces[i] for i in batch]
            rows = self.encoder(chosen)
            pool.add(rows, [piece.kept for piece in chosen], [piece.line for piece in chosen])
            done += len(batch)
            self._report(done * lines // len(pieces))
        self.writer.append_rows(self._stored(pool.result(self.options.normalize)))

    def _write_tokens(self, pieces: Sequence[Piece], lines: int) -> None:
        done = 0
        for window in windows(pieces, max(1, _WINDOW_BYTES // self.row_bytes)):
            starts = np.cumsum([0, *(piece.kept for piece in window)])
            rows = torch.empty((int(starts[-1]), *self.encoder.row_shape))
            for batch in self.encoder.batches(window):
                encoded = self.encoder([window[i] for i in batch]).cpu()
                parts = encoded.split([window[i].kept for i in batch])
                for i, part in zip(batch, parts, strict=True):
                    rows[starts[i] : starts[i + 1]] = part
                done += len(batch)
                self._report(done * lines // len(pieces))
            ids = [token for piece in window for token in piece.ids[piece.first : piece.last]]
            self.writer.append_rows(self._stored(rows), ids)

    def _stored(self, rows: Tensor) -> np.ndarray:
        converted = rows.to(getattr(torch, self.options.dtype))
        if self.options.dtype == "float16" and bool((converted.isinf() & rows.isfinite()).any()):
            raise ValueError(
                f"embed: vectors must be below 65504 for dtype float16, got {rows.abs().max():.6g}"
            )
        if self.options.dtype == "bfloat16":
            converted = converted.view(torch.uint16)
        return converted.numpy()

    def _report(self, done: int) -> None:
        if self.progress is not None:
            self.progress(self.lines + done, self.total)


def _metadata(
    model: str | os.PathLike[str], text: TextLines, encoder: Encoder, counts: dict[str, int]
) -> dict[str, Any]:
    import ctxfast

    return {
        "format": "ctxfast embeddings 1",
        "ctxfast": ctxfast.__version__,
        "torch": torch.__version__,
        "model": os.fspath(model),
        "weights_sha256": encoder.weights_sha256,
        "text": text.name,
        "text_sha256": text.sha256,
        "options": encoder.options.as_dict() | {"max_length": encoder.max_length},
        **counts,
    }


def _same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
