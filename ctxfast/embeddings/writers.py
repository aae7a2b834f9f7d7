"""Vectors to HDF5, NPZ and safetensors files, piece by piece: no array is ever held in memory.

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
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ctxfast.embeddings.options import OptionError

FORMATS = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz", ".safetensors": "safetensors"}
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def file_format(path: str | os.PathLike[str]) -> str:
    """ "hdf5", "npz" or "safetensors", from the suffix of `path`."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OptionError(f"embed: output must end in {', '.join(FORMATS)}, got {os.fspath(path)}")
    return FORMATS[suffix]


class Writer(ABC):
    """Takes rows in order, each array in an unnamed temporary file, since shapes stand before data.

    `finish` puts the arrays together; what is too large for the disk fails in plain file writes.

    Args:
        path: an existing empty file, which is overwritten.
        row_shape: shape of one vector, (D,) or (L, D).
        dtype: "float32", "float16" or "bfloat16" (as uint16 rows).
        spellings: the tokens by id as UTF-8 strings of numpy's type S, None for pooled vectors.
    """

    def __init__(
        self, path: Path, row_shape: tuple[int, ...], dtype: str, spellings: np.ndarray | None
    ) -> None:
        self.row_shape = row_shape
        self.dtype_name = dtype
        self.numpy_dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        self.rows_name = "embeddings" if spellings is None else "vectors"
        self.spellings = None if spellings is None else self._encode(spellings)
        self._path = path
        self._end = 0
        # Widest element first, so that every array starts at a multiple of its element size.
        order = [self.rows_name] if spellings is None else ["offsets", self.rows_name, "tokens"]
        self._lengths = dict.fromkeys(order, 0)
        self._spools: dict[str, IO[bytes]] = {}
        for name in order:
            spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
            self._spools[name] = cast(IO[bytes], spool)
        if spellings is not None:
            self._append("offsets", np.zeros(1, np.int64))

    def append_rows(self, rows: np.ndarray, ids: Sequence[int] = ()) -> None:
        """rows [n, *row_shape], and the ids of their tokens [n] when there is one row a token."""
        self._append(self.rows_name, np.ascontiguousarray(rows, self.numpy_dtype))
        if self.spellings is not None:
            self._append("tokens", self.spellings[np.asarray(ids, np.int64)])

    def append_counts(self, counts: np.ndarray) -> None:
        """Numbers of tokens of the next lines, int64 [n]."""
        offsets = self._end + np.cumsum(counts, dtype=np.int64)
        if len(offsets):
            self._end = int(offsets[-1])
            self._append("offsets", offsets)

    def close(self) -> None:
        """Release the temporary space, after `finish` or in place of it."""
        for spool in self._spools.values():
            spool.close()

    @abstractmethod
    def finish(self, metadata: dict[str, Any]) -> None:
        """Write the file."""

    def _append(self, name: str, values: np.ndarray) -> None:
        self._spools[name].write(values.data if values.size else b"")
        self._lengths[name] += len(values)

    def _encode(self, spellings: np.ndarray) -> np.ndarray:
        """The tokens by id as the format stores them."""
        return spellings

    def _shape(self, name: str) -> tuple[int, ...]:
        return (self._lengths[name], *(self.row_shape if name == self.rows_name else ()))

    def _copy(self, name: str, out: IO[bytes]) -> None:
        """Move an array to `out`."""
        spool = self._spools.pop(name)
        spool.seek(0)
        shutil.copyfileobj(spool, out, 1 << 20)
        spool.close()


class Hdf5Writer(Writer):
    """Contiguous datasets; `metadata` is an attribute of the root group."""

    def finish(self, metadata: dict[str, Any]) -> None:
        self._reserve(len(json.dumps(metadata)))
        places = self._create(metadata)
        with self._path.open("r+b") as out:
            for name, place in places.items():
                if place is not None:
                    out.seek(place)
                    self._copy(name, cast(IO[bytes], out))

    def _reserve(self, metadata_bytes: int) -> None:
        """Fail here, with a plain error, where there is no room for what the HDF5 library writes.

        The library itself survives no failed write.
        """
        room = (1 << 16) + metadata_bytes
        with self._path.open("wb") as out:
            out.write(bytes(room))
            out.flush()
            out.truncate(room + sum(s.seek(0, os.SEEK_END) for s in self._spools.values()))

    def _create(self, metadata: dict[str, Any]) -> dict[str, int | None]:
        """Write all but the arrays; where in the file each of them belongs, None where empty."""
        import h5py

        dtypes: dict[str, Any] = {self.rows_name: self.numpy_dtype, "offsets": np.dtype(np.int64)}
        if self.spellings is not None:
            dtypes["tokens"] = h5py.string_dtype("utf-8", self.spellings.itemsize)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(self._path, "w") as file:
            file.attrs["metadata"] = json.dumps(metadata)
            for name in self._spools:
                kind = h5py.h5t.py_create(dtypes[name], logical=True)
                space = h5py.h5s.create_simple(self._shape(name))
                h5py.h5d.create(file.id, name.encode(), kind, space, layout)
            return {name: file[name].id.get_offset() for name in self._spools}


class NpzWriter(Writer):
    """An uncompressed zip of .npy members, `metadata` a unicode scalar: no pickle inside."""

    def _encode(self, spellings: np.ndarray) -> np.ndarray:
        return np.array([token.decode("utf-8") for token in spellings.tolist()])

    def finish(self, metadata: dict[str, Any]) -> None:
        dtypes = {self.rows_name: self.numpy_dtype, "offsets": np.dtype(np.int64)}
        if self.spellings is not None:
            dtypes["tokens"] = self.spellings.dtype
        with zipfile.ZipFile(self._path, "w", allowZip64=True) as archive:
            for name in list(self._spools):
                descr = np.lib.format.dtype_to_descr(dtypes[name])
                header = {"descr": descr, "fortran_order": False, "shape": self._shape(name)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    self._copy(name, cast(IO[bytes], member))
            with archive.open("metadata.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(metadata)))


class SafetensorsWriter(Writer):
    """8 bytes of header length, a JSON header padded to 8 bytes, the arrays one after another."""

    def _encode(self, spellings: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(spellings).view(np.uint8).reshape(len(spellings), -1)

    def finish(self, metadata: dict[str, Any]) -> None:
        header: dict[str, Any] = {"__metadata__": {"metadata": json.dumps(metadata)}}
        position = 0
        for name in self._spools:
            tail: tuple[int, ...] = ()
            kind, itemsize = "I64", 8
            if name == self.rows_name:
                tail, itemsize = self.row_shape, self.numpy_dtype.itemsize
                kind = _SAFETENSORS_NAMES[self.dtype_name]
            elif name == "tokens":
                assert self.spellings is not None
                tail, kind, itemsize = self.spellings.shape[1:], "U8", 1
            shape = [self._lengths[name], *tail]
            end = position + int(np.prod(shape, dtype=np.int64)) * itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self._path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in list(self._spools):
                self._copy(name, out)


WRITERS: dict[str, type[Writer]] = {
    "hdf5": Hdf5Writer,
    "npz": NpzWriter,
    "safetensors": SafetensorsWriter,
}
