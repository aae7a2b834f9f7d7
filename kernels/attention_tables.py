"""Launch parameters of the attention kernels: tables, not an autotuner, so that results never change from run to run.

A table maps (architecture, dtype, head size) to tiles. The architectures are 80 (A100), 86 and 89 (99 KB of shared
memory), 90 (Hopper) and 100 (Blackwell); others take the nearest below. Entry 0 is the interpreter. Every variant is
compiled ahead of time in the tests, and spilled registers or too much shared memory fail there.

The rows were chosen by static analysis for every architecture, no spilled registers first, then instructions per score
and warps that fit a multiprocessor; none has been timed on a GPU yet.

One table serves Triton 3.6 and 3.9. At head sizes 64 and 128 only the gradient of keys in float32 on sm_80 spills more
than 16 bytes a thread: 24 with dropout at 64, 80 to 104 with mask, bias and window at 128.
"""

from dataclasses import dataclass

GRANULE = 128  # rows of a tile of a packed batch; tiles of the kernels divide it


@dataclass(frozen=True)
class Features:
    """What a call asks for; every combination is a kernel of its own.

    bias: 0 none, 1 any, 2 the same for every query.
    """

    head_dim: int
    varlen: bool = False
    key_mask: bool = False
    attn_mask: bool = False
    bias: int = 0
    window: bool = False
    dropout: bool = False
    input_precision: str = "ieee"

    @property
    def block_d(self) -> int:
        """The head size as the kernels see it: a power of two, at least 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def reads_tiles(self) -> bool:
        """Whether a mask or a bias is read for every score."""
        return self.attn_mask or self.bias == 1

    @property
    def is_tf32(self) -> bool:
        return self.input_precision == "tf32"

    def constants(self) -> dict:
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "VARLEN": self.varlen,
            "KEY_MASK": self.key_mask,
            "ATTN_MASK": self.attn_mask,
            "BIAS": self.bias,
            "WINDOW": self.window,
            "DROPOUT": self.dropout,
            "INPUT_PRECISION": self.input_precision,
        }


@dataclass(frozen=True)
class Launch:
    """Tile of queries and keys, warps, and stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    def options(self) -> dict:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


ARCHITECTURES = (80, 86, 89, 90, 100)


def architecture(capability: int) -> int:
    """The newest table at or below a compute capability (80, 86, ..., 120)."""
    if capability >= 120:  # consumer Blackwell has neither tcgen05 nor the shared memory of 100
        return 89
    return max(arch for arch in ARCHITECTURES if arch <= capability)


def forward_launch(arch: int, dtype: str, features: Features, seqlen_q: int) -> Launch:
    """dtype: "fp16", "bf16" or "fp32"."""
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if dtype == "fp32":
        return _query_rows_of_float32(features)
    if features.block_d > 128:
        return Launch(64, 64, 8, 1 if arch in (86, 89) else 2)
    if features.block_d > 64:
        return _forward_launch_of_large_heads(arch, features)
    # A tile of 128 queries would be at least three quarters waste.
    if seqlen_q <= 32:
        return Launch(32, 64, 4, 2)
    if seqlen_q <= 64:
        return Launch(64, 64, 4, 2)
    if arch < 90 or features.reads_tiles:
        return Launch(128, 64, 8, 2)
    return Launch(128, 128, 8, 2) if features.dropout else Launch(128, 64, 4, 3)


def _forward_launch_of_large_heads(arch: int, features: Features) -> Launch:
    """The output of 128 columns takes half of the registers."""
    if arch < 90 and features.reads_tiles:
        return Launch(64, 64, 8, 1)
    reads_both = features.attn_mask and features.bias == 1
    if (arch < 90 and features.window and features.dropout) or (arch == 90 and reads_both):
        return Launch(128, 32, 8, 2)
    if arch >= 100 and features.bias == 1 and features.dropout:
        return Launch(64, 64, 4, 2)
    if arch < 90 or features.reads_tiles or features.dropout or features.window:
        return Launch(128, 64, 8, 2)
    return Launch(128, 64 if arch == 90 and features.key_mask else 128, 8, 2)


