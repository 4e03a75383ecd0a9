"""What a pruning run cuts: the network, its channel groups, the entries of its compress_rate, and how much shall go."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compression.pruning.allocation import ALLOCATIONS, Budget, allocate
from compression.pruning.arguments import PruneArguments
from compression.pruning.costs import macs_cost, params_cost
from compression.pruning.plan import Entry, entries_of, rates_of_widths, widths_of_rates
from compression.pruning.rates import parse_rates
from compression.scoring.criteria import CRITERIA
from compression.tracing.channels import trace
from compression.tracing.graph import ChannelGraph
from models.loading import LoadedClassifier, default_size, load_classifier
from models.networks import build, resolve_model
from utils.errors import UserError, nearest, unknown
from utils.measures.profile import Profile, count_macs, example_input, profile
from utils.spec import ModelSpec

DEFAULT_CRITERION, DEFAULT_WITHOUT_ZEROS = "rank", "taylor"
# Activations that are never exactly zero: every map has full rank, and ranks tie.
WITHOUT_ZEROS = (nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.PReLU)


@dataclass
class TracedClassifier:
    """The network that is cut, and its channel groups."""

    loaded: LoadedClassifier
    spec: ModelSpec
    graph: ChannelGraph
    entries: list[Entry]
    profile: Profile
    excluded: dict[str, str]

    @property
    def model(self) -> nn.Module:
        """The dense network, on the CPU."""
        return self.loaded.model


def check_arguments(a: PruneArguments) -> None:
    """Refuse what can't be done before anything is loaded.

    Raises:
        UserError: a value is unknown or out of range, or the amount is not given exactly once.
    """
    given = [name for name in ("compress_rate", "macs", "params") if getattr(a, name) not in ("", None)]
    if len(given) > 1 or (not given and not a.dry_run):
        raise UserError(
            f"{' and '.join('--' + name for name in given)} exclude each other"
            if given
            else "say how much goes: --compress_rate (share of the channels that goes), --macs or --params (share that stays)"
        )
    if a.criterion and a.criterion not in CRITERIA:
        raise unknown("criterion", a.criterion, CRITERIA)
    if a.allocation not in ALLOCATIONS:
        raise unknown("allocation", a.allocation, ALLOCATIONS)
    if a.compress_rate:
        parse_rates(a.compress_rate)
        if a.allocation != "uniform":
            raise UserError("--allocation sensitivity is for a budget (--macs or --params); --compress_rate says the widths itself")
    for name in ("macs", "params"):
        if getattr(a, name) is not None and not 0 < getattr(a, name) <= 1:
            raise UserError(f"{name} is {getattr(a, name)}; it is the share that stays, in (0, 1]")
    for name in ("round_to", "min_channels", "images", "batch_size", "num_classes"):
        if getattr(a, name) < 1:
            raise UserError(f"{name.replace('_', '-')} is {getattr(a, name)}; it must be at least 1")
    if a.seed < 0:
        raise UserError(f"seed is {a.seed}; it must be at least 0")
    if a.recalibrate_bn and min(a.images, a.batch_size) < 2:
        raise UserError("--recalibrate-bn needs --images and --batch-size of at least 2: one image may have no variance")
    if not a.weights and not (a.dry_run and a.model):
        raise UserError("give --weights; with --dry-run, --model NAME and --num-classes N do instead")
    if a.ranks and a.criterion not in ("", "rank"):
        raise UserError(f"--ranks brings scores, so --criterion {a.criterion} can't be computed too")
    if a.json and not a.dry_run:
        raise UserError("--json goes with --dry-run; a run writes results.json into its folder")


def load_traced(a: PruneArguments) -> TracedClassifier:
    """Load (or build) the network and find its channel groups.

    Raises:
        UserError: the weights can't be loaded, the size does not fit, or a pattern of --exclude matches nothing.
    """
    if a.weights:
        loaded = load_classifier(a.weights, a.model or None)
        if loaded.spec.quantization:
            raise UserError(f"{a.weights} is quantized, so its channels can't be cut: prune first, then train quantized")
    else:
        name, definition = resolve_model(a.model)
        spec = ModelSpec(name, a.num_classes, default_size(name) if a.imgsz is None else a.imgsz, definition=definition)
        loaded = LoadedClassifier(build(spec), spec, named=False)
    spec = loaded.spec if a.imgsz is None else loaded.spec.with_(imgsz=a.imgsz)
    loaded = replace(loaded, spec=spec, model=loaded.model.eval())
    measured = profile(loaded.model, spec)
    graph = trace(loaded.model, example_input(loaded.model, spec))
    excluded = _excluded(graph, a.exclude)
    return TracedClassifier(loaded, spec, graph, entries_of(graph, spec.name), measured, excluded)


def _excluded(graph: ChannelGraph, patterns: Sequence[str]) -> dict[str, str]:
    """Return the groups that patterns name (by any module that makes their channels), with the pattern."""
    names = {g.name: {g.name, *(m.tensor.rpartition(".")[0] for m in g.producers)} for g in graph.prunable}
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name, modules in names.items() if any(fnmatch.fnmatch(module, pattern) for module in modules)]
        if not matched:
            raise UserError(f"exclude: '{pattern}' matches no channel group.{nearest(pattern, names)} Valid: {', '.join(names)}")
        found |= dict.fromkeys(matched, pattern)
    return found


def default_criterion(model: nn.Module) -> str:
    """Return the criterion for a network: ranks need activations with exact zeros."""
    smooth = any(isinstance(module, WITHOUT_ZEROS) for module in model.modules())
    return DEFAULT_WITHOUT_ZEROS if smooth else DEFAULT_CRITERION


def fixed_widths(a: PruneArguments, classifier: TracedClassifier) -> dict[str, int] | None:
    """Return the widths where they do not depend on scores; None for an allocation by sensitivity.

    Raises:
        UserError: the rates do not fit the network, or the budget can't be reached.
    """
    if not a.compress_rate and (a.allocation != "uniform" or (a.macs is None and a.params is None)):
        return None
    if a.compress_rate:
        widths = widths_of_rates(classifier.entries, parse_rates(a.compress_rate))
        return {group.name: widths[group.name] for entry in cuttable(classifier) for group in entry}
    return allocate(classifier.graph, cuttable(classifier), budget_of(a, classifier), a.round_to, a.min_channels, None)


def shown_rates(a: PruneArguments, classifier: TracedClassifier, widths: Mapping[str, int]) -> str:
    """Return the compress_rate of a run: as it was given, or the one that gives the budget's widths."""
    return "".join(a.compress_rate.split()) if a.compress_rate and not classifier.excluded else rates_of_widths(classifier.entries, widths)


