"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import user_model
from .case import BadOption


@dataclass(frozen=True)
class Options:
    """size: of `workloads.SIZES`; threads: for every peer; peers: names, None for all but the slow ones.

    budget: seconds of timing a case, for which rounds are left out; minutes: after which no further case begins.
    memory: measure the memory of every candidate, each in a process of its own.
    model: a user's model and text, measured in place of workloads.
    device: "cpu" or "cuda".
    """

    size: str = "base"
    threads: int | None = None
    repeats: int = 7
    peers: tuple[str, ...] | None = None
    budget: float | None = None
    minutes: float | None = None
    memory: bool = False
    model: user_model.UserModel | None = None
    device: str = "cpu"

    @property
    def every_setting(self) -> bool:
        """Whether peers run in their lesser settings too: those that were named do."""
        return self.peers is not None

    @property
    def size_name(self) -> str:
        """What the results call the size: a user's own model has no other."""
        return "own" if self.model is not None else self.size

    def check(self) -> None:
        """Raises BadOption for a number that is no amount, and for a device that is not there."""
        if self.device not in ("cpu", "cuda"):
            raise BadOption(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BadOption("device must be cpu where torch finds no CUDA device, got 'cuda'")
        for name in ("threads", "repeats", "budget", "minutes"):
            value = getattr(self, name)
            least = 1 if name in ("threads", "repeats") else 0
            if value is not None and value < least:
                raise BadOption(f"{name} must be at least {least}, got {value}")
