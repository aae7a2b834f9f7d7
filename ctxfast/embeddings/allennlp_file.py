"""The hdf5 layout of `allennlp elmo`: a dataset for each line, and an index of the sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ctxfast.elmo.embedder import write_allennlp_file
from ctxfast.embeddings.elmo_encoder import ElmoEncoder
from ctxfast.embeddings.options import OptionError
from ctxfast.embeddings.text import TextLines

_FORMATS = {"all": "all", "top": "top", "mix": "average"}
_CHUNK = 32  # batches


def write(
    path: Path,
    text: TextLines,
    encoder: ElmoEncoder,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Writes the vectors of every line and returns the number of words.

    Raises:
        OptionError: the layout has no form for these options.
        ValueError: a line is blank.
    """
    options = encoder.options
    if options.layers not in _FORMATS or options.mix_weights is not None:
        raise OptionError(
            "embed: layers must be all, top or average in the layout allennlp, got others"
        )
    counted = 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal counted
        done = 0
        for lines in text.chunks(options.batch_size * _CHUNK, 1 << 62):
            pieces = encoder.tokenizer(lines)
            found: dict[int, np.ndarray] = {}
            for group in encoder.batches(pieces):
                chosen = [pieces[i] for i in group]
                rows = encoder(chosen).cpu().split([piece.kept for piece in chosen])
                for piece, part in zip(chosen, rows, strict=True):
                    # The row axis comes first here, the layer axis in the file.
                    array = part.transpose(0, 1) if options.layers == "all" else part
                    found[piece.line] = array.contiguous().numpy()
            for line in range(len(lines)):
                counted += found[line].shape[-2]
                yield found.pop(line)
            done += len(lines)
            if progress is not None:
                progress(done, text.count)

    sentences = [line.strip() for line in text]
    write_allennlp_file(path, sentences, arrays(), "all")
    return counted
