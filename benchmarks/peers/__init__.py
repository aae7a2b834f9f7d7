"""Who is measured. One module a peer; each is used where it can be imported, and its absence is explained.

A peer module has NAME, `version()` (its version; ImportError or Unavailable where it cannot run) and one generator of
candidates for every kind of case that it can do: `bert(case)`, `attention(case)`, `linear(case)`, `layer_norm(case)`.
DEFAULT = False keeps a slow peer out of runs that do not ask for it by name. DEVICES names where it runs, by default
the CPU alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from .. import environment
from ..case import BadOption, Candidate, Case, Unavailable

_MODULES = {
    "ctxfast": "own",
    "ctxfast.bert": "own_class",
    "eager": "eager",
    "torch": "torch_ops",
    "transformers": "huggingface",
    "torch.compile": "inductor",
    "onnxruntime": "onnx_runtime",
    "openvino": "open_vino",
    "ctranslate2": "ctranslate",
    "sentence-transformers": "sentences",
    "fastembed": "fast_embed",
    "FlexAttention": "flex",
    "FlashAttention": "flash",
    "xFormers": "xformers_ops",
    "gemm": "gemm",
}
OWN = "ctxfast"
OWN_CLASS = "ctxfast.bert"
EAGER = "eager"
PARTS = "gemm"


@dataclass(frozen=True)
class Peer:
    """A peer with its version, or with the reason why it is not there."""

    name: str
    module: ModuleType
    version: str = ""
    reason: str = ""

    @property
    def available(self) -> bool:
        return not self.reason

    def knows(self, case: Case) -> bool:
        """Whether it has candidates for this kind of case."""
        return hasattr(self.module, case.kind)

    def runs_on(self, device: str) -> bool:
        """Whether it runs on this type of device."""
        return device in getattr(self.module, "DEVICES", ("cpu",))

    def candidates(self, case: Case, *, every_setting: bool = True) -> Iterator[Candidate]:
        """Its ways to do a case of a kind that it knows. May raise Unavailable.

        every_setting: those too that are slower than its others: the lesser ones and, on a CPU without instructions
        for it, bfloat16, in which the eager one is run for its error alone.
        """
        emulated = case.device.type == "cpu" and not environment.multiplies_bfloat16()
        skips = emulated and not every_setting and self.name not in (OWN, OWN_CLASS)
        if skips and self.name != EAGER:
            case = replace(case, dtypes=tuple(d for d in case.dtypes if d != "bfloat16"))
        for candidate in getattr(self.module, case.kind)(case):
            if skips and candidate.dtype == "bfloat16":
                candidate = replace(candidate, timed=False)
            if every_setting or not candidate.lesser:
                yield candidate


def names() -> tuple[str, ...]:
    """Every peer, in the order of the tables."""
    return tuple(_MODULES)


def default_names() -> tuple[str, ...]:
    """The peers of a run that names none."""
    return tuple(name for name in _MODULES if getattr(_module(name), "DEFAULT", True))


def find(chosen: Sequence[str] | None = None) -> list[Peer]:
    """The chosen peers (default: all but the slow ones); ctxfast and eager are always among them.

    Raises BadOption for an unknown name.
    """
    chosen = default_names() if chosen is None else chosen
    unknown = [name for name in chosen if name not in _MODULES]
    if unknown:
        raise BadOption(f"peers must be among {', '.join(_MODULES)}, got {unknown[0]!r}")
    wanted = {OWN, EAGER, PARTS, *chosen}
    return [_find(name) for name in _MODULES if name in wanted]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _find(name: str) -> Peer:
    module = _module(name)
    try:
        return Peer(name, module, version=module.version())
    except Unavailable as error:
        return Peer(name, module, reason=str(error))
    except Exception as error:  # a broken installation fails in its own way
        return Peer(name, module, reason=f"not importable: {error}")
