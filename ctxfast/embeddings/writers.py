"""Vectors to HDF5, NPZ and safetensors files, piece by piece: no file is ever held in memory.

Every file has the same arrays. Pooled: `embeddings` [N, D] or [N, L, D]. Per token: `vectors`
[T, D] or [T, L, D], `offsets` int64 [N + 1] (line i owns rows offsets[i] to offsets[i + 1]) and
`tokens` [T], the word pieces: fixed-width UTF-8 strings in HDF5, unicode in NPZ, zero-padded UTF-8
bytes [T, W] in safetensors. `metadata` is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ctxfast.embeddings.options import OptionError

FORMATS = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz", ".safetensors": "safetensors"}
_CHUNK_BYTES = 1 << 18
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def file_format(path: str | os.PathLike[str]) -> str:
    """ "hdf5", "npz" or "safetensors", from the suffix of `path`."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OptionError(f"embed: output must end in {', '.join(FORMATS)}, got {os.fspath(path)}")
    return FORMATS[suffix]


class Writer(ABC):
    """Takes rows in order; `finish` completes the file.

    Args:
        path: an existing empty file, which is overwritten.
        row_shape: shape of one vector, (D,) or (L, D).
        dtype: "float32", "float16" or "bfloat16" (as uint16 rows).
        token_width: bytes of the longest token, or None for pooled vectors.
    """

    def __init__(
        self, path: Path, row_shape: tuple[int, ...], dtype: str, token_width: int | None
    ) -> None:
        self.row_shape = row_shape
        self.dtype_name = dtype
        self.numpy_dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        self.token_width = token_width
        self.rows_name = "embeddings" if token_width is None else "vectors"
        self._end = 0
        self._open(path)
        if token_width is not None:
            self._append("offsets", np.zeros(1, np.int64))

    def append_rows(self, rows: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """rows [n, *row_shape]; tokens [n], UTF-8 strings of numpy's type S, when per token."""
        self._append(self.rows_name, np.ascontiguousarray(rows, self.numpy_dtype))
        if tokens is not None:
            self._append("tokens", self._encode_tokens(tokens))

    def append_counts(self, counts: np.ndarray) -> None:
        """Numbers of tokens of the next lines, int64 [n]."""
        offsets = self._end + np.cumsum(counts, dtype=np.int64)
        if len(offsets):
            self._end = int(offsets[-1])
            self._append("offsets", offsets)

    @abstractmethod
    def finish(self, metadata: dict[str, Any]) -> None:
        """Write what is outstanding, and `metadata`."""

    @abstractmethod
    def close(self) -> None:
        """Release files and temporary space, after `finish` or in place of it."""

    @abstractmethod
    def _open(self, path: Path) -> None: ...

    @abstractmethod
    def _append(self, name: str, values: np.ndarray) -> None: ...

    def _encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return tokens.astype(f"S{self.token_width}", copy=False)


class Hdf5Writer(Writer):
    """Growing chunked datasets; `metadata` is an attribute of the root group."""

    def _open(self, path: Path) -> None:
        import h5py

        self._file = h5py.File(path, "w")
        row_bytes = int(np.prod(self.row_shape)) * self.numpy_dtype.itemsize
        self._create(self.rows_name, self.row_shape, self.numpy_dtype, row_bytes)
        if self.token_width is not None:
            self._create("offsets", (), np.dtype(np.int64), 8)
            text = h5py.string_dtype("utf-8", self.token_width)
            self._create("tokens", (), text, self.token_width)

    def _create(self, name: str, shape: tuple[int, ...], dtype: Any, row_bytes: int) -> None:
        rows = max(1, _CHUNK_BYTES // row_bytes)
        self._file.create_dataset(
            name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(rows, *shape)
        )

    def _append(self, name: str, values: np.ndarray) -> None:
        dataset = self._file[name]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        # Strings are ASCII to HDF5 unless their type says otherwise; dataset.dtype does.
        dataset[start:] = values.view(dataset.dtype)

    def finish(self, metadata: dict[str, Any]) -> None:
        self._file.attrs["metadata"] = json.dumps(metadata)
        self._file.close()

    def close(self) -> None:
        self._file.close()


class _SpoolingWriter(Writer):
    """Collects each array in an unnamed temporary file, since shapes stand before the data."""

    def _open(self, path: Path) -> None:
        self._path = path
        self._spools: dict[str, IO[bytes]] = {}
        self._lengths: dict[str, int] = {}
        self._spool(self.rows_name)
        if self.token_width is not None:
            self._spool("offsets")
            self._spool("tokens")

    def _spool(self, name: str) -> None:
        spool = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
        self._spools[name] = cast(IO[bytes], spool)
        self._lengths[name] = 0

    def _append(self, name: str, values: np.ndarray) -> None:
        self._spools[name].write(values.data if values.size else b"")
        self._lengths[name] += len(values)

    def _copy(self, name: str, out: IO[bytes]) -> None:
        spool = self._spools.pop(name)
        spool.seek(0)
        shutil.copyfileobj(spool, out, 1 << 20)
        spool.close()

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()


class NpzWriter(_SpoolingWriter):
    """An uncompressed zip of .npy members, `metadata` a unicode scalar: no pickle inside."""

    def _encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return np.char.decode(tokens, "utf-8").astype(f"U{self.token_width}")

    def finish(self, metadata: dict[str, Any]) -> None:
        dtypes = {self.rows_name: self.numpy_dtype, "offsets": np.dtype(np.int64)}
        dtypes["tokens"] = np.dtype(f"U{self.token_width or 1}")
        with zipfile.ZipFile(self._path, "w", allowZip64=True) as archive:
            for name in list(self._spools):
                shape = (self._lengths[name], *(self.row_shape if name == self.rows_name else ()))
                descr = np.lib.format.dtype_to_descr(dtypes[name])
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    self._copy(name, cast(IO[bytes], member))
            with archive.open("metadata.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(metadata)))


class SafetensorsWriter(_SpoolingWriter):
    """8 bytes of header length, a JSON header padded to 8 bytes, the arrays one after another."""

    def _encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        fixed = np.ascontiguousarray(super()._encode_tokens(tokens))
        return fixed.view(np.uint8).reshape(len(tokens), self.token_width or 0)

    def finish(self, metadata: dict[str, Any]) -> None:
        header: dict[str, Any] = {"__metadata__": {"metadata": json.dumps(metadata)}}
        position = 0
        # Widest element first, so that every array starts at a multiple of its element size.
        order = [name for name in ("offsets", self.rows_name, "tokens") if name in self._spools]
        for name in order:
            tail: tuple[int, ...] = ()
            kind, itemsize = "I64", 8
            if name == self.rows_name:
                tail, itemsize = self.row_shape, self.numpy_dtype.itemsize
                kind = _SAFETENSORS_NAMES[self.dtype_name]
            elif name == "tokens":
                assert self.token_width is not None
                tail, kind, itemsize = (self.token_width,), "U8", 1
            shape = [self._lengths[name], *tail]
            end = position + int(np.prod(shape, dtype=np.int64)) * itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self._path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                self._copy(name, out)


WRITERS: dict[str, type[Writer]] = {
    "hdf5": Hdf5Writer,
    "npz": NpzWriter,
    "safetensors": SafetensorsWriter,
}
