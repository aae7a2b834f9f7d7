"""Grids and launches of the attention kernels in `ctxfast.kernels`. Imported only where Triton is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from ctxfast.kernels import attention_plan, attention_tables
from ctxfast.kernels.attention import attention_fwd
from ctxfast.kernels.attention_tables import GRANULE, Features

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OPEN = 1 << 30  # an open side of a window
_INT32 = 2**31
_LARGEST_BLOCK = 256


@functools.cache
def table_architecture(device: torch.device) -> int:
    """The launch table of a device; 0 is the interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return attention_tables.architecture(10 * major + minor)


def build_tile_map(cu_seqlens: Tensor, total: int) -> Tensor:
    """int32 [tiles, 2]: (sequence, block of 128 rows), longest sequences first, (-1, 0) where unused.

    A function of the offsets [B + 1] and of the number of packed rows, so one map serves every layer and the backward
    of a batch. Nothing is read back from the device.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    num_tiles = total // GRANULE + num_sequences + 1
    tiles = cu_seqlens.new_empty((num_tiles, 2))
    launch(
        attention_plan.tile_map,
        num_sequences + 2,
        cu_seqlens,
        dict(
            cu_seqlens_ptr=cu_seqlens,
            map_ptr=tiles,
            num_sequences=num_sequences,
            total=total,
            num_tiles=num_tiles,
            GRANULE=GRANULE,
            BLOCK=128,
        ),
    )
    return tiles


def launch(kernel: Any, programs: int, on: Tensor, arguments: dict[str, Any]) -> None:
    """Run a kernel with named arguments on the device and current stream of tensor `on`."""
    if programs == 0:
        return
    if on.device.type == "cuda":
        with torch.cuda.device(on.device):
            kernel[(programs,)](**arguments)
    else:
        kernel[(programs,)](**arguments)


def with_rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension and 32-bit offsets inside a tile; a copy only where needed."""
    fits = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if fits and abs(x.stride(-2)) * _LARGEST_BLOCK < _INT32 else x.contiguous()


def row_strides(x: Tensor, name: str, varlen: bool) -> dict[str, int]:
    """Strides of batch, head and row of [B, H, S, D], or of [T, H, D]."""
    if varlen:
        row, head, _ = x.stride()
        batch = 0
    else:
        batch, head, row, _ = x.stride()
    return {
        f"stride_{name}b": batch,
        f"stride_{name}h": head,
        f"stride_{name}s": row,
    }


def _tile_strides(x: Tensor | None, name: str) -> dict[str, int]:
    strides = (0, 0, 0, 0) if x is None else x.stride()
    return {f"stride_{name}_{d}": s for d, s in zip("bhmn", strides, strict=True)}


