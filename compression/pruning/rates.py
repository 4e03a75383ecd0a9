"""compress_rate: "[0.]+[0.15]*2+[0.4]*27", the share of each layer's channels that goes (HRank's grammar, read strictly).

Every entry is one rate; ``*count`` repeats it; ``+`` joins; one bare number stands for all entries. Arithmetic is exact
decimal: of 160 channels, 16 stay at 0.9, where floating point would leave 15.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from itertools import groupby

from utils.errors import UserError

GRAMMAR = '"[rate]*count+[rate]*count...", each rate in [0, 1): "[0.]+[0.15]*2+[0.4]*27"; or one number for all: "0.3"'
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")  # \d would take the digits of every script
_COUNT = re.compile(r"0*([0-9]+)")
_MAX_ENTRIES = 100_000


def parse_rates(text: str) -> list[Decimal] | Decimal:
    """Read a compress_rate.

    Returns:
        A rate per entry, or one for all where it is a bare number.

    Raises:
        UserError: it is malformed; the message points at the place.
    """
    place = _skip(text, 0)
    if place < len(text) and text[place] != "[":
        rate, place = _rate(text, place)
        if _skip(text, place) < len(text):
            raise _wrong(text, _skip(text, place), "a bare number stands alone")
        return rate
    rates: list[Decimal] = []
    while True:
        place = _expect(text, place, "[")
        rate, place = _rate(text, _skip(text, place))
        place = _skip(text, _expect(text, place, "]"))
        count, after = 1, "'+', '*' or the end"
        if place < len(text) and text[place] == "*":
            place = _skip(text, place + 1)
            match = _COUNT.match(text, place)
            if not match or match[1] == "0":
                raise _wrong(text, place, "expected a count of at least 1")
            if len(match[1]) > len(str(_MAX_ENTRIES)) or len(rates) + int(match[1]) > _MAX_ENTRIES:
                raise _wrong(text, place, f"more than {_MAX_ENTRIES:,} entries; no network takes so many")
            count, place = int(match[1]), _skip(text, match.end())
            after = "'+' or the end"
        rates += [rate] * count
        if len(rates) > _MAX_ENTRIES:
            raise _wrong(text, place, f"more than {_MAX_ENTRIES:,} entries; no network takes so many")
        if place == len(text):
            return rates
        if text[place] != "+":
            raise _wrong(text, place, f"expected {after}")
        place += 1


def kept_channels(channels: int, rate: Decimal) -> int:
    """Return how many of ``channels`` stay at a rate: the floor of channels * (1 - rate), at least one (HRank+)."""
    return max(channels * (1 - Fraction(rate)) // 1, 1)  # Decimal would round to 28 digits


def rate_for(*kept_of: tuple[int, int]) -> Decimal:
    """Return the rate of the fewest decimals at which, of each (channels, kept), exactly ``kept`` of ``channels`` stay."""
    for decimals in range(1, 13):
        unit = Decimal(1).scaleb(-decimals)
        # The smallest rate that removes enough is the most readable; it must not remove one more.
        low = max((1 - Decimal(kept + 1) / channels).quantize(unit, ROUND_FLOOR) + unit for channels, kept in kept_of)
        high = min((1 - Decimal(kept) / channels).quantize(unit, ROUND_FLOOR) for channels, kept in kept_of)
        for rate in (high, low):
            if 0 <= rate < 1 and all(kept_channels(channels, rate) == kept for channels, kept in kept_of):
                return rate
    raise AssertionError(f"no rate keeps {kept_of}")


def format_rates(rates: Sequence[Decimal]) -> str:
    """Write rates as a compress_rate, runs of equal ones as counts."""
    terms = []
    for rate, run in groupby(rates):
        count = len(list(run))
        shown = f"{rate:f}".rstrip("0") if rate else "0."
        terms.append(f"[{shown}]" + (f"*{count}" if count > 1 else ""))
    return "+".join(terms)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _expect(text: str, place: int, character: str) -> int:
    place = _skip(text, place)
    if place >= len(text) or text[place] != character:
        raise _wrong(text, place, f"expected '{character}'")
    return place + 1


def _rate(text: str, place: int) -> tuple[Decimal, int]:
    match = _NUMBER.match(text, place)
    if not match:
        raise _wrong(text, place, "expected a rate")
    rate, typed_on = Decimal(match[0]), text[match.end() : match.end() + 1]
    if not 0 <= rate < 1 and not typed_on.isalpha():  # of "1e-", that the exponent is missing is said
        raise _wrong(text, place, f"the rate {match[0]} is the share that goes; it must lie in [0, 1)")
    return rate, match.end()


def _wrong(text: str, place: int, what: str) -> UserError:
    shown = "".join(" " if character.isspace() else character for character in text)  # a tab or newline would move the caret
    return UserError(f"compress_rate: {what}\n  {shown}\n  {' ' * place}^\n  valid: {GRAMMAR}")
