"""Every attention kernel of the launch tables, compiled ahead of time for GPUs that are not there.

python -m ctxfast.ops._aot_attention             a Markdown table of one or two variants of every kernel
python -m ctxfast.ops._aot_attention --table     of head sizes 64 and 128: benchmarks/results/resources_attention.md
python -m ctxfast.ops._aot_attention --full      of all variants, one hour of one core
python -m ctxfast.ops._aot_attention --cell bf16-64-90    of all variants of one dtype, head size and architecture
python -m ctxfast.ops._aot_attention --quick     of the few that take seconds
python -m ctxfast.ops._aot_attention --json      one JSON object a line instead
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import triton

from ctxfast.kernels import attention_tables as tables
from ctxfast.kernels.attention import attention_fwd
from ctxfast.kernels.attention_bwd_bias import attention_bwd_bias
from ctxfast.kernels.attention_bwd_key import attention_bwd_key
from ctxfast.kernels.attention_bwd_query import attention_bwd_delta, attention_bwd_query
from ctxfast.kernels.attention_tables import GRANULE, Features, Launch
from ctxfast.ops._aot import Resources, compile_kernel, write_rows

KERNELS = {
    "forward": attention_fwd,
    "backward delta": attention_bwd_delta,
    "backward query": attention_bwd_query,
    "backward key": attention_bwd_key,
    "backward one block": attention_bwd_key,
    "backward bias": attention_bwd_bias,
}
_OPTIONAL = {
    "cu_seqlens_q_ptr": "varlen",
    "cu_seqlens_k_ptr": "varlen",
    "tile_ptr": "varlen",
    "key_mask_ptr": "key_mask",
    "key_range_ptr": "key_mask",
    "mask_ptr": "attn_mask",
    "bias_ptr": "bias",
    "seed_ptr": "dropout",
}
_TYPES = {
    "scale": "fp32",
    "keep_scale": "fp32",
    "lse_ptr": "*fp32",
    "shifted_lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "grad_lse_ptr": "*fp32",
    "cu_seqlens_q_ptr": "*i32",
    "cu_seqlens_k_ptr": "*i32",
    "tile_ptr": "*i32",
    "key_mask_ptr": "*i32",
    "key_range_ptr": "*i32",
    "mask_ptr": "*u8",
    "seed_ptr": "*i64",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel of the launch tables. length: the sequence length that chose the launch parameters."""

    kernel: str
    arch: int
    dtype: str
    features: Features
    length: int

    @property
    def launch(self) -> Launch | None:
        """None where the tables hold no such kernel."""
        key = (self.arch, self.dtype, self.features)
        if self.kernel == "forward":
            return tables.forward_launch(*key, self.length)
        if self.kernel == "backward delta":
            return tables.delta_launch(self.features)
        if self.kernel == "backward query":
            return tables.query_launch(*key)
        if self.kernel == "backward key":
            return tables.key_launch(*key)
        if self.kernel == "backward one block":
            return tables.one_block_launch(*key, self.length)
        return tables.bias_launch(*key) if self.features.bias else None

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is specialised for; None for pointers that are absent."""
        kernel, launch = KERNELS[self.kernel], self.launch
        assert launch is not None
        constants: dict[str, Any] = {
            **self.features.constants(),
            **launch.constants(),
            "GRANULE": GRANULE,
            "ONE_BLOCK": self.kernel == "backward one block",
            "SUM_B": True,  # a bias shared over the batch
            "SUM_H": False,
            "SUM_M": self.features.bias == 2,
            "SUM_N": False,
        }
        for name, feature in _OPTIONAL.items():
            if not getattr(self.features, feature):
                constants[name] = None
        if self.kernel == "backward key":
            constants["dq_ptr"] = None
        if self.kernel == "backward one block":
            constants["tile_ptr"] = None
        for name in ("bias", "mask"):
            constants[f"stride_{name}_n"] = 1
        return {n: value for n, value in constants.items() if n in kernel.arg_names}

    def compile(self) -> Resources:
        """Compile with strides divisible by 16 and masks and biases contiguous along the keys."""
        kernel, launch = KERNELS[self.kernel], self.launch
        assert launch is not None
        pointers = (name for name in kernel.arg_names if name.endswith("_ptr"))
        types = {**{name: f"*{self.dtype}" for name in pointers}, **_TYPES}
        return compile_kernel(kernel, self.arch, types, self.constants, launch.options())


def _features(names: str, head_dim: int) -> Features:
    """From "window dropout", "varlen bias", "key bias", ..."""
    flags: dict[str, Any] = {}
    for name in names.split():
        if name == "key":
            flags["bias"] = 2
        elif name == "bias":
            flags["bias"] = flags.get("bias", 1)
        elif name == "tf32":
            flags["input_precision"] = "tf32"
        elif name != "plain":
            flags[name] = True
    return Features(head_dim, **flags)


_QUICK = (  # in the form of _SUBSET
    ("forward", "bf16", 64, 512, ("plain", "varlen dropout")),
    ("backward query", "bf16", 64, 512, ("varlen dropout",)),
    ("backward key", "bf16", 64, 512, ("varlen dropout",)),
    ("backward one block", "bf16", 64, 128, ("key_mask dropout",)),
)
_SUBSET = (
    ("forward", "bf16", 64, 512, ("plain", "varlen dropout", "key_mask window", "bias dropout")),
    ("forward", "bf16", 128, 512, ("key_mask dropout",)),
    ("backward query", "bf16", 64, 512, ("plain", "varlen dropout")),
    ("backward key", "bf16", 64, 512, ("plain", "varlen dropout")),
    ("backward key", "bf16", 128, 512, ("key_mask dropout",)),
    ("backward one block", "bf16", 64, 128, ("plain", "key_mask dropout")),
)
_COMBINATIONS = (
    "plain",
    "varlen",
    "key_mask",
    "window",
    "varlen window",
    "key_mask window",
    "attn_mask",
    "bias",
    "key bias",
    "varlen bias",
    "attn_mask key_mask bias window",
)
_EXTREMES = ("plain", "varlen window", "attn_mask key_mask bias window")
_TF32 = tuple(f"{names} tf32" for names in _EXTREMES)
_GRID = (  # dtype, head sizes, architectures, features, each with and without dropout
    ("bf16", (64, 128), (80, 90, 100), _COMBINATIONS),
    ("bf16", (16, 32, 256), (80, 90, 100), _EXTREMES),
    ("fp32", (64, 128), (80, 90, 100), _EXTREMES + _TF32),
    ("fp16", (64, 128), (80, 90, 100), _EXTREMES),
    ("bf16", (64, 128, 256), (86, 89), _EXTREMES),
    ("fp32", (64, 256), (86,), _EXTREMES),
)
_LENGTHS = (32, 64, 128, 512)
_TABLE = (
    "plain",
    "dropout",
    "varlen dropout",
    "key_mask dropout",
    "attn_mask",
    "bias",
    "attn_mask key_mask bias window dropout",
)


def quick() -> Iterator[Variant]:
    """The variants of the ordinary test run."""
    return _variants(_QUICK, (90,))


def subset() -> Iterator[Variant]:
    """One or two variants of every kernel on three architectures."""
    return _variants(_SUBSET, (80, 90, 100))


def _variants(rows: tuple[Any, ...], architectures: tuple[int, ...]) -> Iterator[Variant]:
    for kernel, dtype, head_dim, length, combinations in rows:
        for names, arch in itertools.product(combinations, architectures):
            variant = Variant(kernel, arch, dtype, _features(names, head_dim), length)
            if variant.launch is not None:
                yield variant


def everything() -> Iterator[Variant]:
    """Every kernel, architecture, head size and precision of the tables, with the features that differ in kind.

    Features and lengths that lead to the same launch and constants are one variant.
    """
    seen = set()
    for kernel, (dtype, sizes, architectures, combinations) in itertools.product(KERNELS, _GRID):
        for head_dim, arch, names, drop, length in itertools.product(
            sizes, architectures, combinations, ("", " dropout"), _LENGTHS
        ):
            variant = Variant(kernel, arch, dtype, _features(names + drop, head_dim), length)
            if variant.launch is None:
                continue
            key = (kernel, arch, dtype, variant.launch, tuple(variant.constants.items()))
            if key not in seen:
                seen.add(key)
                yield variant


def cells() -> list[str]:
    """What `everything` can be cut into: dtype, head size and architecture, as in "bf16-64-90"."""
    return [
        f"{dtype}-{head_dim}-{arch}"
        for dtype, sizes, architectures, _ in _GRID
        for head_dim, arch in itertools.product(sizes, architectures)
    ]


def cell(name: str) -> Iterator[Variant]:
    """The variants of everything() in one of cells()."""
    for variant in everything():
        if name == f"{variant.dtype}-{variant.features.head_dim}-{variant.arch}":
            yield variant


def table() -> Iterator[Variant]:
    """What the committed table lists: every kernel with each feature, and with everything at once."""
    for kernel in KERNELS:
        length = 128 if kernel == "backward one block" else 512
        dtypes = (("bf16", _TABLE), ("fp32", (_TABLE[0], _TABLE[-1])))
        yield from _variants(
            tuple((kernel, dtype, d, length, names) for dtype, names in dtypes for d in (64, 128)),
            (80, 90, 100),
        )


def scores_per_loop(variant: Variant) -> float:
    """Scores that one thread handles in one step of its inner loop."""
    launch = variant.launch
    assert launch is not None
    return launch.block_m * launch.block_n / (32 * launch.num_warps)


def per_score(variant: Variant, resources: Resources) -> float | None:
    """Instructions per score in the loop over blocks that need no mask: the shorter of the two large loops."""
    if not resources.loops or variant.kernel == "backward delta":
        return None
    steps = [n for n in resources.loops if n > resources.loops[0] / 3]
    return min(steps) / scores_per_loop(variant)


def record(variant: Variant) -> dict[str, Any]:
    """What the tests and the table read of one variant."""
    resources, launch = variant.compile(), variant.launch
    assert launch is not None
    instructions = per_score(variant, resources)
    return {
        "kernel": variant.kernel,
        "arch": variant.arch,
        "dtype": variant.dtype,
        "head_dim": variant.features.head_dim,
        "features": describe(variant.features),
        "length": variant.length,
        "dropout": variant.features.dropout,
        "tile": f"{launch.block_m} x {launch.block_n}",
        **dataclasses.asdict(launch),
        "registers": resources.registers,
        "stack": resources.stack,
        "shared": resources.shared,
        "matmul": resources.matmul,
        "per_score": None if instructions is None else round(instructions, 1),
    }


def describe(features: Features) -> str:
    names = ["varlen", "key_mask", "attn_mask", "window", "dropout"]
    found = [name for name in names if getattr(features, name)]
    if features.input_precision == "tf32":
        found.append("tf32")
    if features.bias:
        found.append("bias" if features.bias == 1 else "key bias")
    return " ".join(found) or "plain"


_COLUMNS = {
    "kernel": "kernel",
    "arch": "sm",
    "dtype": "dtype",
    "head_dim": "D",
    "features": "features",
    "tile": "tile",
    "num_warps": "warps",
    "num_stages": "stages",
    "registers": "registers",
    "stack": "stack",
    "shared": "shared, bytes",
    "matmul": "tensor cores",
    "per_score": "instructions per score",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of the attention kernels, by sm_80 ...")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all variants")
    size.add_argument("--table", action="store_true", help="what the committed table lists")
    size.add_argument("--cell", choices=cells(), help="all variants of one part")
    size.add_argument("--quick", action="store_true", help="few variants, in seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    choices = {"full": everything, "table": table, "quick": quick}
    chosen = next((name for name in choices if getattr(arguments, name)), None)
    option = "" if chosen is None else f" --{chosen}"
    variants = choices.get(chosen or "", subset)()
    if arguments.cell is not None:
        option, variants = f" --cell {arguments.cell}", cell(arguments.cell)
    write_rows(
        (record(variant) for variant in variants),
        _COLUMNS,
        "# Attention kernels, compiled ahead of time\n\n"
        f"Triton {triton.__version__}, `python -m ctxfast.ops._aot_attention{option}`. No GPU took part.\n\n"
        "Stack: bytes a thread; spilled registers would show there.\n"
        "Instructions per score: one step of the loop without masks, per thread, over its scores.\n",
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