def cuttable(classifier: TracedClassifier) -> list[Entry]:
    """Return the entries of which no group is excluded."""
    return [entry for entry in classifier.entries if not any(group.name in classifier.excluded for group in entry)]


def budget_of(a: PruneArguments, classifier: TracedClassifier) -> Budget:
    """Return the budget of --macs or --params."""
    if a.macs is not None:
        return Budget(macs_cost(classifier.graph, count_macs(classifier.model, classifier.spec)), a.macs, "macs")
    assert a.params is not None
    names = list(dict(classifier.model.named_parameters()))
    return Budget(params_cost(classifier.graph, names), a.params, "params")


def group_rows(classifier: TracedClassifier, widths: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """Return a row per channel group: its entry's number, name, channels before and after, and why it can't be cut."""
    numbers = {group.name: i for i, entry in enumerate(classifier.entries) for group in entry}
    return [
        {
            "index": numbers.get(group.name),
            "name": group.name,
            "channels": group.channels,
            "kept": (widths or {}).get(group.name, group.size) * group.channels // group.size,
            "prunable": group.prunable and group.name not in classifier.excluded,
            "reason": f"excluded by '{classifier.excluded[group.name]}'" if group.name in classifier.excluded else group.reason,
        }
        for group in classifier.graph.groups
    ]
