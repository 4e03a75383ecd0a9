"""Measure an exported file in its own runtime: outputs, latency, size; and choose between a format's files."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.backends import Backend
from utils.errors import UserError
from utils.spec import ModelSpec

TOLERANCE = 1e-4  # of an fp32 file's outputs, relative to their scale
ROUNDS, PASSES = 12, 5  # of a latency measurement
MAX_SECONDS, MIN_ROUNDS = 20.0, 3  # of one whose passes are slow
SURE = 1.645  # standard errors: what int8 loses by more than that beyond the tolerance is no chance, at 95 %
NOISE = 1.05  # a smaller ratio of two latencies may be noise


@dataclass(frozen=True)
class FileResult:
    """What results.json holds of one file.

    Attributes:
        top1: on the validation images; None without data.
        top1_error: the standard error of what top-1 differs from that of the network in torch, from the images that only one has right.
        latency_ms: median for one image, normalisation included.
        max_difference: from the outputs of the network in torch, relative to their scale.
        int8_layers, fp32_layers: names of convolutions and linear layers that run in int8, and of the others (which in an
            fp16 file run in fp16).
    """

    format: str
    precision: str
    path: str
    bytes: int
    top1: float | None
    top1_error: float | None
    latency_ms: float
    max_difference: float
    int8_layers: tuple[str, ...]
    fp32_layers: tuple[str, ...]


def refuse_wrong_outputs(path: Path, difference: float, tolerance: float = TOLERANCE) -> None:
    """Refuse an fp32 file whose outputs differ by more than a tolerance, both relative to the outputs' scale.

    Raises:
        UserError: it does not compute what the network computes.
    """
    if not difference <= tolerance:
        raise UserError(
            f"{path} does not compute what the network computes: outputs differ by {difference:.1e} of their scale, "
            f"more than {tolerance:g}; it must not be used"
        )


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) if path.is_dir() else path.stat().st_size


def difference_of(reference: Tensor, outputs: Tensor, softmax: bool) -> float:
    """Return the largest difference between logits [B, classes], relative to the largest of the reference's.

    With ``softmax``, for files that give probabilities, those are compared.
    """
    if softmax:
        reference, outputs = reference.softmax(1), outputs.softmax(1)
    scale = reference.abs().max().clamp(min=1e-12)
    return float((reference - outputs).abs().max() / scale)


def measure_latencies(backends: Sequence[Backend], image: Tensor) -> list[float]:
    """Time classifiers by turns on one image, uint8 [1, S, S, C]; return the median of each, milliseconds."""
    return [round(statistics.median(taken), 4) for taken in times_of(backends, image, ROUNDS, PASSES, MAX_SECONDS)]


def times_of(backends: Sequence[Backend], images: Tensor, rounds: int, passes: int, max_seconds: float = math.inf) -> list[list[float]]:
    """Time classifiers by turns, so that noise from outside affects all of them alike.

    The first pass of a turn does not count: the previous runtime's threads may still be spinning.

    Args:
        backends: the classifiers.
        images: uint8 [B, S, S, C], for every pass.
        rounds: in each, every classifier has its turn.
        passes: per turn.
        max_seconds: no new round begins after so long, but ``MIN_ROUNDS`` are completed.

    Returns:
        The milliseconds of every pass, for each classifier.
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


def choose(base: FileResult, int8: FileResult | None, max_drop: float) -> tuple[FileResult, list[str]]:
    """Choose between the fp32 or fp16 file and the int8 file, which may lose ``max_drop`` of top-1, so far as the images can tell.

    Returns:
        The file to use, and why it is not the int8 file if there is one.
    """
    if int8 is None:
        return base, []
    reasons = []
    if not int8.int8_layers:
        reasons.append("no layer runs in int8 here")
    if int8.latency_ms > NOISE * base.latency_ms:
        reasons.append(f"it is slower than {base.precision} here ({int8.latency_ms:.3f} against {base.latency_ms:.3f} ms)")
    if base.top1 is not None and int8.top1 is not None:
        lost, error = base.top1 - int8.top1, int8.top1_error or 0.0
        if lost - SURE * error > max_drop + 1e-9:
            reasons.append(f"it loses {lost:.2%} ± {error:.2%} of top-1, more than --max-drop {max_drop:g}")
    return (base if reasons else int8), reasons


def noise_images(spec: ModelSpec, count: int, seed: int) -> Tensor:
    """Return images of noise, uint8 [count, S, S, C]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *spec.size, spec.channels), dtype=torch.uint8, generator=generator)
