"""How many units each group keeps, and which, as the flags of prune.py ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compression.layers.readers import measure_readers
from compression.pruning.allocation import Budget, Damage, allocate
from compression.pruning.arguments import PruneArguments
from compression.pruning.damage import PROBED, measure_damage
from compression.pruning.latency_budget import LatencyBudget
from compression.pruning.plan import PruningPlan, make_plan, rates_of_widths, widths_of_rates
from compression.pruning.traced_classifier import TracedClassifier
from compression.scoring.calibration import Calibration
from compression.scoring.scores import NetworkScores
from compression.tracing.costs import macs_cost, params_cost
from utils.measures.profile import count_macs

DAMAGE_IMAGES = (32, 128)  # images on which damage is measured: at least, at most
DAMAGE_MACS = 1e13  # multiply-adds that measuring it may take, if the least number of images allows


def widths_before_scoring(arguments: PruneArguments, classifier: TracedClassifier) -> dict[str, int] | None:
    """Return the widths if they do not depend on scores; None for an allocation by sensitivity, or if no amount is given.

    Raises:
        UserError: the rates do not fit the network, or the budget can't be reached.
    """
    if arguments.compress_rate:
        widths = widths_of_rates(classifier.entries, arguments.compress_rate, classifier.spec.name)
        return {group.name: widths[group.name] for entry in classifier.cuttable for group in entry}
    if arguments.measures_damage or (arguments.macs is None and arguments.params is None):
        return None
    budget = budget_of(arguments, classifier)
    return allocate(classifier.graph, classifier.cuttable, budget, arguments.round_to, arguments.min_channels, None)


def choose_plan(
    arguments: PruneArguments,
    classifier: TracedClassifier,
    orders: Mapping[str, Sequence[int]],
    widths: dict[str, int] | None,
    damage: Damage | None,
    time: LatencyBudget | None = None,
) -> tuple[dict[str, int], PruningPlan]:
    """Return the widths, unless they are known, where the damage is least, and the units that stay.

    Args:
        orders: group name -> units from the least to the most important.
        widths: those of ``widths_before_scoring``.
        damage: of the entries, for an allocation by sensitivity.
        time: the budget, if it is one of time.
    """
    graph = classifier.graph

    def plan_within(budget: Budget) -> tuple[dict[str, int], PruningPlan]:
        widths = allocate(graph, classifier.cuttable, budget, arguments.round_to, arguments.min_channels, damage)
        return widths, make_plan(graph, widths, orders)

    if arguments.compress_rate:
        assert widths is not None
        return widths, make_plan(graph, widths, orders)
    if time:
        assert damage is not None
        return time.choose(damage, orders, arguments.min_channels, arguments.latency)
    budget = aim = budget_of(arguments, classifier)
    widths, plan = plan_within(aim) if widths is None else (widths, make_plan(graph, widths, orders))
    while (spent := budget.cost.of(plan.kept)) > budget.limit:  # the chosen units have more channels than the mean
        aim = replace(aim, share=aim.share * min(budget.limit / spent, 0.998))
        widths, plan = plan_within(aim)
    return widths, plan


def damage_of(arguments: PruneArguments, classifier: TracedClassifier, calibration: Calibration, scored: NetworkScores) -> Damage:
    """Measure what the entries' channels are worth: after their readers are refitted, if the cut network will be."""
    model, graph, entries = classifier.model, classifier.graph, classifier.cuttable
    moments = None
    if arguments.refit:
        moments = scored.readers or measure_readers(
            model, graph, (inputs for inputs, _ in calibration.batches()), arguments.seed, len(calibration)
        )
    least, most = DAMAGE_IMAGES
    affordable = int(DAMAGE_MACS / (max(classifier.profile.macs, 1) * len(PROBED) * max(len(entries), 1)))
    images = calibration.head(min(max(affordable, least), most))
    return measure_damage(model, graph, entries, scored.orders, images, moments)


def compress_rate_of(arguments: PruneArguments, classifier: TracedClassifier, widths: Mapping[str, int]) -> str:
    """Return the compress_rate of a run: as it was given, or the one that gives the same widths."""
    if arguments.compress_rate and not classifier.excluded:
        return "".join(arguments.compress_rate.split())
    return rates_of_widths(classifier.entries, widths)


def budget_of(arguments: PruneArguments, classifier: TracedClassifier) -> Budget:
    """Return the budget of --macs or --params."""
    if arguments.macs is not None:
        return Budget(macs_cost(classifier.graph, count_macs(classifier.model, classifier.spec)), arguments.macs, "macs")
    assert arguments.params is not None
    names = list(dict(classifier.model.named_parameters()))
    return Budget(params_cost(classifier.graph, names), arguments.params, "params")
