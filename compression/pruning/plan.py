"""The entries of a compress_rate, the widths that it gives, and the plan that says which channels stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from compression.pruning.rates import format_rates, kept_channels, parse_rates, rate_for
from compression.tracing.graph import ChannelGraph, ChannelGroup
from models.networks.resnet import CIFAR_DEPTHS
from utils.errors import UserError

Entry = tuple[ChannelGroup, ...]  # the groups that one rate of a compress_rate is for


@dataclass(frozen=True)
class PruningPlan:
    """For each channel group that is cut, the kept units, sorted.

    Attributes:
        kept: group name -> kept units, ascending.
        sizes: group name -> units before.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON; ``from_dict`` is the inverse."""
        return {"kept": {name: list(units) for name, units in self.kept.items()}, "sizes": dict(self.sizes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningPlan:
        """Rebuild a plan.

        Raises:
            UserError: it is not a plan.
        """
        try:
            kept = {name: tuple(units) for name, units in values["kept"].items()}
            sizes = dict(values["sizes"].items())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("the pruning plan is damaged: it needs 'kept' (lists of units) and 'sizes', by group") from None
        for name, units in kept.items():
            whole = all(type(number) is int for number in (*units, sizes.get(name)))
            if not whole or list(units) != sorted(set(units)) or not units or not 0 <= units[0] <= units[-1] < sizes[name]:
                raise UserError(f"the pruning plan is damaged: the kept units of '{name}' are not ascending within its size")
        return cls(kept, sizes)

    def digest(self) -> str:
        """Return a hash of the content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def make_plan(graph: ChannelGraph, widths: Mapping[str, int], orders: Mapping[str, Sequence[int]]) -> PruningPlan:
    """Choose the units that stay: those that are fixed, and the most important of the others.

    Args:
        graph: the channel groups.
        widths: group name -> units to keep; groups that are not named stay whole.
        orders: group name -> units from the least to the most important.
    """
    kept, sizes = {}, {}
    for group in graph.prunable:
        width = min(max(widths.get(group.name, group.size), len(group.fixed), 1), group.size)
        if width == group.size:
            continue
        ranked = [unit for unit in map(int, orders[group.name]) if unit not in group.fixed]
        chosen = ranked[len(ranked) - (width - len(group.fixed)) :]
        kept[group.name], sizes[group.name] = tuple(sorted({*chosen, *group.fixed})), group.size
    return PruningPlan(kept, sizes)


def entries_of(graph: ChannelGraph, model_name: str) -> list[Entry]:
    """Return the groups that each entry of a compress_rate is for.

    Every prunable group is an entry, in forward order of its first producer. The networks of HRank+ keep HRank+'s
    entries, which leave out the last stage and join the inner layers of a bottleneck.
    """
    if model_name not in HRANK_ENTRIES:
        return [(group,) for group in graph.prunable]
    by_weight = {member.tensor: group for group in graph.groups for member in group.producers}
    return [tuple(by_weight[f"{module}.weight"] for module in modules) for modules in HRANK_ENTRIES[model_name]()]


def _cifar_resnet(depth: int) -> list[tuple[str, ...]]:
    blocks = (depth - 2) // 6
    mids = [(f"layer{stage}.{block}.conv1",) for stage in (1, 2, 3) for block in range(blocks)]
    return [("conv1",), ("layer1.0.conv2",), ("layer2.0.conv2",), *mids]


def _resnet50() -> list[tuple[str, ...]]:
    outputs = [(f"layer{stage}.0.conv3",) for stage in (1, 2, 3)]
    mids = [(f"layer{s}.{b}.conv1", f"layer{s}.{b}.conv2") for s, depth in enumerate((3, 4, 6, 3), 1) for b in range(depth)]
    return [("conv1",), *outputs, *mids]


# model -> the modules of each entry, as HRank+ counts them.
HRANK_ENTRIES: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "vgg16-cifar": lambda: [(f"features.conv{i}",) for i in range(12)],
    "resnet50": _resnet50,
    **{f"resnet{depth}": (lambda depth=depth: _cifar_resnet(depth)) for depth in CIFAR_DEPTHS},  # type: ignore[misc]
}


def widths_of_rates(entries: Sequence[Entry], compress_rate: str) -> dict[str, int]:
    """Return the units that each group keeps at a compress_rate; ``rates_of_widths`` is the inverse.

    Raises:
        UserError: it is malformed, has another number of rates than there are entries, or would cut what must stay.
    """
    parsed = parse_rates(compress_rate)
    rates = [parsed] * len(entries) if isinstance(parsed, Decimal) else parsed
    if len(rates) != len(entries):
        raise UserError(
            f"compress_rate has {len(rates)} entries, this network takes {len(entries)}:\n{entry_table(entries)}\n"
            "one number stands for all; '*' repeats a rate"
        )
    widths = {}
    for entry, rate in zip(entries, rates, strict=True):
        for group in entry:
            kept = kept_channels(group.size, rate)
            if kept < group.size and (group.reason or kept < len(group.fixed)):
                reason = group.reason or f"{len(group.fixed)} of its {group.size} channels must"
                raise UserError(f"compress_rate {rate} for '{group.name}' is impossible: it stays ({reason})")
            widths[group.name] = kept
    return widths


def rates_of_widths(entries: Sequence[Entry], widths: Mapping[str, int]) -> str:
    """Return the compress_rate that gives these widths."""
    return format_rates([rate_for(entry[0].size, widths.get(entry[0].name, entry[0].size)) for entry in entries])


def entry_table(entries: Sequence[Entry]) -> str:
    """Return the numbered entries, a line each."""
    return "\n".join(f"  {i:>3}  {' + '.join(f'{g.name} ({g.size})' for g in entry)}" for i, entry in enumerate(entries))
