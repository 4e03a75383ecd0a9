"""The entries of a compress_rate, the widths that it gives, and the plan that says which channels stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from compression.pruning.hrank_entries import ANY_RATE, HRANK_ARRIVING, HRANK_ENTRIES, NAMESAKES, convolutions_of
from compression.pruning.rates import format_rates, kept_channels, parse_rates, rate_for
from compression.tracing.graph import ChannelGraph, ChannelGroup
from utils.errors import UserError


class Entry(tuple[ChannelGroup, ...]):
    """The groups that one rate of a compress_rate is for; the first leads. HRank+'s grammars have entries that are for none.

    Attributes:
        arriving: groups whose kept units the rate is a share of; without any, it is a share of the leader's own.
    """

    arriving: tuple[ChannelGroup, ...]

    def __new__(cls, groups: Iterable[ChannelGroup] = (), arriving: Iterable[ChannelGroup] = ()) -> Entry:
        entry = super().__new__(cls, groups)
        entry.arriving = tuple(arriving)
        return entry

    def base(self, widths: Mapping[str, int]) -> int:
        """Return how many units the rate is a share of, at the widths of the other groups."""
        return sum(widths.get(group.name, group.size) for group in self.arriving) or self[0].size

    def widths(self, kept: int, rate: Decimal | None = None) -> dict[str, int]:
        """Return the units that each group keeps where the leader keeps ``kept``.

        A group of m times the leader's units keeps m times as many; any other keeps what the rate leaves of it.
        """
        found = {}
        for group in self:
            if group.size % self[0].size == 0:
                found[group.name] = group.size // self[0].size * kept
            else:
                found[group.name] = kept_channels(group.size, rate_for((self[0].size, kept)) if rate is None else rate)
        return found

    def rate(self, widths: Mapping[str, int]) -> Decimal:
        """Return the rate that gives these widths."""
        if not self:
            return Decimal(0)
        others = [(group.size, widths.get(group.name, group.size)) for group in self if group.size % self[0].size]
        return rate_for((self.base(widths), widths.get(self[0].name, self[0].size)), *others)


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
        return [Entry((group,)) for group in graph.prunable]
    by_weight = {member.tensor: group for group in graph.groups for member in group.producers}
    layout = HRANK_ENTRIES[model_name]()
    arriving = HRANK_ARRIVING.get(model_name, dict)()

    def groups(modules: Iterable[str]) -> list[ChannelGroup]:
        return [by_weight[f"{module}.weight"] for module in modules]

    return [Entry(groups(modules), groups(arriving.get(i, ()))) for i, modules in enumerate(layout)]


def widths_of_rates(entries: Sequence[Entry], compress_rate: str, model_name: str = "") -> dict[str, int]:
    """Return the units that each group keeps at a compress_rate; ``rates_of_widths`` is the inverse.

    Args:
        entries: of the network.
        compress_rate: a rate an entry; or one a convolution, as HRank counts, where that means the same.
        model_name: the network's, for what HRank says of it.

    Raises:
        UserError: it is malformed, has another number of rates than there are entries, or would cut what must stay.
    """
    parsed, convolutions = parse_rates(compress_rate), convolutions_of(model_name)
    rates = [parsed] * len(entries) if isinstance(parsed, Decimal) else parsed
    if len(rates) == len(convolutions) != len(entries):
        rates = _by_entry(entries, dict(zip(convolutions, rates, strict=True)))
    if len(rates) != len(entries):
        also = f"; these are HRank+'s entries, and HRank's {len(convolutions)}, one a convolution, are taken too" if convolutions else ""
        also += f"; rates of HRank's are for {NAMESAKES[model_name]}, its network of that name" if model_name in NAMESAKES else ""
        raise UserError(
            f"compress_rate has {len(rates)} entries, this network takes {len(entries)}:\n{entry_table(entries)}\n"
            f"one number stands for all; '*' repeats a rate{also}"
        )
    widths: dict[str, int] = {}
    for entry, rate in zip(entries, rates, strict=True):
        if not entry:
            continue
        found = entry.widths(kept_channels(entry.base(widths), rate), rate)
        for group in entry:
            if found[group.name] < group.size and (group.reason or found[group.name] < len(group.fixed)):
                reason = group.reason or f"{len(group.fixed)} of its {group.size} channels must"
                raise UserError(f"compress_rate {rate} for '{group.name}' is impossible: it stays ({reason})")
        widths |= found
    return widths


def _by_entry(entries: Sequence[Entry], by_convolution: Mapping[str, Decimal]) -> list[Decimal]:
    """Turn HRank's rates, one a convolution, into one an entry.

    Raises:
        UserError: convolutions of one entry have different rates, or one that stays whole here has a rate.
    """
    left, found = dict(by_convolution), []
    begin = f"compress_rate has {len(by_convolution)} entries, one a convolution as HRank counts"
    for entry in entries:
        makers = [module for group in entry for module in group.makers if module in left]
        rates = {left.pop(module) for module in makers}
        if len(rates) > 1:
            examples = {by_convolution[module]: module for module in reversed(makers)}
            shown = ", ".join(f"{module} {rate}" for rate, module in reversed(examples.items()))
            raise UserError(
                f"{begin}; those of tied channels differ ({shown}), so they can't be cut: this network takes {len(entries)} entries"
            )
        found.append(rates.pop() if rates else Decimal(0))
    if cut := next((module for module, rate in left.items() if rate and module != ANY_RATE), None):
        raise UserError(f"{begin}; {cut} has the rate {left[cut]}, but here it stays whole: this network takes {len(entries)} entries")
    return found


def rates_of_widths(entries: Sequence[Entry], widths: Mapping[str, int]) -> str:
    """Return the compress_rate that gives these widths."""
    return format_rates([entry.rate(widths) for entry in entries])


def entry_table(entries: Sequence[Entry]) -> str:
    """Return the numbered entries, a line each."""
    shown = [" + ".join(f"{group.name} ({group.size})" for group in entry) or "nothing; HRank+ has a number here" for entry in entries]
    return "\n".join(f"  {i:>3}  {line}" for i, line in enumerate(shown))
