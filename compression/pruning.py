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

from compression.allocation import Budget, allocate, measure_damage
from compression.arguments import PruneArguments
from compression.calibration import Calibration, sample
from compression.costs import macs_cost
from compression.criteria import Scored, score
from compression.narrowing import scores_of_files, spec_of
from compression.plan import PruningPlan, make_plan
from compression.subject import (
    Subject,
    budget_of,
    check_arguments,
    cuttable,
    default_criterion,
    fixed_widths,
    group_rows,
    load_subject,
    shown_rates,
)
from compression.surgery import shrink_
from models.backends import TorchBackend
from models.validation import load_for, measure
from utils import distributed
from utils.checkpoint import FORMAT, VERSION
from utils.errors import UserError
from utils.profile import example_input, measure_latency, profile
from utils.spec import ModelSpec
from utils.splits import ImageData

PROOF_IMAGES = 8


@dataclass
class Outcome:
    """What a run found; ``results`` is what results.json holds.

    Attributes:
        controls: criterion -> top-1 of a control.
    """

    subject: Subject
    plan: PruningPlan
    scored: Scored
    narrow: nn.Module
    checkpoint: dict[str, Any]
    results: dict[str, Any]
    controls: dict[str, float]
    notes: list[str]


def run_pruning(a: PruneArguments) -> Outcome:
    """Score, plan, cut, prove and measure; nothing is written.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit.
        NotProved: the cut network is not the masked one.
    """
    check_arguments(a)
    device = distributed.select_device(a.device)
    distributed.join(device)
    subject = load_subject(a)
    widths = fixed_widths(a, subject)
    if widths is not None and all(width == subject.graph.group(name).size for name, width in widths.items()):
        raise UserError("these rates cut nothing; every channel stays")
    dense = TorchBackend(replace(subject.loaded, model=deepcopy(subject.model)), device)
    if not distributed.is_main():
        distributed.barrier()  # rank 0 downloads first
    data = load_for(dense, a.data, "val", None, None, a.download)
    if distributed.is_main():
        distributed.barrier()
    subject.loaded.spec = subject.spec = dense.spec
    calibration = sample(data.split("train"), dense.spec, a.images, a.batch_size, a.seed)
    criterion = a.criterion or default_criterion(subject.model)
    if a.ranks:
        criterion = "rank"
        scored = Scored(scores_of_files(a.ranks, subject.model, subject.graph), None, 0.0)
    else:
        scored = score(criterion, subject.model, subject.graph, calibration, a.seed, widths)
    orders = {name: found.order.tolist() for name, found in scored.groups.items()}
    widths, plan = distributed.broadcast(_choose(a, subject, calibration, orders, widths))
    if not plan.kept:
        raise UserError("these rates cut nothing; every channel stays")
    narrow, difference = _cut(a, subject, plan, calibration)
    before, after = dense, TorchBackend(replace(subject.loaded, model=narrow, spec=_narrow_spec(subject, narrow)), device)
    checkpoint = _checkpoint(a, subject, plan, after.spec, narrow)
    results = _results(a, subject, widths, scored, criterion)
    measured = _compare(a, subject, before, after, data, device)
    checkpoint["metrics"] = {"top1": measured["top1"][1], "params": measured["params"][1], "macs": measured["macs"][1]}
    dense_file = {**checkpoint, "spec": subject.spec.to_dict(), "plan": None, "state_dict": subject.model.state_dict()}
    sizes = {"bytes": [_bytes(dense_file), _bytes(checkpoint)]}
    results = {**measured, **sizes, "max_relative_difference": difference, **results}
    controls = _controls(a, subject, plan, calibration, data, device, widths) if a.controls else {}
    return Outcome(subject, plan, scored, narrow, checkpoint, {**results, "controls": controls}, controls, dense.notes)


def _choose(
    a: PruneArguments, subject: Subject, calibration: Calibration, orders: Mapping[str, Sequence[int]], widths: dict[str, int] | None
) -> tuple[dict[str, int], PruningPlan]:
    """Return the widths, which may be fixed already, and the units that stay."""
    graph, entries, damage = subject.graph, cuttable(subject), None
    if widths is None:
        damage = measure_damage(subject.model, graph, entries, orders, calibration.head(256))
        widths = allocate(graph, entries, budget_of(a, subject), a.round_to, a.min_channels, damage)
    plan = make_plan(graph, widths, orders)
    if a.compress_rate:
        return widths, plan
    budget = aim = budget_of(a, subject)
    while (spent := budget.cost.of(plan.kept)) > budget.limit:  # the chosen units have more channels than the mean
        aim = replace(aim, share=aim.share * min(budget.limit / spent, 0.998))
        widths = allocate(graph, entries, aim, a.round_to, a.min_channels, damage)
        plan = make_plan(graph, widths, orders)
    return widths, plan


