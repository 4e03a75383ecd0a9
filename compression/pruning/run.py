"""A pruning run: a trained classifier is scored, planned, cut, proved and measured."""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from compression.layers.pieces import images_of_a_piece
from compression.pruning.allocation import Budget, Damage, allocate
from compression.pruning.arguments import PruneArguments, check_arguments
from compression.pruning.latency_budget import budget_of_time, latency_results
from compression.pruning.narrowing import spec_of
from compression.pruning.plan import PruningPlan, make_plan
from compression.pruning.recovery import Recovery, recover_
from compression.pruning.refit import HELD_OUT
from compression.pruning.surgery import shrink_
from compression.pruning.traced_classifier import TracedClassifier, load_traced
from compression.pruning.unlabelled import images_without_labels, labelled_by
from compression.pruning.widths import choose_plan, compress_rate_of, damage_of, widths_before_scoring
from compression.scoring.calibration import Calibration, sample
from compression.scoring.criteria import default_criterion, score, score_by_files
from compression.scoring.scores import NetworkScores
from compression.tracing.costs import macs_cost
from models.backends import TorchBackend
from models.networks.widths import group_counts
from models.validation import load_for, measure
from utils import distributed
from utils.data.splits import ImageData
from utils.errors import UserError
from utils.files.checkpoint import FORMAT, VERSION, file_digest
from utils.measures.metrics import Evaluation
from utils.measures.profile import example_input, measure_latency, profile

PROOF_IMAGES = 8


@dataclass(frozen=True)
class PruningOutcome:
    """What a run found.

    Attributes:
        checkpoint: what pruned.pt contains.
        results: what results.json contains.
        notes: what the user should know about the data.
        after: the narrow network on the validation split.
    """

    classifier: TracedClassifier
    plan: PruningPlan
    scored: NetworkScores
    checkpoint: dict[str, Any]
    results: dict[str, Any]
    notes: list[str]
    after: Evaluation


class PruningRun:
    """A classifier that was loaded and scored once, and can be cut within any budget.

    Args:
        arguments: of prune.py.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit.
    """

    def __init__(self, arguments: PruneArguments) -> None:
        check_arguments(arguments)
        device = distributed.select_device(arguments.device)
        distributed.join(device)
        self.classifier = classifier = load_traced(arguments)
        self.arguments, self.widths = arguments, widths_before_scoring(arguments, classifier)
        if self.widths is not None and all(width == classifier.graph.group(name).size for name, width in self.widths.items()):
            raise _nothing_to_cut()
        self.dense = dense = TorchBackend(replace(classifier.loaded, model=deepcopy(classifier.model)), device)
        with distributed.main_first():  # which downloads
            data, self.labels = _load(arguments, dense)
        classifier.loaded.spec = dense.spec  # the data may have named the classes
        count = arguments.images_for(dense.spec.longest)
        self.calibration = sample(data.split("train"), dense.spec, count, arguments.batch_size, arguments.seed)
        self.time = budget_of_time(arguments, classifier, self.calibration) if arguments.asks_for_time else None
        self.criterion, self.scored = _score(arguments, classifier, self.calibration, self.widths)
        self.bench = _Bench(arguments, classifier, data, device)

    @cached_property
    def damage(self) -> Damage:
        """What the entries' channels are worth, measured once."""
        return damage_of(self.arguments, self.classifier, self.calibration, self.scored)

    @cached_property
    def before(self) -> Evaluation:
        """The dense network on the validation split."""
        return self.bench.evaluate(self.dense)

    def within(self, arguments: PruneArguments) -> PruningOutcome:
        """Plan, cut, prove and measure; nothing is written.

        Args:
            arguments: those of the run, perhaps with another budget.

        Raises:
            UserError: the budget can't be reached.
            NotProved: the cut network is not the masked one.
        """
        classifier, calibration, bench, scored = self.classifier, self.calibration, self.bench, self.scored
        damage = self.damage if arguments.measures_damage else None
        widths, plan = distributed.broadcast(choose_plan(arguments, classifier, scored.orders, self.widths, damage, self.time))
        if not plan.kept:
            raise _nothing_to_cut()
        narrow, difference = _cut(classifier, plan, calibration)
        steps, after = _recover(bench, narrow, plan, calibration)
        pruned = bench.backend(narrow)
        results = bench.compare(self.dense, pruned)
        results["top1"] = [self.before.top1, after.top1]
        checkpoint = _checkpoint(classifier, plan, pruned, {name: results[name][1] for name in ("top1", "params", "macs")})
        checkpoint["refitted"] = any(step.name == "refitted" for step in steps)
        results |= {
            "bytes": [_bytes(_dense_checkpoint(classifier, checkpoint)), _bytes(checkpoint)],
            "labels": self.labels,
            "max_relative_difference": difference,
            "compress_rate": compress_rate_of(arguments, classifier, widths),
            "criterion": self.criterion,
            "tied_share": _tied_share(classifier, widths, scored),
            "rank_seconds": round(scored.seconds, 3),
            "groups": classifier.group_rows(widths),
            "steps": [asdict(step) for step in steps],
            "controls": _controls(bench, calibration, widths) if arguments.controls else {},
        }
        notes = list(self.dense.notes)
        if self.time:
            results["latency"] = latency_results(self.time, arguments, classifier.model, narrow)
            notes.append(self.time.note)
        if arguments.refit and len(calibration) < HELD_OUT:
            notes.append(f"not refitted: that takes at least {HELD_OUT} images, and there are {len(calibration)}")
        return PruningOutcome(classifier, plan, scored, checkpoint, results, notes, after)


