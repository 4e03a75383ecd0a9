"""A budget of time: what the network may take in the runtime that will run it, and the widths that keep it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.exporting.graphs import ExportSource
from compression.exporting.measuring import noise_images
from compression.latency.model import LatencyModel
from compression.latency.probes import write_probes
from compression.latency.runtimes import Candidates
from compression.latency.table import LatencyTable, cache_file, compare, keep_table, measured_table, model_of, setting_of
from compression.pruning.allocation import Damage
from compression.pruning.arguments import PruneArguments
from compression.pruning.plan import Entry, PruningPlan, make_plan
from compression.pruning.time_allocation import TimeSearch, drawn_widths
from compression.pruning.traced_classifier import TracedClassifier
from compression.scoring.calibration import Calibration
from compression.tracing.graph import ChannelGraph, Keep
from models.backends.metadata import Metadata
from utils.errors import UserError

CALIBRATED = 64  # images, for the ranges of int8
TRIES = 6  # widths that are measured; the prediction is set right by each
SPARE = 0.985  # of the limit is what widths are chosen for: times vary
CLOSE = 0.96  # of the limit: near enough to stop
ROUNDS = 15  # of the last measurement, of the files as they are shipped


@dataclass
class LatencyBudget:
    """What a network may take, and what is known about its times.

    Attributes:
        candidates: opens the network at any widths.
        model: predicts the time of the file as it is shipped.
        dense_ms: of the dense network's file.
        limit_ms: the budget.
        batch: images per pass.
        threads: that run it.
        note: where the times come from.
        on_this_machine: whether the times are this machine's.
        predicted_ms: of the widths that were chosen; here set right by timing their narrowed file.
    """

    candidates: Candidates
    entries: Sequence[Entry]
    model: LatencyModel
    dense_ms: float
    limit_ms: float
    batch: int
    threads: int
    note: str
    on_this_machine: bool
    predicted_ms: float = 0.0

    def choose(
        self, damage: Damage, orders: Mapping[str, Sequence[int]], min_channels: int, share: float | None = None
    ) -> tuple[dict[str, int], PruningPlan]:
        """Return widths within the budget and the units that stay; a share of the dense network's time becomes the budget.

        Widths that were chosen are measured, where this is the machine, and what is predicted is set right by that, until the
        budget is kept and nearly used.

        Raises:
            UserError: the budget can't be reached.
        """
        if share is not None:
            self.limit_ms = share * self.dense_ms
        graph, model, kept = self.candidates.graph, self.model, dict[float, tuple[dict[str, int], PruningPlan]]()
        for _ in range(TRIES):
            search = TimeSearch(self.entries, model.names, model.full, model.at, damage, min_channels)
            try:
                widths = search.within(SPARE * self.limit_ms)
            except UserError:
                if kept:
                    break
                raise
            plan = make_plan(graph, widths, orders)
            self.predicted_ms = model(model.sizes.vector({name: len(units) for name, units in plan.kept.items()}))
            if not self.on_this_machine or not plan.kept:
                return widths, plan
            measured = self._measure(plan.kept)
            if measured <= self.limit_ms:
                kept[measured] = widths, plan
                if measured >= CLOSE * self.limit_ms:
                    break
            model = model.scaled(measured / self.predicted_ms)
        if kept:
            self.predicted_ms = max(kept)
            return kept[self.predicted_ms]
        return widths, plan

    def _measure(self, keep: Keep) -> float:
        images = noise_images(self.candidates.source.metadata.spec, self.batch, 0)
        with threads_of(self.threads):
            whole, narrow = compare(self.candidates.narrow({}), self.candidates.narrow(keep), images)
        return narrow / whole * self.dense_ms


def budget_of_time(arguments: PruneArguments, classifier: TracedClassifier, calibration: Calibration) -> LatencyBudget:
    """Measure what is needed to keep a budget of time, or read it.

    Raises:
        UserError: a library is missing, the network can't be exported, or the table is another's.
    """
    graph, spec = classifier.graph, classifier.spec
    batch, threads = arguments.latency_batch, arguments.threads or torch.get_num_threads()
    source = ExportSource(classifier.model, Metadata(spec, batch_size=batch, named=False), calibration=calibration.head(CALIBRATED))
    with threads_of(threads):
        candidates = Candidates(source, graph, arguments.runtime_name, arguments.precision)
        setting = setting_of(graph, spec, batch, arguments.runtime_name, arguments.precision, threads)

        def draw(number: int) -> Keep:
            return first_units(graph, drawn_widths(classifier.cuttable, number))

        if arguments.write_probes:
            write_probes(candidates, setting, draw, Path(arguments.write_probes))
        path = Path(arguments.latency_table) if arguments.latency_table else cache_file(setting)
        if arguments.latency_table or path.is_file():
            table = LatencyTable.read(path, graph, setting)
            note = f"times of {path}, measured {table.measured} on {table.setting.machine}"
        else:
            table = measured_table(candidates, setting, draw)
            keep_table(table, path)
            note = f"times of {len(table.timed)} networks measured on {setting.machine}, kept in {path}"
        here = table.setting.machine == setting.machine and table.setting.threads == setting.threads
        dense_ms = shipped_ms(candidates, classifier.model, classifier.model, batch)[0] if here else table.timed[0].ms
        model = model_of(graph, table, dense_ms)
    limit = arguments.latency_ms if arguments.latency_ms is not None else dense_ms
    note += f"; predictions are off by {model.error:.1%} on average"
    return LatencyBudget(candidates, classifier.cuttable, model, dense_ms, limit, batch, threads, note, here)


def latency_results(budget: LatencyBudget, arguments: PruneArguments, dense: nn.Module, narrow: nn.Module) -> dict[str, Any]:
    """Return what results.json says of the latency; the files of both networks are written, run and timed by turns."""
    threads = arguments.threads or torch.get_num_threads()
    measured: list[float | None] = [None, None]
    if budget.on_this_machine:
        with threads_of(threads):
            measured = [round(ms, 4) for ms in shipped_ms(budget.candidates, dense, narrow, budget.batch)]
    return {
        "runtime": arguments.runtime_name,
        "precision": arguments.precision,
        "threads": threads,
        "batch": budget.batch,
        "budget_ms": round(budget.limit_ms, 4),
        "predicted_ms": round(budget.predicted_ms, 4),
        "measured_ms": measured,
    }


def shipped_ms(candidates: Candidates, dense: nn.Module, narrow: nn.Module, batch: int) -> tuple[float, float]:
    """Return the time of each network's file as it is shipped, timed by turns."""
    images = noise_images(candidates.source.metadata.spec, batch, 0)
    with tempfile.TemporaryDirectory() as folder:
        backends = []
        for name, model in (("dense", dense), ("narrow", narrow)):
            (Path(folder) / name).mkdir()
            backends.append(candidates.shipped(model, Path(folder) / name))
        found = compare(backends[0], backends[1], images, ROUNDS)
        del backends  # they may map the files
    return found


def first_units(graph: ChannelGraph, widths: Mapping[str, int]) -> Keep:
    """Return a keep-set of widths: for times it does not matter which units stay."""
    return make_plan(graph, widths, {group.name: range(group.size) for group in graph.groups}).kept


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