def _query_rows_of_float32(features: Features) -> Launch:
    """Outside the tensor cores accumulators and operands share the registers of a thread.

    Triton 3.6 gives tiles of 64 rows to the tensor cores of sm_100 though IEEE precision was asked for.
    """
    return Launch(32 if features.block_d <= 128 else 16, 64, 8, 1)


def delta_launch(features: Features) -> Launch:
    return Launch(64 if features.block_d > 64 else 128, 0, 4, 1)


def query_launch(arch: int, dtype: str, features: Features) -> Launch:
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if dtype == "fp32":
        return _query_rows_of_float32(features)
    if features.block_d > 128:
        return Launch(64, 64, 8, 1)
    if features.block_d > 64 and arch < 90:
        drops_tiles = features.reads_tiles and features.dropout
        return Launch(32, 64, 4, 1) if drops_tiles else Launch(64, 64, 8, 2)
    if arch >= 100 and features.block_d > 64 and features.attn_mask and features.dropout:
        return Launch(64, 64, 8, 2)
    return Launch(128, 64, 8, 2)


def key_launch(arch: int, dtype: str, features: Features) -> Launch:
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if dtype == "fp32":
        return Launch(32 if features.block_d > 64 and features.is_tf32 else 16, 32, 8, 1)
    if features.block_d > 128:
        return Launch(64, 64, 8, 1)
    if features.reads_tiles:
        return _key_launch_of_tiles(arch, features)
    if arch < 90 and features.block_d > 64:
        return Launch(64, 64, 8, 2)
    if arch < 90:
        return Launch(32, 128, 8, 2)
    if features.block_d > 64:
        return Launch(32, 128, 8, 2 if arch >= 100 and features.window else 3)
    return Launch(64, 128, 8, 2)


def _key_launch_of_tiles(arch: int, features: Features) -> Launch:
    """Where the mask or the bias of a tile shares the registers with its scores: few queries a step."""
    if arch >= 100:
        drops_mask = features.attn_mask and features.dropout and not features.bias
        few = features.block_d > 64 or drops_mask
        return Launch(32 if few else 64, 128, 8, 2)
    if arch < 90 and features.block_d > 64:
        drops_mask = features.attn_mask and features.dropout
        return Launch(32, 64, 8, 1) if drops_mask else Launch(16, 128, 8, 1)
    # Dropout and a mask take registers, too; on sm_90 there are enough at head size 64.
    is_large = features.block_d > 64
    few = features.dropout if arch < 90 else is_large and (features.dropout or features.attn_mask)
    return Launch(16 if few else 32, 128, 8, 2)


def one_block_launch(arch: int, dtype: str, features: Features, seqlen_k: int) -> Launch | None:
    """For sequences of at most 128 keys; None where the keys, or the registers, do not allow it."""
    if seqlen_k > 128 or features.block_d > 128:
        return None
    block_n = 64 if seqlen_k <= 64 else 128
    if arch == 0:
        return Launch(64, block_n, 4, 1)
    # Head size 128 and float32 spill everywhere; on sm_100 the three kernels take fewer than half the instructions.
    if features.block_d > 64 or dtype == "fp32" or arch >= 100:
        return None
    if block_n == 64:
        return Launch(16 if arch < 90 and features.dropout else 32, 64, 4, 1)
    return Launch(32, 128, 8, 1)


def bias_launch(arch: int, dtype: str, features: Features) -> Launch:
    if arch == 0:
        return Launch(64, 64, 4, 1)
    if dtype == "fp32":
        return Launch(16, 32, 8, 1) if features.is_tf32 else Launch(32, 64, 8, 1)
    if arch < 90 or (arch < 100 and features.block_d > 64 and features.attn_mask):
        return Launch(32, 64, 8, 1)
    return Launch(64, 64, 4 if arch < 100 and features.block_d <= 64 else 8, 1)