def run_pruning(arguments: PruneArguments) -> PruningOutcome:
    """Score, plan, cut, prove and measure; nothing is written. See ``PruningRun``."""
    return PruningRun(arguments).within(arguments)


def _load(arguments: PruneArguments, dense: TorchBackend) -> tuple[ImageData, str]:
    """Return the data and whose labels they have: without class folders those of the dense network."""
    if files := images_without_labels(arguments.data):
        data = labelled_by(dense, files, arguments.data, arguments.images_for(dense.spec.longest), arguments.batch_size, arguments.seed)
        sizes = f"{len(data.split('train'))} images to score and refit on, {len(data.split('val'))} held out"
        dense.notes.append(f"{arguments.data} has no class folders: {sizes}; accuracy is agreement with the dense network")
        return data, "dense network"
    return load_for(dense, arguments.data, "val", None, None, arguments.download, arguments.max_pixels), "data set"


def _nothing_to_cut() -> UserError:
    return UserError("these rates cut nothing; every channel stays")


def criterion_of(arguments: PruneArguments, model: nn.Module) -> str:
    """Return the criterion that scores the channels."""
    if arguments.ranks:
        return "rank"
    return arguments.criterion or default_criterion(model, for_budget=not arguments.compress_rate)


def _score(
    arguments: PruneArguments, classifier: TracedClassifier, calibration: Calibration, widths: Mapping[str, int] | None
) -> tuple[str, NetworkScores]:
    """Return the criterion and the scores: those of rank files where they are given."""
    model, graph = classifier.model, classifier.graph
    criterion = criterion_of(arguments, model)
    if arguments.ranks:
        return criterion, score_by_files(arguments.ranks, model, graph, classifier.spec.name)
    return criterion, score(criterion, model, graph, calibration, arguments.seed, widths)


def _cut(classifier: TracedClassifier, plan: PruningPlan, calibration: Calibration) -> tuple[nn.Module, float]:
    """Return a narrow copy of the network, and the relative difference of its outputs from the masked one's."""
    inputs, _ = next(calibration.head(PROOF_IMAGES).batches())
    narrow = deepcopy(classifier.model)
    return narrow, shrink_(narrow, classifier.graph, plan.kept, inputs)


@dataclass(frozen=True)
class Step:
    """A step of a pruning run: its name, the top-1 on the validation split after it, and the seconds it took."""

    name: str
    top1: float
    seconds: float


