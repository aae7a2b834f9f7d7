"""`ctxfast convert`: a model's weights from one file format to another."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from ctxfast.cli.errors import Debug, Json


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="ELMo directory or zip file, or options.json with --weights."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Directory to write.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="hdf5, safetensors or .th file beside options.json."),
    ] = None,
    to: Annotated[
        str, typer.Option(metavar="safetensors|hdf5", help="Form; hdf5 is the published one.")
    ] = "safetensors",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read an ELMo in any of its forms and write options.json with model.safetensors or weights.hdf5."""
    from ctxfast.elmo.files import convert as convert_model

    options = convert_model(source, target, weight_file=weights, form=to)
    if json:
        print(json_module.dumps({"target": target, "form": to, "options": options.to_dict()}))
    else:
        print(f"{target}: {options.n_layers} layers of {options.dim}, {to}")
