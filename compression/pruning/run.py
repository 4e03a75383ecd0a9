"""A pruning run: a trained classifier in; scored, planned, cut, proved, measured; a narrower one out."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.pruning.allocation import Budget, allocate, measure_damage
from compression.pruning.arguments import PruneArguments
from compression.pruning.costs import macs_cost
from compression.pruning.narrowing import scores_of_files, spec_of
from compression.pruning.plan import PruningPlan, make_plan
from compression.pruning.surgery import shrink_
from compression.pruning.traced_classifier import (
    TracedClassifier,
    budget_of,
    check_arguments,
    cuttable,
    default_criterion,
    fixed_widths,
    group_rows,
    load_traced,
    shown_rates,
)
from compression.scoring.calibration import Calibration, sample
from compression.scoring.criteria import NetworkScores, score
from models.backends import TorchBackend
from models.networks.widths import group_counts
from models.validation import load_for, measure
from utils import distributed
from utils.data.splits import ImageData
from utils.errors import UserError
from utils.files.checkpoint import FORMAT, VERSION
from utils.measures.profile import example_input, measure_latency, profile
from utils.spec import ModelSpec

PROOF_IMAGES = 8


@dataclass
class Outcome:
    """What a run found; ``results`` is what results.json holds.

    Attributes:
        controls: criterion -> top-1 of a control.
    """

    classifier: TracedClassifier
    plan: PruningPlan
    scored: NetworkScores
    narrow: nn.Module
    checkpoint: dict[str, Any]
    results: dict[str, Any]
    controls: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class _Bench:
    """Where networks are measured.

    Attributes:
        data: its validation split tells the accuracy.
    """

    a: PruneArguments
    classifier: TracedClassifier
    data: ImageData
    device: torch.device

    def backend(self, narrow: nn.Module) -> TorchBackend:
        """Return a narrow form of the network, ready to run."""
        spec = spec_of(self.classifier.spec, group_counts(self.classifier.model), narrow)
        return TorchBackend(replace(self.classifier.loaded, model=narrow, spec=spec), self.device)

    def top1(self, backend: TorchBackend) -> float:
        """Return the accuracy."""
        return measure(backend, self.data, "val", 4 * self.a.batch_size, self.a.workers, self.device).evaluation.top1

    def compare(self, before: TorchBackend, after: TorchBackend) -> dict[str, list[float]]:
        """Measure both networks: size, cost, accuracy, latency at batch 1."""
        profiles = self.classifier.profile, profile(after.model, after.spec)
        example = example_input(after.model, after.spec).to(memory_format=torch.channels_last)
        return {
            "params": [p.params for p in profiles],
            "macs": [p.macs for p in profiles],
            "top1": [self.top1(before), self.top1(after)],
            "latency_ms": [round(statistics.median(times), 4) for times in measure_latency([before.model, after.model], example)],
        }


def run_pruning(a: PruneArguments) -> Outcome:
    """Score, plan, cut, prove and measure; nothing is written.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit.
        NotProved: the cut network is not the masked one.
    """
    check_arguments(a)
    device = distributed.select_device(a.device)
    distributed.join(device)
    classifier = load_traced(a)
    widths = fixed_widths(a, classifier)
    if widths is not None and all(width == classifier.graph.group(name).size for name, width in widths.items()):
        raise UserError("these rates cut nothing; every channel stays")
    dense = TorchBackend(replace(classifier.loaded, model=deepcopy(classifier.model)), device)
    with distributed.main_first():  # which downloads
        data = load_for(dense, a.data, "val", None, None, a.download)
    classifier.loaded.spec = classifier.spec = dense.spec
    calibration = sample(data.split("train"), dense.spec, a.images, a.batch_size, a.seed)
    criterion = a.criterion or default_criterion(classifier.model)
    if a.ranks:
        criterion = "rank"
        scored = NetworkScores(scores_of_files(a.ranks, classifier.model, classifier.graph), None, 0.0)
    else:
        scored = score(criterion, classifier.model, classifier.graph, calibration, a.seed, widths)
    orders = {name: found.order.tolist() for name, found in scored.groups.items()}
    widths, plan = distributed.broadcast(_choose(a, classifier, calibration, orders, widths))
    if not plan.kept:
        raise UserError("these rates cut nothing; every channel stays")
    narrow, difference = _cut(a, classifier, plan, calibration)
    bench = _Bench(a, classifier, data, device)
    after = bench.backend(narrow)
    checkpoint = _checkpoint(classifier, plan, after.spec, narrow)
    results = _results(a, classifier, widths, scored, criterion)
    measured = bench.compare(dense, after)
    checkpoint["metrics"] = {"top1": measured["top1"][1], "params": measured["params"][1], "macs": measured["macs"][1]}
    dense_file = {**checkpoint, "spec": classifier.spec.to_dict(), "plan": None, "state_dict": classifier.model.state_dict()}
    sizes = {"bytes": [_bytes(dense_file), _bytes(checkpoint)]}
    results = {**measured, **sizes, "max_relative_difference": difference, **results}
    controls = _controls(bench, calibration, widths) if a.controls else {}
    return Outcome(classifier, plan, scored, narrow, checkpoint, {**results, "controls": controls}, controls, dense.notes)


def _choose(
    a: PruneArguments,
    classifier: TracedClassifier,
    calibration: Calibration,
    orders: Mapping[str, Sequence[int]],
    widths: dict[str, int] | None,
) -> tuple[dict[str, int], PruningPlan]:
    """Return the widths, which may be fixed already, and the units that stay."""
    graph, entries, damage = classifier.graph, cuttable(classifier), None
    if widths is None:
        damage = measure_damage(classifier.model, graph, entries, orders, calibration.head(256))
        widths = allocate(graph, entries, budget_of(a, classifier), a.round_to, a.min_channels, damage)
    plan = make_plan(graph, widths, orders)
    if a.compress_rate:
        return widths, plan
    budget = aim = budget_of(a, classifier)
    while (spent := budget.cost.of(plan.kept)) > budget.limit:  # the chosen units have more channels than the mean
        aim = replace(aim, share=aim.share * min(budget.limit / spent, 0.998))
        widths = allocate(graph, entries, aim, a.round_to, a.min_channels, damage)
        plan = make_plan(graph, widths, orders)
    return widths, plan


def _cut(a: PruneArguments, classifier: TracedClassifier, plan: PruningPlan, calibration: Calibration) -> tuple[nn.Module, float]:
    """Return a narrow copy of the network, and the relative difference of its outputs from the masked one's."""
    inputs, _ = next(calibration.head(PROOF_IMAGES).batches())
    narrow = deepcopy(classifier.model)
    difference = shrink_(narrow, classifier.graph, plan.kept, inputs)
    if a.recalibrate_bn:
        recalibrate_(narrow, calibration)
    return narrow.eval(), difference


