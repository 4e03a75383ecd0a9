from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.schedule.pruners import PRUNERS, Moment, PruningTask
from compression.schedule.pruners.reconstruction import refit, sample_inputs
from utils.errors import UserError
from utils.options import Place, build

DIMS = {"w": 4, "v": 4, "fc": 2}
L1 = "L1RankedStructureParameterPruner"
HALF = {"weights": ["w"], "group_type": "Filters", "desired_sparsity": 0.5}
GROWING = {"weights": ["w"], "group_type": "Filters", "initial_sparsity": 0, "final_sparsity": 0.8}


def make(name, dims=DIMS, **arguments):
    return build(PRUNERS[name], arguments, Place("pruners.mine", dims, {}))


def at(epoch, first=0, last=8, end=10, frequency=4):
    return Moment(epoch, first, last, end, frequency)


def filters(*values):
    """A weight of 1x1 filters of one input channel."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def task(moment=None, masks=None, seed=0, scores=None, gradients=None, model=None, images=None, **weights):
    return PruningTask(
        moment or at(0),
        weights,
        masks or {},
        torch.Generator().manual_seed(seed),
        lambda criterion: (scores or {})[criterion],
        lambda names: {name: gradients[name] for name in names if name in gradients},
        model or nn.Identity(),
        lambda: images,
    )


def kept(pruner, structure_dim=0, **arguments):
    """Which structures stay, by weight."""
    masks = pruner.decide(task(**arguments)).masks
    return {name: mask.transpose(0, structure_dim).flatten(1).amax(1).gt(0).int().tolist() for name, mask in masks.items()}


def uniform(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lowest_half_goes(values):
    return (values > values.sort().values[len(values) // 2 - 1]).int().tolist()


# What each ranking makes of a weight, by hand: arguments of the task, the filters that stay at a sparsity of a half.
RANKINGS = {
    L1: ({"w": torch.tensor([[3.0, 3.0], [0.0, -5.0]]).view(2, 2, 1, 1)}, [1, 0]),  # means 3 and 2.5
    "L2RankedStructureParameterPruner": ({"w": torch.tensor([[3.0, 3.0], [0.0, -5.0]]).view(2, 2, 1, 1)}, [0, 1]),  # 4.24 and 5
    "RandomRankedFilterPruner": ({"w": torch.ones(4, 1, 1, 1)}, lowest_half_goes(uniform(4))),
    "BernoulliFilterPruner": ({"w": torch.ones(4, 1, 1, 1)}, (uniform(4) >= 0.5).int().tolist()),
    "GradientRankedFilterPruner": (  # |1 * 1 - 2 * 1| = 1 and |3 * 0.5 - 1 * 1| = 0.5
        {
            "w": torch.tensor([[1.0, 2.0], [3.0, -1.0]]).view(2, 2, 1, 1),
            "gradients": {"w": torch.tensor([[1.0, -1.0], [0.5, 1.0]]).view(2, 2, 1, 1)},
        },
        [1, 0],
    ),
    # each is given scores that other criteria would read the other way round
    "ActivationAPoZRankedFilterPruner": ({"w": filters(1, 2), "scores": {"apoz": {"w": torch.tensor([0.9, 0.1])}}}, [1, 0]),
    "ActivationMeanRankedFilterPruner": ({"w": filters(1, 2), "scores": {"mean_activation": {"w": torch.tensor([7.0, 3.0])}}}, [1, 0]),
    "BatchNormScaleRankedFilterPruner": ({"w": filters(1, 2), "scores": {"bn_scale": {"w": torch.tensor([0.9, 0.2])}}}, [1, 0]),
    "FeatureMapRankFilterPruner": ({"w": filters(1, 2), "scores": {"rank": {"w": torch.tensor([4.5, 4.0])}}}, [1, 0]),
}


@pytest.mark.parametrize("name", RANKINGS)
def test_each_ranking_takes_the_filters_that_it_should(name):
    arguments, expected = RANKINGS[name]
    pruner = make(name, **HALF)
    assert kept(pruner, **arguments) == {"w": expected}
    assert pruner.target(at(0)) == 0.5
    assert pruner.parameters() == ("w",)


@pytest.mark.parametrize("name", RANKINGS)
def test_each_gradual_form_starts_and_ends_exactly(name):
    """10 filters at epochs 0, 4 and 8 of a window that ends at 10: 0, 0.8 - 0.8 / 8 = 0.7, 0.8."""
    scores = torch.arange(10, 0, -1).float()
    found = {"apoz": {"w": scores}, "mean_activation": {"w": scores}, "rank": {"w": scores}, "bn_scale": {"w": scores}}
    pruner = make(f"{name}_AGP", **GROWING)
    arguments = {"w": filters(*scores), "scores": found, "gradients": {"w": torch.ones(10, 1, 1, 1)}}
    stay = [kept(pruner, moment=at(epoch), **arguments)["w"] for epoch in (0, 4, 8)]
    if name == "BernoulliFilterPruner":
        assert stay == [(uniform(10) >= level).int().tolist() for level in (0, 0.7, 0.8)]
    elif name == "RandomRankedFilterPruner":
        assert [sum(row) for row in stay] == [10, 3, 2]
    else:
        assert stay == [[1] * 10, [1] * 3 + [0] * 7, [1] * 2 + [0] * 8]
    assert [pruner.target(at(epoch)) for epoch in (0, 4, 8)] == [0, 0.7, 0.8]


def test_bernoulli_makes_up_for_what_it_drops():
    pruner = make("BernoulliFilterPruner", **HALF)
    mask = pruner.decide(task(w=torch.ones(1000, 1, 1, 1))).masks["w"]
    share = float((mask > 0).float().mean())
    assert 0.45 < share < 0.55
    assert mask.max() == pytest.approx(1 / share)
    assert mask.mean() == pytest.approx(1)
    most = make("BernoulliFilterPruner", **{**HALF, "desired_sparsity": 0.999})
    assert sorted(most.decide(task(w=torch.ones(4, 1, 1, 1))).masks["w"].flatten().tolist()) == [0, 0, 0, 4]  # one stays
    led = make("BernoulliFilterPruner", **{**HALF, "weights": ["w", "v"], "group_dependency": "Leader"})
    masks = led.decide(task(w=torch.ones(50, 1, 1, 1), v=torch.ones(50, 2, 1, 1))).masks
    assert torch.equal(masks["w"][:, 0], masks["v"][:, 1])


def test_the_group_types():
    conv = torch.tensor([[1.0, 5.0, 2.0], [1.0, -5.0, 3.0]]).view(2, 3, 1, 1)
    channels = make(L1, **{**HALF, "group_type": "Channels", "desired_sparsity": 0.34})  # means 1, 5, 2.5; floor(1.02) = 1
    assert kept(channels, 1, w=conv) == {"w": [0, 1, 1]}
    assert kept(make(L1, **{**HALF, "group_type": "3D"}), w=conv) == {"w": [0, 1]}  # means 8 / 3 and 3
    rows = make(L1, weights=["fc"], group_type="Rows", desired_sparsity=0.5)
    matrix = torch.tensor([[1.0, 8.0, 2.0, 0.0], [0.0, 8.0, -3.0, 9.0]])  # inputs: 0.5, 8, 2.5, 4.5: as zero columns
    assert rows.decide(task(fc=matrix)).masks["fc"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    blocks = make(L1, **{**HALF, "group_type": "Blocks"}, kwargs={"block_shape": [2, 1, 1, 2]})
    weight = torch.tensor([[[1.0, 2.0], [0.0, 9.0]], [[1.0, 2.0], [0.0, 1.0]]]).view(2, 2, 1, 2)  # 1.5 and 2.5
    assert blocks.decide(task(w=weight)).masks["w"].flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(("level", "stay"), [(0.29, 71), (0.57, 43), (0.999, 1), (0, 100)])
def test_counts_are_exact_and_ties_go_by_position(level, stay):
    pruner = make(L1, **{**HALF, "desired_sparsity": level})
    assert kept(pruner, w=torch.ones(100, 1, 1, 1)) == {"w": [0] * (100 - stay) + [1] * stay}


def test_one_structure_always_stays():
    assert kept(make(L1, **{**HALF, "desired_sparsity": 0.9}), w=filters(3)) == {"w": [1]}
    assert kept(make(L1, **{**HALF, "desired_sparsity": 0.99}, group_size=2), w=filters(1, 2, 3, 4)) == {"w": [0, 0, 1, 1]}
    all_of_them = PRUNERS[L1](weights=("w",), group_type="Filters", desired_sparsity=1.0)  # what no file may ask for
    assert kept(all_of_them, w=filters(1, 2, 3)) == {"w": [0, 0, 1]}


def test_neighbours_go_together():
    pruner = make(L1, **HALF, group_size=2)
    assert kept(pruner, w=filters(1, 9, 2, 3)) == {"w": [1, 1, 0, 0]}  # means 5 and 2.5
    with pytest.raises(UserError, match=r"w has 3 structures \(Filters\), which is no multiple of group_size 2"):
        kept(pruner, w=filters(1, 2, 3))


def test_structures_of_zeros_go_first():
    scores = {"mean_activation": {"w": torch.tensor([1.0, 2.0, 9.0, 3.0])}}  # a pruned filter still shows its bias
    pruner = make("ActivationMeanRankedFilterPruner", **HALF)
    assert kept(pruner, w=filters(1, 1, 0, 1), scores=scores) == {"w": [0, 1, 0, 1]}
    pairs = make("ActivationMeanRankedFilterPruner", **HALF, group_size=2)
    assert kept(pairs, w=filters(0, 1, 1, 1), scores=scores) == {"w": [0, 0, 1, 1]}  # means 1.5 and 6
    scores["mean_activation"]["w"] = torch.tensor([9.0, 9.0, 1.0, 1.0])
    assert kept(pairs, w=filters(0, 1, 1, 1), scores=scores) == {"w": [1, 1, 0, 0]}  # half a chunk of zeros is none
    assert kept(pairs, w=filters(0, 0, 1, 1), scores=scores) == {"w": [0, 0, 1, 1]}
    both = make(L1, **{**HALF, "weights": ["w", "v"]}, group_dependency="Average")
    assert kept(both, w=filters(0, 4, 4), v=filters(8, 1, 3)) == {"w": [1, 0, 1], "v": [1, 0, 1]}  # 0 + 2, 1.5 + 0.25, 1.5 + 0.75
    chance = make("RandomRankedFilterPruner", **HALF)
    assert all(kept(chance, w=filters(0, 5, 6, 0), seed=seed) == {"w": [0, 1, 1, 0]} for seed in range(5))


def test_noise_is_drawn_from_the_task():
    weight = filters(4, 5, 6, 7)
    normal = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = lowest_half_goes(torch.tensor([4.0, 5, 6, 7]) * (1 + 2 * normal))
    assert expected != [0, 0, 1, 1]
    assert kept(make(L1, **HALF, noise=2), w=weight, seed=1) == {"w": expected}
    assert kept(make(L1, **HALF, noise=0), w=weight, seed=1) == {"w": [0, 0, 1, 1]}


def test_a_leader_decides_anew_each_time():
    pruner = make(L1, **{**HALF, "weights": ["v", "w"]}, group_dependency="Leader")
    assert kept(pruner, w=filters(1, 2), v=filters(4, 3)) == {"v": [1, 0], "w": [1, 0]}
    assert kept(pruner, w=filters(2, 1), v=filters(3, 4)) == {"v": [0, 1], "w": [0, 1]}


def test_the_average_of_the_weights_decides():
    # w: 1, 2, 3, 6 of mean 3; v: 40, 10, 20, 10 of mean 20: 1/3 + 2, 2/3 + 1/2, 1 + 1, 2 + 1/2 -> 1 and 2 go
    weights = {"w": filters(1, 2, 3, 6), "v": filters(40, 10, 20, 10)}
    both = {**HALF, "weights": ["w", "v"]}
    assert kept(make(L1, **both), **weights) == {"w": [0, 0, 1, 1], "v": [1, 0, 1, 0]}
    assert kept(make(L1, **both, group_dependency="Average"), **weights) == {"w": [1, 0, 0, 1], "v": [1, 0, 0, 1]}
    blank = make(L1, **both, group_dependency="Average")
    assert kept(blank, w=filters(0, 0), v=filters(0, 0)) == {"w": [0, 1], "v": [0, 1]}


@pytest.mark.parametrize("dependency", ["Leader", "Average"])
def test_weights_that_depend_on_each_other_have_as_many_structures(dependency):
    pruner = make(L1, **{**HALF, "weights": ["w", "v"]}, group_dependency=dependency)
    with pytest.raises(UserError, match=rf"{dependency}: w has 2 structures \(Filters\), v has 3 \(Filters\)"):
        kept(pruner, w=filters(1, 2), v=filters(1, 2, 3))


def test_the_older_form_of_arguments():
    pruner = make(L1, reg_regims={"v": [0.5, "Channels"], "w": [0.25, "Filters"]})
    masks = pruner.decide(task(w=filters(4, 3, 2, 1), v=torch.tensor([[1.0, 2.0]]).view(1, 2, 1, 1))).masks
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == {"w": [1, 1, 1, 0], "v": [0, 1]}
    assert pruner.target(at(0)) is None
    assert make(L1, reg_regims={"w": [0.25, "3D"]}).target(at(0)) == 0.25


def test_a_drawn_level():
    pruner = make("RandomLevelStructureParameterPruner", weights=["w"], group_type="Filters", sparsity_range=[0.2, 0.8])
    seen = set()
    for seed in range(8):
        count = int((0.2 + 0.6 * float(uniform(1, seed))) * 10)
        assert kept(pruner, w=filters(*range(1, 11)), seed=seed) == {"w": [0] * count + [1] * (10 - count)}
        seen.add(count)
    assert len(seen) > 2
    assert pruner.target(at(0)) is None
    assert make("RandomLevelStructureParameterPruner", weights=["w"], group_type="Rows", sparsity_range=[0, 0]).sparsity_range == (0, 0)


def test_structures_below_a_threshold_go():
    weight = torch.tensor([[0.1, 0.9], [0.5, -0.5], [0.0, 0.4]]).view(3, 2, 1, 1)  # max 0.9, 0.5, 0.4; mean 0.5, 0.5, 0.2
    regimes = {"w": [0.4, "Filters"]}
    assert kept(make("StructureParameterPruner", reg_regims=regimes, threshold_criteria="Max"), w=weight) == {"w": [1, 1, 0]}
    regimes = {"w": [0.5, "Filters"]}
    assert kept(make("StructureParameterPruner", reg_regims=regimes, threshold_criteria="Mean_Abs"), w=weight) == {"w": [0, 0, 0]}
    rows = make("StructureParameterPruner", reg_regims={"fc": [1, "Rows"]}, threshold_criteria="Max")
    assert rows.decide(task(fc=torch.tensor([[0.0, 2.0], [1.0, 0.0]]))).masks["fc"].tolist() == [[1, 1], [0, 0]]  # dim 0 here
    with pytest.raises(UserError, match=r"w: structure 'Filters' .* shape \[2, 2\] has none"):
        kept(make("StructureParameterPruner", reg_regims=regimes, threshold_criteria="Max"), w=torch.ones(2, 2))


# Least-squares refit.


def linear(*weights):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weights), 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([weights]))
    return model


def reconstruction(name="FMReconstructionChannelPruner", weight="1.weight", dims=2, **arguments):
    chosen = {"desired_sparsity": 0.5} if not arguments else {}
    return make(name, {weight: dims}, weights=[weight], group_type="Channels", **chosen, **arguments)


def decide(pruner, model, images, moment=None, seed=0):
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return pruner.decide(task(moment, seed=seed, model=model, images=images, **weights))


def test_the_refit_by_hand():
    # y = 3 x0 + x1 at (1, 2) and (2, 1); without x1 the best is 3 + (1 * 2 + 2 * 1) / (1 + 4) = 3.8
    decision = decide(reconstruction(), linear(3.0, 1.0), torch.tensor([[1.0, 2.0], [2.0, 1.0]]).view(2, 2, 1, 1))
    assert decision.masks["1.weight"].tolist() == [[1, 0]]
    assert decision.weights["1.weight"].tolist() == [pytest.approx([3.8, 0])]


def test_the_refit_sees_so_many_points_of_each_image():
    model = nn.Sequential(nn.Identity(), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
    image = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).view(1, 2, 1, 2)  # the same two points, in one image
    assert decide(reconstruction(dims=4), model, image).weights["1.weight"].flatten().tolist() == pytest.approx([3.8, 0])
    pruner = reconstruction(dims=4, desired_sparsity=0.5, n_points_per_fm=1)
    found = {round(decide(pruner, model, image, seed=seed).weights["1.weight"][0, 0].item(), 4) for seed in range(8)}
    assert found == {5, 3.5}  # one point alone: 3 + 2 / 1 or 3 + 1 / 2


def test_with_fewer_points_than_unknowns_the_weights_move_least():
    # 3 x0 + 2 x1 + x2 at (1, 2, 5): 5 is missing; along (1, 2) that is 5 / (1 + 4) * (1, 2)
    weight = refit(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([True, True, False]), torch.tensor([[[1.0], [2.0], [5.0]]]).double())
    assert weight.tolist() == [pytest.approx([4, 4, 0])]


def test_the_refit_is_better_than_plain_removal():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Dropout()), nn.Conv2d(6, 4, 3, stride=2, padding=1))
    images = torch.randn(6, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    decision = decide(reconstruction(dims=4, desired_sparsity=0.34, n_points_per_fm=16), model, images)
    assert model[0][1].training  # as it was; the fit sees no dropout
    mask, weight = decision.masks["1.weight"], decision.weights["1.weight"]
    assert mask[0, :, 0, 0].sum() == 4  # floor(0.34 * 6) = 2 of the 6 channels go
    assert torch.equal(weight * mask, weight)
    conv = model[1].requires_grad_(False)
    read = model[0][0](images).detach()
    outputs = [F.conv2d(read, w, conv.bias, conv.stride, conv.padding) for w in (conv.weight, conv.weight * mask, weight)]
    plain, fitted = (float((outputs[0] - output).pow(2).mean()) for output in outputs[1:])
    assert fitted < 0.7 * plain
    nudged = [F.conv2d(read, weight + s * 0.02 * mask, conv.bias, conv.stride, conv.padding) for s in (-1, 1)]
    assert all(float((outputs[0] - output).pow(2).mean()) > fitted for output in nudged)  # 16 places are all: the minimum


def test_the_gradual_refit_leaves_weights_of_which_nothing_goes():
    pruner = reconstruction("FMReconstructionChannelPruner_AGP", initial_sparsity=0, final_sparsity=0.5)
    images = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).view(2, 2, 1, 1)
    first, last = (decide(pruner, linear(3.0, 1.0), images, at(epoch)) for epoch in (0, 8))
    assert (first.masks["1.weight"].tolist(), first.weights) == ([[1, 1]], {})
    assert last.weights["1.weight"].tolist() == [pytest.approx([3.8, 0])]


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: nn.Conv2d(3, 2, 3, stride=2, padding=(1, 0), dilation=(1, 2)),
        lambda: nn.Conv2d(3, 2, (2, 3), padding="same", dilation=(2, 1)),
        lambda: nn.Conv2d(3, 2, 3, padding="valid"),
        lambda: nn.Conv2d(3, 2, 3, padding=2, padding_mode="reflect"),
        lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Linear(6, 2),
    ],
)
def test_what_is_sampled_makes_the_outputs(make_layer):
    layer = make_layer()
    images = torch.randn(40, 3, 7, 6, generator=torch.Generator().manual_seed(0))  # more than one batch
    points = sample_inputs(layer, {"x": layer}, images, 1000, torch.Generator().manual_seed(0))["x"]
    outputs = layer(images) if isinstance(layer, nn.Linear) else layer(images).permute(0, 2, 3, 1)
    made = points.flatten(1) @ layer.weight.detach().double().flatten(1).T + layer.bias.detach().double()
    expected = outputs.detach().double().reshape(40, -1, 2)
    assert len(points) == expected.shape[0] * expected.shape[1]
    made = made.view_as(expected)
    assert torch.allclose(made.sort(1).values, expected.sort(1).values, atol=1e-5)
    assert not layer._forward_hooks


def test_layers_that_cannot_be_refitted_are_named():
    images = torch.zeros(1, 4, 2, 2)
    with pytest.raises(UserError, match=r"1.weight is the weight of a Conv2d with groups; Conv2d with groups == 1"):
        decide(reconstruction(dims=4), nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1, groups=2)), images)
    with pytest.raises(UserError, match=r"1.weight is the weight of a Conv1d"):
        decide(reconstruction(dims=3), nn.Sequential(nn.Identity(), nn.Conv1d(4, 4, 1)), images)
    idle = nn.Sequential(nn.Identity(), nn.Linear(4, 1))
    idle.forward = lambda x: x
    with pytest.raises(UserError, match=r"1.weight can't be refitted: its layer does not run"):
        decide(reconstruction(), idle, images)


# What holds for all.

WEIGHTS = {"weights": ["w", "v"], "group_type": "Filters"}
RANKED = {
    name: WEIGHTS | ({"initial_sparsity": 0.1, "final_sparsity": 0.6} if "_AGP" in name else {"desired_sparsity": 0.5}) for name in PRUNERS
}
CASES = {
    "MagnitudeParameterPruner": {"thresholds": {"*": 0.3}},
    "SensitivityPruner": {"sensitivities": {"*": 0.5}},
    "SparsityLevelParameterPruner": {"levels": {"*": 0.3}},
    "AutomatedGradualPruner": {"initial_sparsity": 0.1, "final_sparsity": 0.6, "weights": ["w", "fc"]},
    "BaiduRNNPruner": {"q": 0.5, "ramp_epoch_offset": 3, "ramp_slope_mult": 2, "weights": ["w"]},
    "SplicingPruner": {"sensitivities": {"*": 0.2}, "low_thresh_mult": 0.8, "hi_thresh_mult": 1.1},
    "RandomLevelStructureParameterPruner": {**WEIGHTS, "sparsity_range": [0.2, 0.8]},
    "StructureParameterPruner": {"reg_regims": {"w": [0.6, "Filters"], "fc": [0.7, "Cols"]}, "threshold_criteria": "Mean_Abs"},
    **{name: RANKED[name] for ranking in RANKINGS for name in (ranking, f"{ranking}_AGP")},
    **{
        name: {**RANKED[name], "group_type": "Channels", "weights": ["1.weight", "2.weight"]}
        for name in ("FMReconstructionChannelPruner", "FMReconstructionChannelPruner_AGP")
    },
}


def contract_task(dtype):
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weights = {"w": torch.randn(8, 3, 3, 3, generator=generator), "v": torch.randn(6, 8, 1, 1, generator=generator)}
    weights |= {"fc": torch.randn(5, 6, generator=generator)} | {name: p.detach() for name, p in model.named_parameters()}
    scores = {"w": torch.rand(8, generator=generator), "v": torch.rand(6, generator=generator)}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    found = {"apoz": scores, "mean_activation": scores, "rank": scores, "bn_scale": scores}
    images = torch.randn(4, 3, 6, 6, generator=generator)
    return task(
        at(4), scores=found, gradients={name: weight + 1 for name, weight in weights.items()}, model=model, images=images, **weights
    )


def test_every_class_is_held_to_the_contract():
    assert set(CASES) == set(PRUNERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_contract_of_pruners(name, dtype):
    dims = {"w": 4, "v": 4, "fc": 2, "1.weight": 4, "1.bias": 1, "2.weight": 4}
    asked = contract_task(dtype)
    before = {key: weight.clone() for key, weight in asked.weights.items()}
    pruner = make(name, dims, **CASES[name])
    decision = pruner.decide(asked)
    assert tuple(decision.masks) == pruner.parameters()
    for parameter, mask in decision.masks.items():
        weight = asked.weights[parameter]
        assert (mask.shape, mask.dtype, mask.requires_grad) == (weight.shape, weight.dtype, False)
        values = sorted(set(mask.flatten().tolist()))
        assert len(values) == 2
        assert values[0] == 0
        assert values[1] == 1 or "Bernoulli" in name
        assert mask.is_contiguous()
    for parameter, weight in decision.weights.items():
        assert (weight.shape, weight.dtype) == (asked.weights[parameter].shape, torch.float32)  # that of the layer
        assert not weight[decision.masks[parameter] == 0].any()
    assert all(torch.equal(asked.weights[key], weight) for key, weight in before.items())  # it changes nothing
    again, resumed = pruner.decide(contract_task(dtype)), make(name, dims, **CASES[name])
    resumed.load_state_dict(pruner.state_dict())
    for other in (again, resumed.decide(contract_task(dtype))):
        assert all(torch.equal(decision.masks[key], other.masks[key]) for key in decision.masks)
        assert all(torch.equal(decision.weights[key], other.weights[key]) for key in decision.weights)


TWICE = {"reg_regims": {"w": [0.5, "3D"]}, "desired_sparsity": 0.5}
UNEQUAL = {"reg_regims": {"w": [0.5, "3D"], "v": [0.4, "3D"]}, "group_dependency": "Leader"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (L1, {}, "pruners.mine: 'desired_sparsity' is missing"),
        (L1, {"desired_sparsity": 0.5}, "pruners.mine: 'weights' is missing"),
        (L1, {"desired_sparsity": 0.5, "weights": ["w"]}, "pruners.mine: 'group_type' is missing"),
        (L1, {**HALF, "group_type": "Filter"}, "unknown group_type 'Filter'. Did you mean 'Filters'. Valid: Filters, 3D, Channels"),
        (L1, {**HALF, "group_type": "4D"}, "unknown group_type '4D'"),
        (L1, {**HALF, "desired_sparsity": 1}, "desired_sparsity: is 1; it must be at least 0 and below 1"),
        (L1, {**HALF, "group_type": "Blocks"}, "group_type Blocks needs kwargs: {block_shape"),
        (L1, {**HALF, "kwargs": {"block_shape": [1, 1, 1, 1]}}, "block_shape is for group_type Blocks"),
        (L1, {**HALF, "kwargs": {"block": 1}}, "kwargs: takes block_shape and nothing else"),
        (L1, {**HALF, "kwargs": {"block_shape": [1, 1]}}, "block_shape: must be a list of 4"),
        (L1, {**HALF, "rounding_fn": "eval"}, "rounding_fn: is 'eval'"),
        (L1, {**HALF, "group_dependency": "leaders"}, "group_dependency: is 'leaders'. Did you mean 'Leader'"),
        (L1, {"reg_regims": {"w": [0.5, "Filter"]}}, r"reg_regims.w\[1\]: is 'Filter'"),
        (L1, {"reg_regims": {"w": 0.5}}, r"reg_regims.w: must be \[number, structure\]"),
        (L1, TWICE, "give either 'reg_regims' or 'weights'"),
        (L1, UNEQUAL, "all weights in reg_regims must have the same sparsity"),
        (f"{L1}_AGP", {**GROWING, "initial_sparsity": 0.9}, "final_sparsity 0.8 is below initial_sparsity 0.9"),
        (f"{L1}_AGP", {**HALF}, "unknown argument 'desired_sparsity'"),
        ("RandomRankedFilterPruner", {**HALF, "group_type": "Channels"}, "unknown group_type 'Channels'.* Valid: Filters, 3D"),
        ("BernoulliFilterPruner", {**HALF, "group_dependency": "Average"}, "dropped independently"),
        ("FMReconstructionChannelPruner", HALF, "unknown group_type 'Filters'.* Valid: Channels"),
        ("RandomLevelStructureParameterPruner", {**WEIGHTS, "sparsity_range": [0.5, 0.2]}, r"\[low, high\], not \[0.5, 0.2\]"),
        ("StructureParameterPruner", {"reg_regims": {"w": [1, "Blocks"]}, "threshold_criteria": "Max"}, "is 'Blocks'"),
        ("StructureParameterPruner", {"reg_regims": {"w": [1, "3D"]}, "threshold_criteria": "Min"}, "threshold_criteria: is 'Min'"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        make(name, **arguments)


def test_weights_without_such_structures_and_without_scores_are_named():
    pruner = make(L1, **HALF)
    with pytest.raises(UserError, match=r"w \(group_type Filters\): structure 'Filters' is .* \[2, 2\] has none"):
        pruner.check({"w": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"w \(group_type Rows\): .* \[2, 2, 1, 1\] has none"):
        make(L1, **{**HALF, "group_type": "Rows"}).check({"w": torch.zeros(2, 2, 1, 1)})
    with pytest.raises(UserError, match="there is no score 'rank' for w; there is one for v"):
        kept(make("FeatureMapRankFilterPruner", **HALF), w=filters(1, 2), scores={"rank": {"v": torch.ones(2)}})
    with pytest.raises(UserError, match="there is no gradient for w; there is one for no weight"):
        kept(make("GradientRankedFilterPruner", **HALF), w=filters(1, 2), gradients={})
