from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from compression.schedule.pruners import PRUNERS, Moment, PruningTask
from compression.schedule.pruners.counts import share, without_lowest
from compression.schedule.pruners.gradual import gradual
from utils.errors import UserError
from utils.options import Place, build


def nothing(*_):
    raise AssertionError("an element-wise pruner looks at weights and masks only")


def make(name, **arguments):
    return build(PRUNERS[name], arguments, Place("pruners.mine", {"w": 2, "v": 2, "b": 1}, {}))


def at(epoch, first=0, last=10, end=None, frequency=1):
    return Moment(epoch, first, last, last + 1 if end is None else end, frequency)


def task(weights, moment=None, masks=None):
    tensors = {name: torch.tensor(values) for name, values in weights.items()}
    old = {name: torch.tensor(values) for name, values in (masks or {}).items()}
    return PruningTask(moment or at(0), tensors, old, torch.Generator().manual_seed(0), nothing, nothing, nn.Identity(), nothing)


def masks(pruner, weights, moment=None, old=None):
    decision = pruner.decide(task(weights, moment, old))
    assert decision.weights == {}
    return {name: mask.tolist() for name, mask in decision.masks.items()}


def test_magnitude_keeps_what_is_above_the_threshold():
    pruner = make("MagnitudeParameterPruner", thresholds={"w": 0.5, "*": 2})
    found = masks(pruner, {"w": [[-0.6, 0.5, 0.4, 1.0]], "v": [[2.0, -2.5]], "b": [9.0]})
    assert found == {"w": [[1, 0, 0, 1]], "v": [[0, 1]]}  # 0.5 is not above 0.5; '*' takes no biases
    assert pruner.parameters() == ("w", "v")


def test_sensitivity_keeps_what_is_above_a_share_of_the_first_deviation():
    pruner = make("SensitivityPruner", sensitivities={"w": 0.5})
    # mean 0; (9 + 9 + 1.5625 + 1.5625) / 3 = 7.04: std 2.65, threshold 1.33; the biased std is 2.30 and would give 1.15
    weights = {"w": [[3.0, -3.0, 1.25, -1.25]]}
    assert masks(pruner, weights) == {"w": [[1, 1, 0, 0]]}
    # later the std of [1.4, -1.4, 0, 0] is 1.14, which would give 0.57; 1.33 of the first asking stays
    assert masks(pruner, {"w": [[1.4, -1.3, 0.0, 0.0]]}) == {"w": [[1, 0, 0, 0]]}
    resumed = make("SensitivityPruner", sensitivities={"w": 0.5})
    resumed.load_state_dict(pruner.state_dict())
    assert masks(resumed, {"w": [[1.4, -1.3, 0.0, 0.0]]}) == {"w": [[1, 0, 0, 0]]}


def test_sensitivity_is_what_torch_gives_by_hand():
    weight = torch.randn(100, 50, generator=torch.Generator().manual_seed(3))
    found = make("SensitivityPruner", sensitivities={"w": 0.875}).decide(task({"w": weight.tolist()})).masks["w"]
    assert torch.equal(found.bool(), weight.abs() > 0.875 * weight.std())


def test_a_deviation_needs_two_elements():
    with pytest.raises(UserError, match="b has one element"):
        masks(make("SensitivityPruner", sensitivities={"b": 1}), {"b": [1.0]})


@pytest.mark.parametrize(
    ("level", "count", "expected"),
    [(0.29, 100, 29), (0.3, 10, 3), (0.7, 10, 7), (0.57, 100, 57), (0.58, 50, 29), (1e-05, 100_000, 1), (0.999, 1000, 999), (0.5, 3, 1)],
)
def test_shares_are_exact(level, count, expected):
    assert share(level, count) == expected  # int(0.29 * 100) is 28, int(0.57 * 100) is 56


def test_the_lowest_go_and_ties_go_by_position():
    values = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0])
    keeps = [without_lowest(values, count).int().tolist() for count in range(6)]
    assert keeps == [
        [1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1],
        [1, 0, 1, 0, 1],
        [0, 0, 1, 0, 1],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ]


def test_a_level_is_met_exactly_also_when_all_weights_tie():
    pruner = make("SparsityLevelParameterPruner", levels={"w": 0.3, "v": 0.5})
    found = masks(pruner, {"w": [[1.0, -1.0] * 5], "v": [[-4.0, 1.0], [3.0, -2.0]]})
    assert found == {"w": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]], "v": [[1, 0], [1, 0]]}
    assert pruner.target(at(0)) is None
    pruner.levels = {"w": 0.9}  # as a policy does for its window
    assert masks(pruner, {"w": [[1.0, -1.0] * 5]}) == {"w": [[0] * 9 + [1]]}
    assert pruner.target(at(0)) == 0.9


