"""Contextual vectors of text files: read lines, encode them in packed batches, write one file.

`embed_file` is what `ctxfast embed` calls; `load_embeddings` reads its HDF5, NPZ and safetensors
files back. torch, h5py and the models are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxfast.embeddings.job import EmbedReport, embed_file
    from ctxfast.embeddings.options import EmbedOptions, OptionError
    from ctxfast.embeddings.readers import Embeddings, load_embeddings

__all__ = ["EmbedOptions", "EmbedReport", "Embeddings", "OptionError"]
__all__ += ["embed_file", "load_embeddings"]

_HOME = {
    "EmbedOptions": "options",
    "OptionError": "options",
    "EmbedReport": "job",
    "embed_file": "job",
    "Embeddings": "readers",
    "load_embeddings": "readers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
