"""The kernels that work on rows (norms, losses, epilogues), compiled ahead of time for GPUs that are not there.

python -m ctxfast.ops._aot_rows            a Markdown table of the variants that the tests compile
python -m ctxfast.ops._aot_rows --json     one JSON object a line instead

Launch parameters come from the functions that launch the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import triton

from ctxfast.kernels import cross_entropy, layer_norm, layer_norm_bwd, linear
from ctxfast.ops import (
    _triton,
    _triton_cross_entropy,
    _triton_layer_norm_backward,
    _triton_linear,
)
from ctxfast.ops._aot import Resources, compile_kernel, write_rows
from ctxfast.ops._triton_layer_norm import norm_block, norm_warps

ARCHITECTURES = (80, 90, 100)
_NORM_TYPES = {
    "partial_ptr": "*fp32",
    "dsum_ptr": "*fp32",
    "eps": "fp32",
    "keep_scale": "fp32",
    "seed_ptr": "*i64",
    "ids_ptr": "*i64",
    "type_ids_ptr": "*i64",
    "position_ids_ptr": "*i64",
}
_COORDINATES = {"sequence_ptr": "*i64", "position_ptr": "*i64"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments. types: of the arguments that are no pointers to dtype and no i32."""

    name: str
    kernel: Any
    dtype: str
    features: int
    constants: dict[str, Any]
    num_warps: int
    types: dict[str, str]
    aligned: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """The name without its options: "linear epilogue backward"."""
        return self.name.split(",")[0].split(" with")[0]

    def compile(self, arch: int) -> Resources:
        names = self.kernel.arg_names
        types = {name: f"*{self.dtype}" for name in names if name.endswith("_ptr")}
        return compile_kernel(
            self.kernel,
            arch,
            types | {name: t for name, t in self.types.items() if name in names},
            self.constants,
            {"num_warps": self.num_warps},
            aligned=self.aligned,
        )


def _norms(dtype: str, features: int, *, backward: bool) -> Iterator[Variant]:
    add, embed = layer_norm.add_layer_norm_fwd, layer_norm.embed_layer_norm_fwd
    suffix = ""
    if backward:
        add, embed = layer_norm_bwd.add_layer_norm_bwd, layer_norm_bwd.embed_layer_norm_bwd
        suffix = " backward"
    block = norm_block(features)
    constants: dict[str, Any] = {"N": features, "BLOCK_N": block}
    common = (dtype, features)
    plain = constants | {"RESIDUAL": True, "DROPOUT": False}
    plain |= dict.fromkeys(("seed_ptr", "sequence_ptr", "position_ptr"))
    if backward:
        plain["dresidual_ptr"] = None
    drop = constants | {"RESIDUAL": True, "DROPOUT": True}
    types = _NORM_TYPES | _COORDINATES
    warps = norm_warps(block)
    yield Variant(f"add_layer_norm{suffix}", add, *common, plain, warps, types)
    yield Variant(f"add_layer_norm{suffix}, dropout", add, *common, drop, warps, types)
    yield Variant(f"embed_layer_norm{suffix}", embed, *common, constants, warps, _NORM_TYPES)


def _sums(dtype: str) -> Iterator[Variant]:
    launch = _triton_layer_norm_backward
    yield Variant(
        "column_sum",
        layer_norm_bwd.column_sum,
        dtype,
        768,
        {"BLOCK_P": launch.BLOCK_P, "BLOCK_N": launch.BLOCK_N},
        launch.SUM_WARPS,
        _NORM_TYPES,
        ("columns",),
    )
    yield Variant(
        "segment_sum",
        layer_norm_bwd.segment_sum,
        dtype,
        768,
        {"N": 768, "BLOCK_T": launch.BLOCK_T, "BLOCK_N": launch.SEGMENT_BLOCK_N},
        launch.SUM_WARPS,
        {"rows_ptr": "*fp32", "order_ptr": "*i64", "offsets_ptr": "*i64"},
    )


def _losses(dtype: str, vocabulary: int) -> Iterator[Variant]:
    block = _triton_cross_entropy.block(vocabulary)
    types = {"labels_ptr": "*i64", "losses_ptr": "*fp32", "scale_ptr": "*fp32"}
    for gradient in (False, True):
        yield Variant(
            "cross_entropy with gradient" if gradient else "cross_entropy",
            cross_entropy.cross_entropy,
            dtype,
            vocabulary,
            {"BLOCK": block, "GRADIENT": gradient},
            _triton_cross_entropy.warps(block),
            types,
        )


def _epilogues(dtype: str, activations: tuple[str, ...]) -> Iterator[Variant]:
    launch = _triton_linear
    for activation in activations:
        yield Variant(
            f"linear epilogue, {activation} + residual",
            linear.linear_epilogue_fwd,
            dtype,
            3072,
            {"ACTIVATION": activation, "RESIDUAL": True, "BLOCK": launch.BLOCK},
            launch.WARPS,
            {},
            ("size",),
        )
        if activation != "none":
            yield Variant(
                f"linear epilogue backward, {activation}",
                linear.linear_epilogue_bwd,
                dtype,
                3072,
                {
                    "ACTIVATION": activation,
                    "SUMS": True,
                    "BLOCK_M": launch.BLOCK_M,
                    "BLOCK_N": launch.BLOCK_N,
                },
                launch.WARPS,
                {"partial_ptr": "*fp32"},
                ("columns",),
            )


def variants() -> Iterator[Variant]:
    """What BERT-base trains with in bfloat16, and the largest rows in float32."""
    for backward in (False, True):
        yield from _norms("bf16", 768, backward=backward)
    yield from _norms("fp32", _triton.LARGEST_NORM, backward=False)
    yield from _norms("fp32", _triton.LARGEST_NORM_BACKWARD, backward=True)
    yield from _sums("bf16")
    yield from _losses("bf16", 30522)
    yield from _losses("fp32", 30522)
    yield from _epilogues("bf16", ("none", "gelu", "gelu_tanh", "tanh"))
    yield from _epilogues("fp32", ("gelu",))


def one_each() -> Iterator[Variant]:
    """The first of every kernel: the variants of the ordinary test run."""
    seen: set[str] = set()
    for variant in variants():
        if variant.role not in seen:
            seen.add(variant.role)
            yield variant


def record(variant: Variant, arch: int) -> dict[str, Any]:
    """What the tests and the table read of one variant."""
    resources = variant.compile(arch)
    return {
        "kernel": variant.name,
        "role": variant.role,
        "dtype": variant.dtype,
        "features": variant.features,
        "num_warps": variant.num_warps,
        "arch": arch,
        "registers": resources.registers,
        "stack": resources.stack,
        "shared": resources.shared,
        "load": resources.load,
    }


_COLUMNS = {
    "kernel": "kernel",
    "dtype": "dtype",
    "features": "features",
    "num_warps": "warps",
    "arch": "sm",
    "registers": "registers",
    "stack": "stack",
    "shared": "shared, bytes",
    "load": "widest load, bits",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of the kernels on rows, by sm_80 ...")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="each kernel once an architecture")
    arguments = parser.parse_args()
    chosen = one_each() if arguments.quick else variants()
    write_rows(
        (record(variant, arch) for variant in chosen for arch in ARCHITECTURES),
        _COLUMNS,
        "# Kernels on rows, compiled ahead of time\n\n"
        f"Triton {triton.__version__}, `python -m ctxfast.ops._aot_rows`. No GPU took part.\n"
        "Stack: bytes a thread; spilled registers would show there.\n",
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
