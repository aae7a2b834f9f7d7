"""The commands and what they are called."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated

import typer

from ctxfast.cli.errors import Debug

app = typer.Typer(
    name="ctxfast",
    help="Contextual word representations, fast: BERT and ELMo on fused kernels, for GPU and CPU.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    invoke_without_command=True,
)


def _print_version(value: bool) -> None:
    if value:
        import ctxfast

        print(f"ctxfast {ctxfast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Debug = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


_SUMMARIES = {
    "info": "Show versions, devices and operators.",
    "embed": "Write contextual vectors of a text file.",
    "convert": "Rewrite a model's weights in another file format.",
    "demo": "Embed, check and time sentences.",
    "bench": "Measure speed against installed peers.",
}

for _name, _summary in _SUMMARIES.items():
    if importlib.util.find_spec(f"ctxfast.cli.{_name}") is not None:
        _module = importlib.import_module(f"ctxfast.cli.{_name}")
        app.command(_name, short_help=_summary)(getattr(_module, _name))
