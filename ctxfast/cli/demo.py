"""`ctxfast demo`: the main job on real weights."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING

from ctxfast.cli.errors import Debug, Json
from ctxfast.cli.progress import Progress

if TYPE_CHECKING:
    from ctxfast.demo import DemoResult
    from ctxfast.demo_elmo import ElmoDemoResult


def demo(json: Json = False, debug: Debug = False) -> None:
    """Embed sentences with MiniLM, check them against the eager model and time both."""
    from ctxfast.demo import run_demo
    from ctxfast.demo_elmo import run_elmo_demo

    with Progress("steps") as progress:
        result = run_demo(progress)
    elmo = run_elmo_demo()
    if json:
        print(json_module.dumps(result.as_dict() | {"elmo": elmo.as_dict()}))
    else:
        _print(result)
        _print_elmo(elmo)
    if not result.agrees:
        raise RuntimeError(
            f"demo: the difference to {result.peer} must be one of rounding, got"
            f" {result.difference:.1e}"
        )
    if not elmo.agrees:
        raise RuntimeError(
            "demo: ELMo's difference to the eager reference must be one of rounding, got"
            f" {elmo.difference:.1e}"
        )


def _print_elmo(result: ElmoDemoResult) -> None:
    print(
        f"\nELMo of {result.parameters / 1e6:.1f} M random parameters, written and read in the published layout\n"
        f"  largest difference to the eager reference {result.difference:.1e} (largest value "
        f"{result.largest_value:.1f})\n"
        f"  {result.sentences} sentences, {result.words} words {result.reference * 1e3:16.1f} ms ->"
        f" {result.ctxfast * 1e3:7.1f} ms  {result.speedup:5.1f}x"
    )


def _print(result: DemoResult) -> None:
    print(f"model    {result.model}")
    print(f"device   {result.device}, {result.threads} threads, float32\n")
    print("Cosine similarity of mean-pooled vectors")
    for number, sentence in enumerate(result.sentences, 1):
        print(f"{number:4}  {sentence}")
    print("\n      " + "".join(f"{number:6}" for number in range(1, len(result.sentences) + 1)))
    for number, row in enumerate(result.similarity, 1):
        print(f"{number:4}  " + "".join(f"{value:6.2f}" for value in row))
    print(
        f"\nLargest difference to {result.peer}: {result.difference:.1e}"
        f" (largest value {result.largest_value:.1f})\n"
    )
    print(f"Speed against {result.peer}, medians of interleaved repeats")
    for timing in result.timings:
        print(
            f"  {timing.what:32} padding {timing.padding:4.0%}  {timing.peer * 1e3:8.1f} ms ->"
            f" {timing.ctxfast * 1e3:7.1f} ms  {timing.speedup:5.1f}x"
        )