@dataclass
class Problem:
    """One attention call, in the form that every kernel takes its arguments.

    query, key, value: [B, H, S, D], or packed [T, H, D] with offsets cu_seqlens_q and cu_seqlens_k.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    seed: Tensor | None
    is_causal: bool
    window_left: int
    window_right: int
    dropout_p: float
    scale: float
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    allow_tf32: bool = False
    tile_map_q: Tensor | None = None
    tile_map_k: Tensor | None = None
    sign: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        if self.scale <= 0.0:  # the kernels take maxima before they scale
            self.sign = -1.0 if self.scale < 0.0 else 0.0
            self.query = self.query * self.sign
            self.scale = -self.scale or 1.0
        self.query = with_rows(self.query)
        self.key = with_rows(self.key)
        self.value = with_rows(self.value)
        self.varlen = self.cu_seqlens_q is not None
        if self.varlen:
            assert self.cu_seqlens_q is not None
            self.rows_q, self.heads, self.head_dim = self.query.shape
            self.rows_k = self.key.shape[0]
            self.num_sequences = self.cu_seqlens_q.shape[0] - 1
        else:
            self.num_sequences, self.heads, self.rows_q, self.head_dim = self.query.shape
            self.rows_k = self.key.shape[2]
            self.max_seqlen_q, self.max_seqlen_k = self.rows_q, self.rows_k
        scores = (self.num_sequences, self.heads, self.max_seqlen_q, self.max_seqlen_k)
        self.mask = None
        if self.attn_mask is not None:
            self.mask = self.attn_mask.view(torch.uint8).expand(scores)
        self.full_bias = None if self.bias is None else self.bias.expand(scores)
        self.key_mask, self.key_ranges = self._plan_keys()
        self.arch = table_architecture(self.query.device)
        self.dtype = DTYPES[self.query.dtype]

    def _plan_keys(self) -> tuple[Tensor | None, Tensor | None]:
        if self.key_padding_mask is None:
            return None, None
        mask = self.key_padding_mask.view(torch.uint8)
        valid = mask.new_empty(mask.shape, dtype=torch.int32)
        ranges = mask.new_empty((self.num_sequences, 3), dtype=torch.int32)
        launch(
            attention_plan.key_ranges,
            self.num_sequences,
            mask,
            dict(
                mask_ptr=mask,
                valid_ptr=valid,
                ranges_ptr=ranges,
                stride_b=mask.stride(0),
                stride_s=mask.stride(1),
                rows=self.rows_k,
                BLOCK=1024,
            ),
        )
        return valid, ranges

    @functools.cached_property
    def features(self) -> Features:
        bias = 0
        if self.full_bias is not None:
            bias = 2 if self.full_bias.stride(2) == 0 else 1
        return Features(
            head_dim=self.head_dim,
            varlen=self.varlen,
            key_mask=self.key_mask is not None,
            attn_mask=self.mask is not None,
            bias=bias,
            window=self.is_causal or self.window_left >= 0 or self.window_right >= 0,
            dropout=self.dropout_p > 0.0,
            input_precision="tf32" if self.allow_tf32 else "ieee",
        )

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with a causal mask folded in and open sides made large."""
        right = OPEN if self.window_right < 0 else self.window_right
        return OPEN if self.window_left < 0 else self.window_left, 0 if self.is_causal else right

    @property
    def drop(self) -> tuple[int, float]:
        """16-bit threshold, and the reciprocal of the realised keep probability; 0.0 where nothing is kept."""
        threshold = int(self.dropout_p * 65536 + 0.5)
        if threshold == 65536:
            return 65535, 0.0
        return threshold, 65536 / (65536 - threshold)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The kernel arguments that forward and backward share."""
        left, right = self.window
        threshold, keep_scale = self.drop
        arguments: dict[str, Any] = dict(
            q_ptr=self.query,
            k_ptr=self.key,
            v_ptr=self.value,
            cu_seqlens_q_ptr=self.cu_seqlens_q,
            cu_seqlens_k_ptr=self.cu_seqlens_k,
            key_mask_ptr=self.key_mask,
            key_range_ptr=self.key_ranges,
            mask_ptr=self.mask,
            bias_ptr=self.full_bias,
            seed_ptr=self.seed,
            scale=self.scale,
            keep_scale=keep_scale,
            threshold=threshold,
            window_left=left,
            window_right=right,
            rows_q=self.rows_q,
            rows_k=self.rows_k,
            num_heads=self.heads,
            num_sequences=self.num_sequences,
            stride_key_mask_b=0 if self.key_mask is None else self.key_mask.stride(0),
            **row_strides(self.query, "q", self.varlen),
            **row_strides(self.key, "k", self.varlen),
            **row_strides(self.value, "v", self.varlen),
            **_tile_strides(self.mask, "mask"),
            **_tile_strides(self.full_bias, "bias"),
            **self.features.constants(),
        )
        return arguments

    def lse_strides(self) -> dict[str, int]:
        """Of [B, H, S], or of packed [H, T]."""
        return dict(
            stride_lse_b=0 if self.varlen else self.heads * self.rows_q, stride_lse_h=self.rows_q
        )

    def query_programs(self, block: int) -> tuple[int, Tensor | None]:
        """How many programs own `block` queries each, and the tile map they follow."""
        if not self.varlen:
            return self.num_sequences * self.heads * triton.cdiv(self.rows_q, block), None
        assert self.cu_seqlens_q is not None
        if self.tile_map_q is None:
            self.tile_map_q = build_tile_map(self.cu_seqlens_q, self.rows_q)
        return self.tile_map_q.shape[0] * (GRANULE // block) * self.heads, self.tile_map_q

    def key_programs(self, block: int) -> tuple[int, Tensor | None]:
        """How many programs own `block` keys each, and the tile map they follow."""
        if not self.varlen:
            return self.num_sequences * self.heads * triton.cdiv(self.rows_k, block), None
        assert self.cu_seqlens_k is not None
        if self.tile_map_k is None and self.cu_seqlens_k is self.cu_seqlens_q:
            self.tile_map_k = self.tile_map_q
        if self.tile_map_k is None:
            self.tile_map_k = build_tile_map(self.cu_seqlens_k, self.rows_k)
        return self.tile_map_k.shape[0] * (GRANULE // block) * self.heads, self.tile_map_k

    def empty_like_rows(self, x: Tensor) -> Tensor:
        """Uninitialised [T, H, D], or a [B, H, S, D] view of [B, S, H, D] memory."""
        if self.varlen:
            return x.new_empty(x.shape)
        batch, heads, rows, head_dim = x.shape
        return x.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output, and lse float32 [B, H, Sq] or [H, T]."""
    leading = () if problem.varlen else (problem.num_sequences,)
    shape = (*leading, problem.heads, problem.rows_q)
    output = problem.empty_like_rows(problem.query)
    lse = problem.query.new_empty(shape, dtype=torch.float32)
    table = attention_tables.forward_launch(
        problem.arch, problem.dtype, problem.features, problem.max_seqlen_q
    )
    programs, tiles = problem.query_programs(table.block_m)
    launch(
        attention_fwd,
        programs,
        output,
        dict(
            output_ptr=output,
            lse_ptr=lse,
            tile_ptr=tiles,
            GRANULE=GRANULE,
            **row_strides(output, "o", problem.varlen),
            **problem.lse_strides(),
            **problem.arguments,
            **table.constants(),
            **table.options(),
        ),
    )
    return output, lse
