"""Where an ELMo's two files are, and how a model is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ctxfast.bert.files import make_directory, write_atomically
from ctxfast.bert.weights import write_checkpoint
from ctxfast.elmo.options import ConfigurationError, ElmoOptions
from ctxfast.elmo.weights import StateDict, read_weights, write_hdf5

OPTIONS = "options.json"
SAFETENSORS = "model.safetensors"
HDF5 = "weights.hdf5"
_WHAT = (
    "options_file and weight_file must be local files: fetch <stem>_options.json and <stem>_weights.hdf5 of a "
    "published model (for the original one the stem is elmo_2x4096_512_2048cnn_2xhighway) and pass their paths"
)
_LARGEST_MEMBER = 16 << 30


def is_elmo(path: str | os.PathLike[str]) -> bool:
    """Whether a directory or a zip file looks like an ELMo: options and weights of one of its forms."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [Path(name) for name in archive.namelist()]
        elif os.path.isdir(path):
            names = [Path(name) for name in os.listdir(path)]
        else:
            return False
        _choose(names, path)
    except (OSError, ValueError):
        return False
    return True


def _choose(names: list[Path], where: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The options and the weights among the files of a directory or zip."""
    options = [n for n in names if n.name == OPTIONS] or [
        n for n in names if n.suffix == ".json" and "options" in n.name
    ]
    weights: list[Path] = []
    for good in (
        lambda n: n.name == SAFETENSORS,
        lambda n: n.name in ("model.hdf5", HDF5),
        lambda n: n.suffix in (".hdf5", ".h5") and "weights" in n.name,
        lambda n: n.suffix in (".hdf5", ".h5"),
    ):
        weights = weights or [n for n in names if good(n)]
    for kind, found in (("options", options), ("weights", weights)):
        if len(found) != 1:
            got = ", ".join(sorted(str(n) for n in found)) or "none"
            raise ValueError(f"an ELMo must have one file of {kind} in {where}, got {got}")
    return options[0], weights[0]


@contextmanager
def _located(
    options_file: str | os.PathLike[str] | None,
    weight_file: str | os.PathLike[str] | None,
    caller: str,
) -> Iterator[tuple[Path, Path]]:
    """Paths of both files, which exist inside the block."""
    for name, path in (("options_file", options_file), ("weight_file", weight_file)):
        if path is not None and not isinstance(path, str | os.PathLike):
            raise TypeError(f"{caller}: {name} must be a path, got {type(path).__name__}")
        if path is not None and "://" in os.fspath(path):
            raise ConfigurationError(f"{caller}: {_WHAT}; got the URL {path}")
    if options_file is None:
        raise ConfigurationError(f"{caller}: {_WHAT}; got none")
    source = Path(options_file).expanduser()
    if weight_file is not None:
        for path in (source, Path(weight_file).expanduser()):
            if not path.is_file():
                raise FileNotFoundError(f"{caller}: {_WHAT}; there is no file {path}")
        yield source, Path(weight_file).expanduser()
    elif source.is_dir():
        options, weights = _choose([Path(name) for name in os.listdir(source)], source)
        yield source / options, source / weights
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
            paths = []
            for member in _choose([Path(name) for name in archive.namelist()], source):
                info = archive.getinfo(member.as_posix())
                if info.file_size > _LARGEST_MEMBER:
                    raise ValueError(
                        f"{caller}: {source} must hold files of at most 16 GiB, got {info.file_size} bytes of {member}"
                    )
                target = Path(folder) / member.name
                with archive.open(info) as packed, target.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                paths.append(target)
            yield paths[0], paths[1]
    else:
        missing = "weight_file" if source.is_file() else os.fspath(source)
        raise FileNotFoundError(f"{caller}: {_WHAT}; there is no {missing}")


def load_model(
    options_file: str | os.PathLike[str] | None,
    weight_file: str | os.PathLike[str] | None,
    *,
    caller: str,
) -> tuple[ElmoOptions, StateDict]:
    """Options and weights of a model: from its two files, or from a directory or zip file that holds both.

    Raises ConfigurationError where no file is named, FileNotFoundError where one is missing, ValueError where one is
    damaged or they do not fit together.
    """
    with _located(options_file, weight_file, caller) as (options_path, weights_path):
        options = ElmoOptions.from_file(options_path)
        return options, read_weights(weights_path, options)


def save_model(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    options: ElmoOptions,
    *,
    form: str = "safetensors",
    caller: str = "save_model",
) -> None:
    """Writes options.json and model.safetensors, or with form "hdf5" weights.hdf5 as published."""
    if form not in ("safetensors", "hdf5"):
        raise ValueError(f'{caller}: form must be "safetensors" or "hdf5", got {form!r}')
    folder = make_directory(directory, caller=caller)
    if form == "safetensors":
        write_checkpoint(folder / SAFETENSORS, tensors, caller=caller)
    else:
        write_hdf5(folder / HDF5, tensors, options)
    text = json.dumps(options.to_dict(), indent=2) + "\n"
    write_atomically(folder / OPTIONS, lambda path: path.write_text(text, encoding="utf-8"))


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weight_file: str | os.PathLike[str] | None = None,
    form: str = "safetensors",
) -> ElmoOptions:
    """Reads an ELMo in any form and writes the directory `target` in the form asked for.

    source: a directory or zip file, or options.json with weight_file beside it
    """
    options, tensors = load_model(source, weight_file, caller="convert")
    from ctxfast.elmo.bilm import ElmoBiLm

    model = ElmoBiLm(options=options, tensors=tensors)  # refuses what is incomplete
    save_model(target, model.state_dict(), options, form=form, caller="convert")
    return options