@torch.no_grad()
def recalibrate_(model: nn.Module, calibration: Calibration) -> None:
    """Replace batch norm's statistics by their means over images, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for inputs, labels in calibration.batches():
        if len(labels) > 1:  # the last batch may be one image, which has no variance
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _checkpoint(classifier: TracedClassifier, plan: PruningPlan, spec: ModelSpec, narrow: nn.Module) -> dict[str, Any]:
    """Return what pruned.pt holds."""
    content: dict[str, Any] = plan.to_dict()
    if earlier := classifier.loaded.checkpoint.get("plan"):
        content["before"] = earlier
    return {
        "spec": spec.to_dict(),
        "plan": content,
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in narrow.state_dict().items()},
        "metrics": {},
        "arguments": classifier.loaded.checkpoint.get("arguments", {}),
    }


def _bytes(content: Mapping[str, Any]) -> int:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    return buffer.tell()


def _results(
    a: PruneArguments, classifier: TracedClassifier, widths: Mapping[str, int], scored: NetworkScores, criterion: str
) -> dict[str, Any]:
    cut = [name for name, width in widths.items() if width < classifier.graph.group(name).size]
    channels = sum(classifier.graph.group(name).size for name in cut)
    tied = sum(scored.groups[name].tied * classifier.graph.group(name).size for name in cut)
    return {
        "compress_rate": shown_rates(a, classifier, widths),
        "criterion": criterion,
        "tied_share": tied / max(channels, 1),
        "rank_seconds": round(scored.seconds, 3),
        "groups": group_rows(classifier, widths),
    }


def _controls(bench: _Bench, calibration: Calibration, widths: Mapping[str, int]) -> dict[str, float]:
    """Cut by L1, by chance, and at chance widths of the same cost, and measure each on the validation split."""
    a, classifier, entries = bench.a, bench.classifier, cuttable(bench.classifier)
    cost = macs_cost(classifier.graph, classifier.profile.macs)
    budget = Budget(cost, cost(cost.vector(widths)) / cost(cost.full), "macs")
    weights = np.random.default_rng([a.seed, 0xC0]).uniform(0.5, 2.0, len(entries))
    chance = allocate(classifier.graph, entries, budget, 1, 1, lambda i, kept: float(weights[i] * (1 - kept) ** 2))
    found = {}
    for name, criterion, at in (("l1", "l1", widths), ("random", "random", widths), ("random widths", a.criterion or "l1", chance)):
        scored = score(criterion, classifier.model, classifier.graph, calibration, a.seed, at)
        other = make_plan(classifier.graph, at, {key: value.order.tolist() for key, value in scored.groups.items()})
        narrow, _ = _cut(a, classifier, other, calibration)
        found[name] = bench.top1(bench.backend(narrow))
    return found