def test_masked_zeros_go_before_other_zeros_and_a_second_copy_may_come_back():
    pruner = make("SparsityLevelParameterPruner", levels={"w": 0.5})
    assert masks(pruner, {"w": [[0.0, 5.0, 0.0, 0.0]]}, old={"w": [[1.0, 1.0, 0.0, 0.0]]}) == {"w": [[1, 1, 0, 0]]}
    assert masks(pruner, {"w": [[1.0, 2.0, 3.0, 4.0]]}, old={"w": [[1.0, 1.0, 0.0, 0.0]]}) == {"w": [[0, 0, 1, 1]]}


def test_gradual_sparsity_at_each_epoch():
    # 0.5 + (0.1 - 0.5) (1 - x)^3 at x = 0, 1/4, 1/2, 3/4, 1: the cubes are 1, 27/64, 1/8, 1/64, 0
    values = [gradual(0.1, 0.5, at(epoch, 2, 10)) for epoch in (2, 4, 6, 8, 10)]
    assert values == [Fraction(1, 10), Fraction(53, 160), Fraction(9, 20), Fraction(79, 160), Fraction(1, 2)]
    assert [float(value) for value in values] == [0.1, 0.33125, 0.45, 0.49375, 0.5]


def test_gradual_sparsity_ends_at_the_last_asking():
    # epochs 0 to 10 (exclusive) every 4: asked at 0, 4 and 8; the end at 9 would leave 0.8 - 0.8 / 729 at 8
    assert [gradual(0, 0.8, at(epoch, 0, 8, 10, 4)) for epoch in (0, 4, 8)] == [0, Fraction(7, 10), Fraction(4, 5)]
    assert gradual(0.05, 0.8, at(3, 3, 3)) == Fraction(4, 5)  # one asking only
    assert gradual(0.3, 0.3, at(4)) == Fraction(3, 10)
    assert gradual(0.2, 0.8, at(1, 2, 4)) == Fraction(1, 5)
    assert gradual(0.2, 0.8, at(5, 2, 4)) == Fraction(4, 5)


def test_automated_gradual_pruning():
    pruner = make("AutomatedGradualPruner", initial_sparsity=0, final_sparsity=0.8, weights=["w", "v"])
    weights = {"w": [[float(value) for value in range(10, 0, -1)]], "v": [[1.0, 2.0]]}
    moments = [at(epoch, 0, 8, 10, 4) for epoch in (0, 4, 8)]
    kept = [sum(masks(pruner, weights, moment)["w"][0]) for moment in moments]
    assert kept == [10, 3, 2]  # 0.8 - 0.8 / 8 = 0.7 at half the way
    assert masks(pruner, weights, moments[2]) == {"w": [[1, 1] + [0] * 8], "v": [[0, 1]]}  # floor(0.8 * 2) = 1
    assert [pruner.target(moment) for moment in moments] == [0, 0.7, 0.8]
    same = make("AutomatedGradualPruner", initial_sparsity=0.5, final_sparsity=0.5, weights="v")
    assert masks(same, weights, at(3)) == {"v": [[0, 1]]}


def test_baidu_thresholds():
    # theta = 2 * 0.6 * 1 / (2 * 3 + 3 * 2) = 0.1: 0.1 (e + 1) up to epoch 2, then 0.1 * 4 + 0.2 (e - 3 + 1)
    pruner = make("BaiduRNNPruner", q=0.6, ramp_epoch_offset=3, ramp_slope_mult=2, weights=["w"])
    thresholds = [pruner.threshold(at(epoch, 5, 9, 10)) for epoch in range(5, 10)]
    assert thresholds == pytest.approx([0.1, 0.2, 0.3, 0.6, 0.8])
    assert masks(pruner, {"w": [[0.55, -0.65, 0.1]]}, at(8, 5, 9, 10)) == {"w": [[0, 1, 0]]}
    # every second epoch: theta = 0.2; 0.2 (e + 1) / 2, then (0.2 * 4 + 0.4 (e - 3 + 1)) / 2
    assert [pruner.threshold(at(epoch, 0, 4, 5, 2)) for epoch in (0, 2, 4)] == pytest.approx([0.1, 0.3, 0.8])