def _cut(a: PruneArguments, subject: Subject, plan: PruningPlan, calibration: Calibration) -> tuple[nn.Module, float]:
    """Return a narrow copy of the network, and the relative difference of its outputs from the masked one's."""
    inputs, _ = next(calibration.head(PROOF_IMAGES).batches())
    narrow = deepcopy(subject.model)
    difference = shrink_(narrow, subject.graph, plan.kept, inputs)
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


def _narrow_spec(subject: Subject, narrow: nn.Module) -> ModelSpec:
    return spec_of(subject.spec, subject.model, narrow)


def _checkpoint(a: PruneArguments, subject: Subject, plan: PruningPlan, spec: ModelSpec, narrow: nn.Module) -> dict[str, Any]:
    """Return what pruned.pt holds."""
    content: dict[str, Any] = plan.to_dict()
    if earlier := subject.loaded.checkpoint.get("plan"):
        content["before"] = earlier
    return {
        "spec": spec.to_dict(),
        "plan": content,
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in narrow.state_dict().items()},
        "metrics": {},
        "arguments": subject.loaded.checkpoint.get("arguments", {}),
    }


def _compare(
    a: PruneArguments,
    subject: Subject,
    before: TorchBackend,
    after: TorchBackend,
    data: ImageData,
    device: torch.device,
) -> dict[str, list[float]]:
    """Measure both networks: size, cost, accuracy on the validation split, latency at batch 1."""
    profiles = subject.profile, profile(after.model, after.spec)
    accuracies = [measure(backend, data, "val", 4 * a.batch_size, a.workers, device).evaluation.top1 for backend in (before, after)]
    example = example_input(after.model, after.spec).to(memory_format=torch.channels_last)
    latencies = [round(statistics.median(times), 4) for times in measure_latency([before.model, after.model], example)]
    return {
        "params": [p.params for p in profiles],
        "macs": [p.macs for p in profiles],
        "top1": accuracies,
        "latency_ms": latencies,
    }


def _bytes(content: Mapping[str, Any]) -> int:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    return buffer.tell()


def _results(a: PruneArguments, subject: Subject, widths: Mapping[str, int], scored: Scored, criterion: str) -> dict[str, Any]:
    cut = [name for name, width in widths.items() if width < subject.graph.group(name).size]
    channels = sum(subject.graph.group(name).size for name in cut)
    tied = sum(scored.groups[name].tied * subject.graph.group(name).size for name in cut)
    return {
        "compress_rate": shown_rates(a, subject, widths),
        "criterion": criterion,
        "tied_share": tied / max(channels, 1),
        "rank_seconds": round(scored.seconds, 3),
        "groups": group_rows(subject, widths),
    }


def _controls(
    a: PruneArguments,
    subject: Subject,
    plan: PruningPlan,
    calibration: Calibration,
    data: ImageData,
    device: torch.device,
    widths: Mapping[str, int],
) -> dict[str, float]:
    """Cut by L1, by chance, and at chance widths of the same cost, and measure each on the validation split."""
    cost = macs_cost(subject.graph, subject.profile.macs)
    share = cost(cost.vector(widths)) / cost(cost.full)
    drawn = np.random.default_rng([a.seed, 0xC0])
    weights = drawn.uniform(0.5, 2.0, len(cuttable(subject)))
    chance = allocate(
        subject.graph, cuttable(subject), Budget(cost, share, "macs"), 1, 1, lambda i, kept: float(weights[i] * (1 - kept) ** 2)
    )
    found = {}
    for name, criterion, at in (("l1", "l1", widths), ("random", "random", widths), ("random widths", a.criterion or "l1", chance)):
        scored = score(criterion, subject.model, subject.graph, calibration, a.seed, at)
        other = make_plan(subject.graph, at, {key: value.order.tolist() for key, value in scored.groups.items()})
        narrow, _ = _cut(a, subject, other, calibration)
        backend = TorchBackend(replace(subject.loaded, model=narrow, spec=_narrow_spec(subject, narrow)), device)
        found[name] = measure(backend, data, "val", 4 * a.batch_size, a.workers, device).evaluation.top1
    return found
