"""Peak memory of a candidate, measured in a fresh process: python -m ctxfast.benchmarks.memory SPECIFICATION.

In the process of the run every peer's weights and the allocators' leftovers lie side by side, and a forked child of a
process with OpenMP threads cannot use them; so each candidate gets a new interpreter. A pass over a tiny case of its
kind loads its library and starts its threads; then it alone is prepared, and resident bytes are counted from there:

    held   after one pass, freed memory given back: the weights, packed copies and caches that stay
    peak   the most during a second pass (VmHWM, which /proc/self/clear_refs sets back)

The kernel counts resident pages per thread in steps, so figures below a MiB are noise.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import ctxfast

from . import peers, scratch
from .case import Candidate, Case, Unavailable
from .records import Memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LONGEST = 600  # seconds for one candidate


def available() -> bool:
    """Whether this system can measure it (Linux)."""
    return os.access(_CLEAR, os.W_OK) and _STATUS.exists()


def measure(case: Case, source: tuple[str, ...], peer: str, key: str) -> Memory:
    """The memory of the candidate `key` of a peer. `source` tells `find_case` in the child where the case comes from.

    Raises Unavailable with what the child said where it failed.
    """
    specification = {
        "source": source,
        "case": case.name,
        "peer": peer,
        "key": key,
        "threads": torch.get_num_threads(),
    }
    paths = [str(Path(ctxfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        scratch.VARIABLE: str(scratch.root()),
    }
    command = [sys.executable, "-m", __name__, json.dumps(specification)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"its memory was not measured within {LONGEST} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"its memory could not be measured: {last[:200]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def find_case(source: tuple[str, ...], name: str) -> Case:
    """A case by its source, ("workload", name, size) or ("model", directory, file, lines)."""
    from . import user_model, workloads

    kind, *arguments = source
    if kind == "workload":
        found: Iterator[Case] = workloads.cases(*arguments)
    else:
        directory, file, lines = arguments
        found = user_model.cases(user_model.UserModel(Path(directory), file, int(lines)))
    return next(case for case in found if case.name == name)


def _find_candidate(case: Case, peer: str, key: str) -> Candidate:
    (found,) = (p for p in peers.find([peer]) if p.name == peer)
    candidates = found.candidates(case)
    try:
        return next(candidate for candidate in candidates if candidate.key == key)
    finally:
        candidates.close()  # type: ignore[attr-defined]  # releases the models of its other candidates


def _load_library(kind: str, peer: str) -> None:
    """Run every candidate of the peer on the first tiny case of this kind."""
    from . import workloads

    tiny = (case for name in workloads.names("tiny") for case in workloads.cases(name, "tiny"))
    case = next((case for case in tiny if case.kind == kind), None)
    (found,) = (p for p in peers.find([peer]) if p.name == peer)
    for candidate in found.candidates(case) if case is not None else ():
        candidate.run()


def forget_peak() -> None:
    """VmHWM starts anew from what is resident."""
    _CLEAR.write_text("5", encoding="ascii")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes, freed memory given back to the system first."""
    if field == "VmRSS":
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert match is not None
    return 1024 * int(match[1])


def _measure_here(specification: dict[str, object]) -> Memory:
    threads, peer, key = (specification[name] for name in ("threads", "peer", "key"))
    assert isinstance(threads, int) and isinstance(peer, str) and isinstance(key, str)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        case = find_case(tuple(specification["source"]), str(specification["case"]))  # type: ignore[arg-type]
        _load_library(case.kind, peer)
        before = resident("VmRSS")
        candidate = _find_candidate(case, peer, key)
        candidate.run()
        held = resident("VmRSS")
        forget_peak()
        output = candidate.run()
        peak = resident("VmHWM")
        del output
    return Memory(max(0, held - before), max(0, peak - before))


if __name__ == "__main__":
    result = _measure_here(json.loads(sys.argv[1]))
    print(json.dumps({"held": result.held, "peak": result.peak}))
