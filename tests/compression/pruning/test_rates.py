from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction

import pytest

from compression.pruning.rates import GRAMMAR, format_rates, kept_channels, parse_rates, rate_for
from utils.errors import UserError


def rates(text):
    parsed = parse_rates(text)
    assert isinstance(parsed, list)
    return [str(rate) for rate in parsed]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1]", ["0.1"]),
        ("[0.]", ["0"]),
        ("[0]", ["0"]),
        ("[.5]", ["0.5"]),  # HRank's parser crashes here
        ("[0.15]*2", ["0.15", "0.15"]),
        ("[0.]+[0.15]*2+[0.4]*3", ["0", "0.15", "0.15", "0.4", "0.4", "0.4"]),
        ("[0.1] * 3", ["0.1", "0.1", "0.1"]),  # HRank's parser reads one entry here
        ("  [ 0.1 ]\t*\n2 + [ .25 ]  ", ["0.1", "0.1", "0.25"]),
        ("[0.5]*1+[0.5]*02", ["0.5", "0.5", "0.5"]),
        ("[00.50]", ["0.50"]),
        ("[1e-1]+[5e-01]", ["0.1", "0.5"]),
    ],
)
def test_what_the_grammar_takes(text, expected):
    assert rates(text) == expected


@pytest.mark.parametrize(("text", "rate"), [("0.3", "0.3"), (" .3 ", "0.3"), ("0", "0"), ("0.", "0"), ("0.999", "0.999")])
def test_a_bare_number_is_one_rate_for_all(text, rate):
    parsed = parse_rates(text)
    assert isinstance(parsed, Decimal)
    assert parsed == Decimal(rate)


@pytest.mark.parametrize(
    ("text", "column", "what"),
    [
        ("", 0, "expected '['"),
        ("   ", 3, "expected '['"),
        ("[10.0]", 1, "the rate 10.0 is the share that goes; it must lie in [0, 1)"),  # passes in HRank
        ("10.0", 0, "the rate 10.0"),
        ("[-0.5]", 1, "expected a rate"),  # gives 0.5 in HRank
        ("-0.5", 0, "expected a rate"),
        ("[+0.5]", 1, "expected a rate"),
        ("[1]", 1, "the rate 1 is"),  # crashes in HRank
        ("[1.]", 1, "the rate 1. is"),
        ("[1.000]", 1, "the rate 1.000"),
        ("[0.1]+[1]*3", 7, "the rate 1 is"),
        ("[]", 1, "expected a rate"),
        ("[.]", 1, "expected a rate"),
        (".", 0, "expected a rate"),
        ("[0.1", 4, "expected ']'"),
        ("[0.1 0.2]", 5, "expected ']'"),
        ("[0.1,0.2]", 4, "expected ']'"),
        ("[0.1]]", 5, "expected '+', '*' or the end"),
        ("[0.1][0.2]", 5, "expected '+', '*' or the end"),
        ("[0.1]+", 6, "expected '['"),
        ("+[0.1]", 0, "expected a rate"),
        ("[0.1]++[0.2]", 6, "expected '['"),
        ("[0.1]+0.2", 6, "expected '['"),
        ("[0.1]*", 6, "expected a count of at least 1"),
        ("[0.1]*0", 6, "expected a count of at least 1"),
        ("[0.1]*000", 6, "expected a count of at least 1"),
        ("[0.1]*-2", 6, "expected a count of at least 1"),
        ("[0.1]*two", 6, "expected a count of at least 1"),
        ("[0.1]*2.5", 7, "expected '+' or the end"),
        ("[0.1]*2*2", 7, "expected '+' or the end"),
        ("2*[0.1]", 0, "the rate 2"),
        ("0.1*2", 3, "a bare number stands alone"),
        ("0.1 0.2", 4, "a bare number stands alone"),
        ("0.1]", 3, "a bare number stands alone"),
        ("[1e1]", 1, "the rate 1e1 is"),
        ("[1e-1000]", 7, "expected ']'"),
        ("[1e-]", 2, "expected ']'"),
        ("[0.5]*100000+[0.1]", 18, "more than 100,000 entries"),
        ("[0.1e]", 4, "expected ']'"),
        ("[0.1%]", 4, "expected ']'"),
        ("[nan]", 1, "expected a rate"),
        ("[inf]", 1, "expected a rate"),
        ("(0.1)", 0, "expected a rate"),
        ("[\u0660.\u0665]", 1, "expected a rate"),  # Arabic digits are digits to Python
        ("[0.\u0665]", 3, "expected ']'"),
        ("[0.1]*\u0663", 6, "expected a count of at least 1"),
        ("[\uff10.5]", 1, "expected a rate"),  # a full-width zero
        ("[0.1]*100001", 6, "more than 100,000 entries"),
        ("[0.1]*99999+[0.2]*2", 18, "more than 100,000 entries"),
        ("[0.1]*" + "9" * 10_000, 6, "more than 100,000 entries"),  # more digits than Python turns into an int
    ],
)
def test_what_is_wrong_is_shown_under_its_place_with_the_valid_form(text, column, what):
    with pytest.raises(UserError) as refused:
        parse_rates(text)
    first, shown, caret, valid = str(refused.value).split("\n")
    assert first.startswith(f"compress_rate: {what}")
    assert shown == "  " + text
    assert caret == "  " + " " * column + "^"
    assert valid == f"  valid: {GRAMMAR}"


