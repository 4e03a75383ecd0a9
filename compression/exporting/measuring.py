"""What an exported file is worth: its outputs, accuracy, latency and size, measured on the file in its own runtime."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from compression.exporting.audit import Audit
from models.backends import Backend
from utils.errors import UserError

TOLERANCE = 1e-4  # of an fp32 file's outputs, relative to their scale
ROUNDS, PASSES = 12, 5  # of a latency measurement
MAX_SECONDS = 20.0  # of one, where passes are slow
MIN_ROUNDS = 3
NOISE = 1.05  # a latency that is greater by this is one that shows


@dataclass(frozen=True)
class Row:
    """One file of results.json.

    Attributes:
        top1: on the validation images; None without data.
        latency_ms: median for one image, normalisation included.
        max_difference: from the eager network's outputs, relative to their scale.
        int8_layers, fp32_layers: names of convolutions and linear layers that run in int8, and of those that do not
            (in an fp16 file, those in fp16).
    """

    format: str
    precision: str
    path: str
    bytes: int
    top1: float | None
    latency_ms: float
    max_difference: float
    int8_layers: tuple[str, ...]
    fp32_layers: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return JSON-able values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def make_row(
    kind: str,
    precision: str,
    path: Path,
    top1: float | None,
    latency_ms: float,
    difference: float,
    audit: Audit,
    tolerance: float = TOLERANCE,
) -> Row:
    """Put together what was measured.

    Raises:
        UserError: a file that should compute what the network computes does not.
    """
    if precision == "fp32" and not difference <= tolerance:
        raise UserError(
            f"{path} does not compute what the network computes: outputs differ by {difference:.1e} of their scale, "
            f"more than {tolerance:g}; it must not be used"
        )
    return Row(kind, precision, str(path), size_of(path), top1, latency_ms, difference, audit.int8, audit.others)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) if path.is_dir() else path.stat().st_size


def difference_of(reference: Tensor, outputs: Tensor, softmax: bool) -> float:
    """Return the largest difference of outputs [B, classes], relative to the largest of the reference's.

    Args:
        reference: logits.
        outputs: logits; where the file gave probabilities, their logarithms.
        softmax: whether it did: then probabilities are compared.
    """
    if softmax:
        reference, outputs = reference.softmax(1), outputs.softmax(1)
    scale = reference.abs().max().clamp(min=1e-12)
    return float((reference - outputs).abs().max() / scale)


def measure_latencies(backends: Sequence[Backend], image: Tensor) -> list[float]:
    """Time classifiers by turns on one image, uint8 [1, S, S, C].

    Returns:
        The median of each, milliseconds.
    """
    return [round(statistics.median(taken), 4) for taken in times_of(backends, image, ROUNDS, PASSES, MAX_SECONDS)]


def times_of(backends: Sequence[Backend], images: Tensor, rounds: int, passes: int, max_seconds: float = math.inf) -> list[list[float]]:
    """Time classifiers by turns, so that all meet the same noise.

    Each turn begins with a pass that does not count: the threads of the runtime before may still be spinning.

    Args:
        backends: the classifiers.
        images: uint8 [B, S, S, C], of one pass.
        rounds: of turns.
        passes: of a turn.
        max_seconds: no further round begins after so long, once there were some.

    Returns:
        Milliseconds of every pass, of each classifier.
    """
    times: list[list[float]] = [[] for _ in backends]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > max_seconds:
            break
        for backend, taken in zip(backends, times, strict=True):
            backend.logits(images)
            for _ in range(passes):
                start = time.perf_counter()
                backend.logits(images)
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def choose(base: Row, int8: Row | None, max_drop: float) -> tuple[Row, list[str]]:
    """Choose between a format's two files.

    Args:
        base: the fp32 or fp16 file.
        int8: the quantized one, if there is one.
        max_drop: top-1 that it may lose against the base.

    Returns:
        The one to use, and why it is not int8 where it was asked for.
    """
    if int8 is None:
        return base, []
    reasons = []
    if not int8.int8_layers:
        reasons.append("no layer runs in int8 here")
    if int8.latency_ms > NOISE * base.latency_ms:
        reasons.append(f"it is slower than {base.precision} here ({int8.latency_ms:.3f} against {base.latency_ms:.3f} ms)")
    if base.top1 is not None and int8.top1 is not None and base.top1 - int8.top1 > max_drop + 1e-9:
        reasons.append(f"it loses {base.top1 - int8.top1:.2%} of top-1, more than --max-drop {max_drop:g}")
    return (base if reasons else int8), reasons


def comparison_images(spec_shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """Return noise to compare outputs on where there are no images: uint8 [count, S, S, C]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *spec_shape), dtype=torch.uint8, generator=generator)
