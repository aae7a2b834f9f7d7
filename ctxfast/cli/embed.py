"""`ctxfast embed`: contextual vectors of a text file."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

import typer

from ctxfast.cli.errors import Debug, Json
from ctxfast.cli.progress import Progress


def embed(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="BERT or ELMo directory, or a hub id.")
    ],
    input: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="UTF-8 text, one sentence a line; .gz; - is stdin."),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="OUT", help=".h5, .hdf5, .npz or .safetensors."),
    ],
    pooling: Annotated[
        str,
        typer.Option(
            metavar="tokens|mean|cls|max|pooler",
            help="One vector per token, or per line. Blank lines: no token, or a zero vector.",
        ),
    ] = "mean",
    layers: Annotated[
        str,
        typer.Option(
            metavar="top|all|average|mix|-1,-2,...",
            help="Which layers; mix is ELMo's scalar mix, 0 the embedding output.",
        ),
    ] = "top",
    mix_weights: Annotated[
        str | None,
        typer.Option(metavar="W0,W1,...", help="Weights of the mix before the softmax."),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale pooled vectors to length 1.")
    ] = False,
    overlong: Annotated[
        str,
        typer.Option(metavar="truncate|split|error", help="Lines longer than the model takes."),
    ] = "truncate",
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens a line, [CLS] and [SEP] included. [model's limit]"),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens encoded at once.")
    ] = 4096,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="float32|float16|bfloat16",
            help="Of the stored vectors; bfloat16 needs .safetensors.",
        ),
    ] = "float32",
    compute_dtype: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|float16|int8",
            help="Of the model; float16 on GPU only, int8 for a BERT on CPU.",
        ),
    ] = "float32",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where the model runs.")
    ] = "auto",
    stateful: Annotated[
        str,
        typer.Option(
            metavar="reset|carry", help="ELMo: states of each line anew, or carried in file order."
        ),
    ] = "reset",
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Lines of a batch with --stateful carry.")
    ] = 64,
    layout: Annotated[
        str,
        typer.Option(metavar="ctxfast|allennlp", help="ELMo: allennlp is that of `allennlp elmo`."),
    ] = "ctxfast",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing OUT.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write contextual vectors of a text file, one sentence a line.

    Pooled output holds `embeddings` [N, D]; --pooling tokens holds `vectors` [T, D], `offsets`
    [N + 1] and `tokens` [T]; several layers add an axis before D. ctxfast.load_embeddings reads
    all formats back.
    """
    from ctxfast.embeddings.options import EmbedOptions, parse_layers, parse_weights

    options = EmbedOptions(
        pooling="tokens" if layout == "allennlp" else pooling,
        layers=parse_layers(layers),
        mix_weights=None if mix_weights is None else parse_weights(mix_weights),
        normalize=normalize,
        overlong=overlong,
        max_length=max_length,
        batch_tokens=batch_tokens,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        stateful=stateful,
        batch_size=batch_size,
        layout=layout,
    )
    from ctxfast.embeddings.job import embed_file

    with Progress("lines") as progress:
        report = embed_file(model, input, output, options, overwrite=force, progress=progress)
    if json:
        print(json_module.dumps(report.as_dict()))
        return
    rate = report.lines / max(report.seconds, 1e-9)
    notes = [f"{report.lines} lines", f"{report.tokens} tokens", f"{report.seconds:.1f} s"]
    notes.append(f"{rate:.0f} lines/s")
    if report.blank_lines:
        notes.append(f"{report.blank_lines} blank")
    if report.overlong_lines:
        done = "truncated" if overlong == "truncate" else overlong
        notes.append(f"{report.overlong_lines} overlong: {done}")
    print(
        f"{report.output}: {report.dtype} {list(report.shape)}, {', '.join(notes)}", file=sys.stderr
    )