def test_the_caret_stands_right_behind_tabs_and_newlines():
    with pytest.raises(UserError) as refused:
        parse_rates("[0.1]\t+\n[x]")
    assert str(refused.value).split("\n")[1:3] == ["  [0.1] + [x]", "           ^"]


def test_counts_up_to_the_limit_are_read():
    assert len(rates("[0.1]*100000")) == 100_000
    assert len(rates("[0.1]*00000000003")) == 3


@pytest.mark.parametrize(
    ("channels", "rate", "kept"),
    [
        (160, "0.9", 16),  # int(160 * (1 - 0.9)) is 15
        (16, "0.4", 9),  # 9.6
        (32, "0.4", 19),  # 19.2
        (64, "0.4", 38),  # 38.4
        (16, "0.15", 13),  # 13.6
        (64, "0.21", 50),  # 50.56
        (512, "0.75", 128),
        (512, "0.78", 112),  # 112.64
        (64, "0", 64),
        (100, "0.29", 71),
        (1000, "0.001", 999),
        (16, "0.99", 1),  # 0.16, and at least one stays
        (1, "0.5", 1),
        (1000, "0.9999999", 1),
        (10, "0.1000000000000000000000000000000000000001", 8),  # just below 9
        (10, "0.0999999999999999999999999999999999999999", 9),
    ],
)
def test_the_floor_of_what_stays_is_kept_in_exact_arithmetic(channels, rate, kept):
    assert kept_channels(channels, Decimal(rate)) == kept
    assert type(kept_channels(channels, Decimal(rate))) is int


def test_floors_agree_with_fractions():
    draw = random.Random(0)
    for _ in range(2000):
        channels, digits = draw.randint(1, 4096), draw.randint(1, 6)
        text = f"0.{draw.randrange(10**digits):0{digits}}"
        exact = channels - Fraction(text) * channels
        assert kept_channels(channels, Decimal(text)) == max(exact.numerator // exact.denominator, 1)


def test_every_width_of_every_size_has_a_rate_that_survives_being_written_and_read():
    for size in range(1, 301):
        found = [rate_for((size, kept)) for kept in range(1, size + 1)]
        assert [kept_channels(size, rate) for rate in found] == list(range(1, size + 1))
        again = parse_rates(format_rates(found))
        assert again == found
        assert max(-rate.as_tuple().exponent for rate in found) <= 3  # steps of 1 / 300 need no more decimals


@pytest.mark.parametrize(
    ("size", "kept", "rate"),
    [(16, 16, "0"), (16, 9, "0.4"), (64, 32, "0.5"), (160, 16, "0.9"), (3, 1, "0.6"), (3, 2, "0.3"), (10, 9, "0.1"), (1, 1, "0")],
)
def test_the_shortest_rate_is_found(size, kept, rate):
    # 16 -> 9: 0.4 keeps 9.6; 3 -> 1: 0.6 keeps 1.2, as 0.4 keeps 1.8; 3 -> 2: 0.3 keeps 2.1.
    assert rate_for((size, kept)) == Decimal(rate)


def test_rates_are_written_with_runs_as_counts():
    assert format_rates([Decimal(r) for r in ("0", "0.15", "0.150", "0.4", "0", "0.0")]) == "[0.]+[0.15]*2+[0.4]+[0.]*2"
    assert format_rates([Decimal("0.1000000000000000000000000000000000001")]) == "[0.1000000000000000000000000000000000001]"
    assert format_rates([]) == ""
