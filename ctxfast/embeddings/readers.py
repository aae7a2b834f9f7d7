"""Reads what `embed_file` wrote, without loading it: rows come from the file when asked for."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ctxfast.embeddings.writers import FORMATS

_SAFETENSORS_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "|u1"}


class LazyArray:
    """An array-like over a file: indexing reads, and converts, only what is asked for."""

    def __init__(self, source: Any, shape: tuple[int, ...], convert: Callable[[Any], Any]) -> None:
        self._source = source
        self._convert = convert
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self._convert(self._source[index])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class Embeddings:
    """Vectors of N lines.

    Attributes:
        embeddings: pooled, [N, D] or [N, L, D]; None where the file has a vector per token.
        vectors: per token, [T, D] or [T, L, D]; None where the file is pooled.
        offsets: int64 [N + 1]: line i owns rows offsets[i] to offsets[i + 1] (per token only).
        tokens: [T] word pieces as str (per token only).
        metadata: text hash, model, options and versions, as written.

    `embeddings`, `vectors` and `tokens` are array-likes that read from the file: index or slice
    them, or `numpy.asarray` them whole. bfloat16 vectors are given as float32.
    """

    def __init__(self, arrays: dict[str, Any], metadata: dict[str, Any], file: Any = None) -> None:
        self.embeddings: Any = arrays.get("embeddings")
        self.vectors: Any = arrays.get("vectors")
        self.tokens: Any = arrays.get("tokens")
        offsets = arrays.get("offsets")
        self.offsets = None if offsets is None else np.asarray(offsets[:])
        self.metadata = metadata
        self._file = file

    def __len__(self) -> int:
        """Number of lines."""
        return len(self.embeddings) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Line `index`: its vector [D] or [L, D], or those of its tokens, [t, D] or [t, L, D]."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"load_embeddings: index must be below {count}, got {index}")
        index %= count
        if self.offsets is None:
            return np.asarray(self.embeddings[index])
        return np.asarray(self.vectors[int(self.offsets[index]) : int(self.offsets[index + 1])])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        name = "embeddings" if self.offsets is None else "vectors"
        shape = list(getattr(self, name).shape)
        return f"Embeddings({len(self)} lines, {name} {shape})"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Embeddings:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Open a file that `ctxfast embed` wrote.

    Args:
        path: .h5, .hdf5, .npz or .safetensors; the suffix decides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, or the file is not one of ours.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"load_embeddings: path must end in {', '.join(FORMATS)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"load_embeddings: path must be an existing file, got {path}")
    try:
        return {"hdf5": _hdf5, "npz": _npz, "safetensors": _safetensors}[kind](path)
    except (KeyError, ValueError, OSError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load_embeddings: path must be a file that ctxfast embed wrote, got {path} ({error})"
        ) from error


def _hdf5(path: Path) -> Embeddings:
    import h5py

    file = h5py.File(path, "r")
    try:
        metadata = json.loads(file.attrs["metadata"])
        arrays = {name: file[name] for name in file}
        if "tokens" in arrays:
            tokens = arrays["tokens"]
            arrays["tokens"] = LazyArray(tokens, tokens.shape, _decode)
        return Embeddings(arrays, metadata, file)
    except BaseException:
        file.close()
        raise


def _npz(path: Path) -> Embeddings:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            arrays[info.filename.removesuffix(".npy")] = _npy_member(path, archive, info)
    metadata = json.loads(str(arrays.pop("metadata")))
    return Embeddings(arrays, metadata)


def _npy_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """A read-only memory map of one stored (not compressed) member."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        read[2, 0] = np.lib.format.read_array_header_2_0
        shape, _, dtype = read[version](file)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape)


def _safetensors(path: Path) -> Embeddings:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    metadata = json.loads(header.pop("__metadata__")["metadata"])
    arrays: dict[str, Any] = {}
    for name, entry in header.items():
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        if 8 + length + entry["data_offsets"][1] > size:
            raise ValueError("it is cut off")
        raw: Any = np.empty(shape, dtype)
        if 0 not in shape:
            raw = np.memmap(path, dtype, "r", start, shape)
        if entry["dtype"] == "BF16":
            raw = LazyArray(raw, shape, _from_bfloat16)
        elif name == "tokens":
            fixed = raw.view(f"S{shape[1]}")[:, 0] if shape[0] else np.empty(0, "S1")
            raw = LazyArray(fixed, shape[:1], _decode)
        arrays[name] = raw
    return Embeddings(arrays, metadata)


def _from_bfloat16(raw: np.ndarray) -> np.ndarray:
    return (np.asarray(raw).astype(np.uint32) << 16).view(np.float32)


def _decode(raw: Any) -> Any:
    if isinstance(raw, bytes):
        return raw.decode("utf-8")
    return np.array([token.decode("utf-8") for token in np.asarray(raw, "S").tolist()], dtype=str)
