"""Measured times of a network at drawn widths, as a file: made on this machine, or on another by benchmarks/device_probe.py."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.exporting.measuring import noise_images, times_of
from compression.latency.model import LatencyModel, Timed
from compression.latency.runtimes import Candidates
from compression.tracing.graph import ChannelGraph, Keep
from models.backends import Backend
from models.backends.exported import one_line
from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.spec import ModelSpec

FORMAT, VERSION = "rankcut-latency", 1
DRAWN, LEAST, SECONDS = 120, 24, 90.0  # networks to measure, if they take no longer than that; at least so many
ROUNDS, TURN_MS, PASSES = 5, 40.0, 6  # a network's turns beside the dense one; about so long, at most so many passes each


@dataclass(frozen=True)
class Setting:
    """What times are for.

    Attributes:
        network: a digest of the network's widths and layers.
        size, batch: of the input.
        runtime, release, precision, threads: what runs it.
        machine: where.
    """

    network: str
    size: tuple[int, int]
    batch: int
    runtime: str
    release: str
    precision: str
    threads: int
    machine: str

    @property
    def digest(self) -> str:
        """A short name of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LatencyTable:
    """Times at drawn widths.

    Attributes:
        setting: what they are for.
        groups: names of the channel groups, in the order of the widths.
        timed: widths and milliseconds; the first are the dense network's.
        measured: the date.
    """

    setting: Setting
    groups: tuple[str, ...]
    timed: tuple[Timed, ...]
    measured: str

    def to_json(self) -> str:
        """Return the file's text."""
        rows = [{"widths": [int(width) for width in one.widths], "ms": round(one.ms, 6)} for one in self.timed]
        about = {"format": FORMAT, "version": VERSION, "measured": self.measured, "setting": asdict(self.setting)}
        return json.dumps({**about, "groups": list(self.groups), "timed": rows}, indent=1)

    @classmethod
    def read(cls, path: Path, graph: ChannelGraph, wanted: Setting) -> LatencyTable:
        """Read a file.

        Raises:
            UserError: it is no such file, or of another network, size, batch, runtime or precision.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {content['format']!r} {content['version']!r}")
            setting = Setting(**{**content["setting"], "size": tuple(content["setting"]["size"])})
            timed = tuple(Timed(np.array(row["widths"], dtype=np.float64), float(row["ms"])) for row in content["timed"])
            groups, measured = tuple(content["groups"]), str(content["measured"])
            if any(len(one.widths) != len(groups) or not np.isfinite(one.ms) or one.ms <= 0 for one in timed) or len(timed) < 2:
                raise ValueError("times")
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no latency table of this version ({one_line(error)})") from None
        for name in ("network", "size", "batch", "runtime", "precision"):
            if getattr(setting, name) != getattr(wanted, name):
                found, asked = getattr(setting, name), getattr(wanted, name)
                what = "another network" if name == "network" else f"{name} {found}, not {asked}"
                raise UserError(f"{path} is a latency table for {what}")
        if groups != tuple(group.name for group in graph.groups):
            raise UserError(f"{path} is a latency table for another network")
        return cls(setting, groups, timed, measured)


def setting_of(graph: ChannelGraph, spec: ModelSpec, batch: int, runtime: str, precision: str, threads: int) -> Setting:
    """Return what times on this machine are for."""
    layers = [[layer.weight, list(graph.shapes[layer.weight]), layer.repeats, layer.groups] for layer in graph.contractions]
    units = [[group.name, group.size] for group in graph.groups]
    network = hashlib.sha256(json.dumps([layers, units]).encode()).hexdigest()[:16]
    library = "torch" if runtime == "torch" else runtime
    return Setting(network, spec.size, batch, runtime, version(library), precision, threads, processor())


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_file(setting: Setting) -> Path:
    """Return where the times of a setting are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "rankcut" / f"latency-{setting.digest}.json"


def measured_table(candidates: Candidates, setting: Setting, draws: Callable[[int], Keep]) -> LatencyTable:
    """Measure a network at widths that are drawn, each by turns with the dense one.

    Args:
        candidates: opens the network at any widths.
        setting: what the times are for.
        draws: number of the draw, from 1 -> keep-set.
    """
    graph, spec = candidates.graph, candidates.source.metadata.spec
    dense, images = candidates.narrow({}), noise_images(spec, setting.batch, 0)
    ratios, dense_ms, begin = [(width_vector(graph, {}), 1.0)], [], time.perf_counter()
    for i in range(1, DRAWN):
        if i > LEAST and time.perf_counter() - begin > SECONDS:
            break
        keep = draws(i)
        whole, narrow = compare(dense, candidates.narrow(keep), images)
        dense_ms.append(whole)
        ratios.append((width_vector(graph, keep), narrow / whole))
    whole = float(np.median(dense_ms))
    timed = tuple(Timed(widths, ratio * whole) for widths, ratio in ratios)
    return LatencyTable(setting, tuple(group.name for group in graph.groups), timed, time.strftime("%Y-%m-%d"))


def compare(dense: Backend, narrow: Backend, images: torch.Tensor, rounds: int = ROUNDS) -> tuple[float, float]:
    """Time two classifiers by turns; return milliseconds of each.

    Of every turn the quickest pass counts, as what else runs makes the others longer. The narrow network's time is the dense
    one's times the median ratio of the two in the same round, so that it does not matter if the machine is slower in some rounds.
    """
    start = time.perf_counter()
    dense.logits(images)
    passes = int(np.clip(TURN_MS / max((time.perf_counter() - start) * 1e3, 1e-3), 1, PASSES))
    times = np.array(times_of([dense, narrow], images, rounds, passes, SECONDS))
    whole, part = times.reshape(2, -1, passes).min(2)
    return float(np.median(whole)), float(np.median(part / whole) * np.median(whole))


def width_vector(graph: ChannelGraph, keep: Keep) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the units that a keep-set leaves of each group, in the graph's order."""
    return np.array([len(keep.get(group.name, range(group.size))) for group in graph.groups], dtype=np.float64)


def model_of(graph: ChannelGraph, table: LatencyTable, dense_ms: float) -> LatencyModel:
    """Return what a table predicts, in milliseconds of the network as it is shipped, which takes ``dense_ms`` when it is whole."""
    model = LatencyModel(graph, table.timed)
    return model.scaled(dense_ms / table.timed[0].ms)


def keep_table(table: LatencyTable, path: Path) -> None:
    """Write a table's file; where that can't be done, it is measured again another time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.to_json())
    except OSError:
        return