@dataclass(frozen=True)
class _Bench:
    """Measures forms of one network on the same data and device."""

    arguments: PruneArguments
    classifier: TracedClassifier
    data: ImageData
    device: torch.device

    def backend(self, narrow: nn.Module) -> TorchBackend:
        """Return a narrow form of the network, ready to run."""
        spec = spec_of(self.classifier.spec, group_counts(self.classifier.model), narrow)
        return TorchBackend(replace(self.classifier.loaded, model=narrow, spec=spec), self.device)

    def evaluate(self, backend: TorchBackend) -> Evaluation:
        """Measure a network on the validation split."""
        batch_size = min(2 * self.arguments.batch_size, images_of_a_piece(backend.spec.size))
        workers = self.arguments.workers
        return measure(backend, self.data, "val", batch_size, workers, self.device).evaluation

    def compare(self, before: TorchBackend, after: TorchBackend) -> dict[str, Any]:
        """Measure both networks: size, cost, latency at batch 1; the accuracies are left open."""
        profiles = self.classifier.profile, profile(after.model, after.spec)
        example = example_input(after.model, after.spec).to(memory_format=torch.channels_last)
        return {
            "params": [p.params for p in profiles],
            "macs": [p.macs for p in profiles],
            "top1": [None, None],
            "latency_ms": [round(statistics.median(times), 4) for times in measure_latency([before.model, after.model], example)],
        }


def _recover(bench: _Bench, narrow: nn.Module, plan: PruningPlan, calibration: Calibration) -> tuple[list[Step], Evaluation]:
    """Bring the cut network back without training, in place, as far as the flags say; measure it after each step.

    Returns:
        The steps, and the evaluation after the last.
    """
    classifier, arguments = bench.classifier, bench.arguments
    recovery = Recovery(arguments.refit, arguments.recalibrate_bn, arguments.seed)
    after = bench.evaluate(bench.backend(narrow))
    steps = [Step("cut", after.top1, 0.0)]
    for name, seconds in recover_(narrow, classifier.model, classifier.graph, plan.kept, calibration, recovery):
        after = bench.evaluate(bench.backend(narrow))
        steps.append(Step(name, after.top1, round(seconds, 3)))
    return steps, after


def _checkpoint(classifier: TracedClassifier, plan: PruningPlan, pruned: TorchBackend, metrics: dict[str, float]) -> dict[str, Any]:
    """Return what pruned.pt contains."""
    content: dict[str, Any] = plan.to_dict()
    if earlier := classifier.loaded.checkpoint.get("plan"):
        content["before"] = earlier
    return {
        "spec": pruned.spec.to_dict(),
        "plan": content,
        "dense": {"path": os.path.abspath(classifier.path), "sha256": file_digest(classifier.path)},
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in pruned.model.state_dict().items()},
        "metrics": metrics,
        "arguments": classifier.loaded.checkpoint.get("arguments", {}),
    }


def _dense_checkpoint(classifier: TracedClassifier, pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same checkpoint of the dense network, to compare sizes."""
    return {**pruned, "spec": classifier.spec.to_dict(), "plan": None, "state_dict": classifier.model.state_dict()}


def _bytes(content: Mapping[str, Any]) -> int:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    return buffer.tell()


def _tied_share(classifier: TracedClassifier, widths: Mapping[str, int], scored: NetworkScores) -> float:
    """Return the share of the units of groups that are cut whose score equals another's."""
    sizes = {name: classifier.graph.group(name).size for name in widths}
    cut = [name for name, width in widths.items() if width < sizes[name]]
    return sum(scored.groups[name].tied * sizes[name] for name in cut) / max(sum(sizes[name] for name in cut), 1)


def _controls(bench: _Bench, calibration: Calibration, widths: Mapping[str, int]) -> dict[str, float]:
    """Cut by L1, at random, and at random widths of the same cost; return the top-1 of each on the validation split."""
    arguments, classifier = bench.arguments, bench.classifier
    entries, model, graph = classifier.cuttable, classifier.model, classifier.graph
    cost = macs_cost(graph, classifier.profile.macs)
    budget = Budget(cost, cost(cost.vector(widths)) / cost(cost.full), "macs")
    weights = np.random.default_rng([arguments.seed, 0xC0]).uniform(0.5, 2.0, len(entries))
    random_widths = allocate(graph, entries, budget, 1, 1, lambda i, kept: float(weights[i] * (1 - kept) ** 2))
    controls = {"l1": ("l1", widths), "random": ("random", widths), "random widths": (arguments.criterion or "l1", random_widths)}
    found = {}
    for name, (criterion, at) in controls.items():
        orders = score(criterion, model, graph, calibration, arguments.seed, at).orders
        plan = make_plan(graph, at, orders)
        narrow, _ = _cut(classifier, plan, calibration)
        found[name] = _recover(bench, narrow, plan, calibration)[1].top1
    return found