def test_baidu_takes_the_ramp_as_an_epoch_and_what_old_files_have():
    old = {"q": 0.6, "ramp_slope_mult": 2, "weights": ["w"], "initial_sparsity": 0.05, "final_sparsity": 0.8}
    assert make("BaiduRNNPruner", ramp_epoch=8, **old).threshold(at(8, 5, 9, 10)) == pytest.approx(0.6)
    with pytest.raises(UserError, match="ramp of BaiduRNNPruner is at epoch 12; its policy runs from epoch 5 to 10"):
        make("BaiduRNNPruner", ramp_epoch=12, **old).threshold(at(8, 5, 9, 10))
    for wrong in ({}, {"ramp_epoch": 8, "ramp_epoch_offset": 3}):
        with pytest.raises(UserError, match="give either 'ramp_epoch_offset' or 'ramp_epoch'"):
            make("BaiduRNNPruner", **old, **wrong)


def test_splicing_prunes_keeps_and_brings_back():
    pruner = make("SplicingPruner", sensitivities={"w": 1}, low_thresh_mult=0.5, hi_thresh_mult=1)
    # |w| = 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 4.67, std 2.16: b = 5.16, a = 2.58
    first = [[1.0, -2.0, 3.0, -6.0]]
    assert masks(pruner, {"w": first}) == {"w": [[0, 0, 1, 1]]}
    # later the same thresholds: 5.2 comes back, 3 in between stays out, -5 in between stays in, 2 goes
    later = {"w": [[5.2, 3.0, -5.0, 2.0]]}
    assert masks(pruner, later, at(1), {"w": [[0.0, 0.0, 1.0, 1.0]]}) == {"w": [[1, 0, 1, 0]]}
    resumed = make("SplicingPruner", sensitivities={"w": 1}, low_thresh_mult=0.5, hi_thresh_mult=1)
    resumed.load_state_dict(pruner.state_dict())
    assert masks(resumed, later, at(1), {"w": [[0.0, 0.0, 1.0, 1.0]]}) == {"w": [[1, 0, 1, 0]]}


def test_the_borders_of_splicing():
    old = {"w": [[0.0, 1.0, 0.0]]}
    weights = {"w": [[2.0, -2.0, 2.0]]}  # mean 2, std 0
    at_low = make("SplicingPruner", sensitivities={"w": 1}, low_thresh_mult=1, hi_thresh_mult=2)
    assert masks(at_low, weights, at(0), old) == {"w": [[0, 1, 0]]}  # |w| = a keeps the old mask
    at_high = make("SplicingPruner", sensitivities={"w": 1}, low_thresh_mult=0.5, hi_thresh_mult=1)
    assert masks(at_high, weights, at(0), old) == {"w": [[1, 1, 1]]}  # |w| = b comes back


def test_the_sensitivity_of_splicing_grows():
    pruner = make("SplicingPruner", sensitivities={"w": 1}, low_thresh_mult=1, hi_thresh_mult=1, sensitivity_multiplier=0.25)
    weights = {"w": [[1.0, -2.0, 3.0, -6.0]]}  # mean 3, std 2.16
    assert masks(pruner, weights, at(4, first=4)) == {"w": [[0, 0, 0, 1]]}  # 5.16
    assert masks(pruner, weights, at(5, first=4)) == {"w": [[0, 0, 0, 1]]}  # 3 + 1.25 * 2.16 = 5.70
    assert masks(pruner, weights, at(6, first=4)) == {"w": [[0, 0, 0, 0]]}  # 3 + 1.5 * 2.16 = 6.24


GRADUAL = {"initial_sparsity": 0.5, "final_sparsity": 0.4, "weights": ["w"]}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MagnitudeParameterPruner", {}, "pruners.mine: 'thresholds' is missing"),
        ("MagnitudeParameterPruner", {"thresholds": {"w": -1}}, r"pruners.mine.thresholds.w: is -1; it must be at least 0"),
        ("SensitivityPruner", {"sensitivities": {"u": 1}}, "'u' matches no parameter"),
        ("SparsityLevelParameterPruner", {"levels": {"w": 1}}, "levels.w: is 1; it must be at least 0 and below 1"),
        ("AutomatedGradualPruner", GRADUAL, "final_sparsity 0.4 is below initial_sparsity 0.5"),
        ("AutomatedGradualPruner", {**GRADUAL, "weight": 1}, "unknown argument 'weight'. Did you mean 'weights'"),
        ("BaiduRNNPruner", {"q": 0}, "pruners.mine.q: is 0; it must be above 0"),
        (
            "SplicingPruner",
            {"sensitivities": {"w": 1}, "low_thresh_mult": 2, "hi_thresh_mult": 1},
            "hi_thresh_mult 1 is below low_thresh_mult 2",
        ),
    ],
)
def test_wrong_arguments_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        make(name, **arguments)
