from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compression.schedule.loop import ScheduledLoop
from compression.schedule.regularizers import REGULARIZERS
from utils.errors import UserError
from utils.options import Place, build

# Two filters of two channels, kernels of two elements.
CONV = torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[5.0, -12.0]]]])
MATRIX = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
DIMS = {"conv.weight": 4, "fc.weight": 2, "norm.weight": 1}


def make(class_name, reg_regims, **options):
    return build(REGULARIZERS[class_name], {"reg_regims": reg_regims, **options}, Place("regularizers.it", DIMS, {}))


def loss(class_name, reg_regims, **weights):
    named = {name.replace("_", "."): weight.clone().requires_grad_() for name, weight in weights.items()}
    found = make(class_name, reg_regims).loss(named)
    found.backward()
    return found.item(), {name: weight.grad for name, weight in named.items()}


def mask(class_name, reg_regims, criterion, **weights):
    named = {name.replace("_", "."): weight for name, weight in weights.items()}
    found = make(class_name, reg_regims, threshold_criteria=criterion).masks(named)
    assert set(found) <= set(named)
    for name, value in found.items():
        assert value.shape == named[name].shape
        assert value.dtype == named[name].dtype
    return {name: value.flatten().tolist() for name, value in found.items()}


def test_l1_by_hand():
    # 0.1 * (3 + 4 + 5 + 12) + 0.5 * (1 + 2)
    value, gradients = loss(
        "L1Regularizer", {"conv.weight": 0.1, "norm.weight": 0.5}, conv_weight=CONV, norm_weight=torch.tensor([1.0, -2.0])
    )
    assert value == pytest.approx(2.4 + 1.5)
    assert gradients["norm.weight"].tolist() == [0.5, -0.5]
    assert gradients["conv.weight"].flatten().tolist() == pytest.approx([0.1, 0.1, 0, 0, 0, 0, 0.1, -0.1])


def test_l1_on_the_scales_of_batch_norms_is_network_slimming():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    parameters = dict(model.named_parameters())
    place = Place("", {name: value.ndim for name, value in parameters.items()}, {})
    slimming = build(REGULARIZERS["L1Regularizer"], {"reg_regims": {"module.1.weight": 1e-2}}, place)
    assert slimming.parameters() == ("1.weight",)
    slimming.loss(parameters).backward()
    assert model[1].weight.grad.tolist() == pytest.approx([0.01, 0.01])  # fresh scales are 1
    assert model[0].weight.grad is None


def test_l1_threshold_is_element_wise_and_lambda_itself_goes():
    weight = torch.tensor([0.5, -0.5, 0.6, -0.7, 0.0])
    for criterion in ("Max", "Mean_Abs"):
        assert mask("L1Regularizer", {"norm.weight": 0.5}, criterion, norm_weight=weight) == {"norm.weight": [0, 0, 1, 1, 0]}
    assert mask("L1Regularizer", {"norm.weight": 0.5}, None, norm_weight=weight) == {}


@pytest.mark.parametrize(
    ("group", "norms"),
    [
        ("2D", [5, 0, 0, 13]),
        ("3D", [5, 13]),
        ("Filters", [5, 13]),
        ("Channels", [5, 13]),
        ("4D", [math.sqrt(25 + 169)]),
        ("Channels+4D", [5, 13, math.sqrt(194)]),
        ("4D+Channels", [5, 13, math.sqrt(194)]),
    ],
)
def test_group_lasso_of_a_convolution(group, norms):
    value, gradients = loss("GroupLassoRegularizer", {"conv.weight": [0.1, group]}, conv_weight=CONV)
    assert value == pytest.approx(0.1 * sum(norms))
    assert torch.isfinite(gradients["conv.weight"]).all()


@pytest.mark.parametrize(("group", "norms"), [("Rows", [3, 4]), ("Cols", [5, 0]), ("Rows+Cols", [7, 5]), ("Cols+Rows", [5, 7])])
def test_group_lasso_of_a_matrix(group, norms):
    assert loss("GroupLassoRegularizer", {"fc.weight": ["2e-1", group]}, fc_weight=MATRIX)[0] == pytest.approx(0.2 * sum(norms))


def test_group_lasso_of_several_parameters_and_its_gradient():
    regims = {"conv.weight": [0.1, "2D"], "fc.weight": [2, "Cols"]}
    value, gradients = loss("GroupLassoRegularizer", regims, conv_weight=CONV, fc_weight=MATRIX)
    assert value == pytest.approx(0.1 * 18 + 2 * 5)
    # lambda w / ||w_g||: 0.1 * (3, 4) / 5, zeros where the structure is zero, 0.1 * (5, -12) / 13
    assert gradients["conv.weight"].flatten().tolist() == pytest.approx([0.06, 0.08, 0, 0, 0, 0, 0.5 / 13, -1.2 / 13])
    assert gradients["fc.weight"].tolist() == [pytest.approx([1.2, 0]), pytest.approx([1.6, 0])]


def test_a_weight_of_zeros_has_no_gradient_and_no_nan():
    for name in ("GroupLassoRegularizer", "GroupVarianceRegularizer"):
        _, gradients = loss(name, {"conv.weight": [0.1, "Filters"]}, conv_weight=torch.zeros(2, 2, 1, 2))
        assert gradients["conv.weight"].flatten().tolist() == [0] * 8


def test_group_thresholds():
    weight = torch.tensor([[[[0.1, 0.5]], [[0.0, 0.0]]], [[[0.2, 0.3]], [[0.3, -0.3]]]])
    # largest |w| of the filters 0.5 and 0.3; means 0.15 and 0.275
    regims = {"conv.weight": [0.25, "3D"]}
    assert mask("GroupLassoRegularizer", {"conv.weight": [0.4, "3D"]}, "Max", conv_weight=weight)["conv.weight"] == [1] * 4 + [0] * 4
    assert mask("GroupLassoRegularizer", regims, "Mean_Abs", conv_weight=weight)["conv.weight"] == [0] * 4 + [1] * 4
    assert mask("GroupLassoRegularizer", regims, None, conv_weight=weight) == {}
    # largest |w| of the channels 0.5 and 0.3
    assert mask("GroupLassoRegularizer", {"conv.weight": [0.3, "Channels"]}, "Max", conv_weight=weight)["conv.weight"] == [1, 1, 0, 0] * 2
    # means of the kernels 0.3, 0, 0.25, 0.3; of a threshold that is met exactly the structure goes
    assert mask("GroupVarianceRegularizer", {"conv.weight": [0.25, "2D"]}, "Mean_Abs", conv_weight=weight)["conv.weight"] == [
        *(1, 1, 0, 0),
        *(0, 0, 1, 1),
    ]


def test_of_a_combined_group_a_weight_stays_when_all_its_structures_do():
    weight = torch.tensor([[0.9, 0.1], [0.1, 0.1]])  # the largest: rows 0.9, 0.1; columns 0.9, 0.1
    for group in ("Rows+Cols", "Cols+Rows"):
        assert mask("GroupLassoRegularizer", {"fc.weight": [0.5, group]}, "Max", fc_weight=weight)["fc.weight"] == [1, 0, 0, 0]
    conv = weight.view(2, 2, 1, 1)
    # the channels' means 0.5 and 0.1, that of all 0.3
    assert mask("GroupLassoRegularizer", {"conv.weight": [0.2, "Channels+4D"]}, "Mean_Abs", conv_weight=conv)["conv.weight"] == [1, 0, 1, 0]
    assert mask("GroupLassoRegularizer", {"conv.weight": [0.4, "4D+Channels"]}, "Mean_Abs", conv_weight=conv)["conv.weight"] == [0] * 4


def test_group_variance_by_hand():
    # the filters' norms 5 and 13: mean 9, variance (16 + 16) / (2 - 1) = 32
    value, gradients = loss("GroupVarianceRegularizer", {"conv.weight": [0.8, "3D"]}, conv_weight=CONV)
    assert value == pytest.approx(0.8 / 32)
    # d/dn_g = -0.8 / 32^2 * 2 (n_g - 9) / 1: 0.00625 and -0.00625; times w / ||w_g||
    assert gradients["conv.weight"].flatten().tolist() == pytest.approx([0.00375, 0.005, 0, 0, 0, 0, -0.03125 / 13, 0.075 / 13])
    # a step against the gradient makes the small filter smaller and the large one larger
    assert gradients["conv.weight"].flatten()[0] > 0 > gradients["conv.weight"].flatten()[6]


def test_group_variance_of_a_combined_group_and_of_equal_norms():
    # rows 3, 4: variance 0.5; columns 5, 0: variance 12.5
    assert loss("GroupVarianceRegularizer", {"fc.weight": [1, "Rows+Cols"]}, fc_weight=MATRIX)[0] == pytest.approx(2 + 0.08)
    value, gradients = loss("GroupVarianceRegularizer", {"fc.weight": [1, "Rows"]}, fc_weight=torch.eye(2))
    assert value == pytest.approx(1e8)  # 1 / (0 + 1e-8)
    assert gradients["fc.weight"].tolist() == [[0, 0], [0, 0]]


def test_one_structure_has_no_variance():
    regularizer = make("GroupVarianceRegularizer", {"conv.weight": [0.1, "Filters"]})
    with pytest.raises(UserError, match=r"conv\.weight has one structure"):
        regularizer.loss({"conv.weight": torch.ones(1, 2, 3, 3)})
    for group in ("4D", "Channels+4D"):
        with pytest.raises(UserError, match=r"conv\.weight\[1\]: is"):
            make("GroupVarianceRegularizer", {"conv.weight": [0.1, group]})


def test_the_default_stands_for_all_weights():
    assert make("L1Regularizer", {"*": 0.1, "fc.weight": 0.2}).reg_regims == {"conv.weight": 0.1, "fc.weight": 0.2}
    assert make("GroupLassoRegularizer", {"*": [0.1, "Channels"]}).parameters() == ("conv.weight", "fc.weight")


@pytest.mark.parametrize(
    ("class_name", "reg_regims", "message"),
    [
        ("L1Regularizer", {"conv.weight": -0.1}, "at least 0"),
        ("L1Regularizer", {"conv.weight": [0.1, "3D"]}, "must be a number"),
        ("L1Regularizer", {"conv.wieght": 0.1}, "Did you mean 'conv.weight'"),
        ("L1Regularizer", {}, "must name parameters"),
        ("L1Regularizer", 0.1, "must be a mapping"),
        ("GroupLassoRegularizer", {"conv.weight": 0.1}, r"must be \[lambda, group\], not 0.1"),
        ("GroupLassoRegularizer", {"conv.weight": [0.1]}, r"must be \[lambda, group\]"),
        ("GroupLassoRegularizer", {"conv.weight": ["3D", 0.1]}, "must be a number, not '3D'"),
        ("GroupLassoRegularizer", {"conv.weight": [0.1, "Filter"]}, "Did you mean 'Filters'"),
        ("GroupLassoRegularizer", {"conv.weight": [0.1, None]}, "Valid: Filters"),
        ("GroupLassoRegularizer", {"conv.weight": [0.1, "Blocks"]}, "Valid: Filters"),
        ("GroupLassoRegularizer", {"conv.weight": [0.1, "Rows"]}, r"conv\.weight has 4 dimension"),
        ("GroupLassoRegularizer", {"fc.weight": [0.1, "3D"]}, r"fc\.weight has 2 dimension"),
        ("GroupLassoRegularizer", {"norm.weight": [0.1, "Channels+4D"]}, r"norm\.weight has 1 dimension"),
    ],
)
def test_what_does_not_fit_names_its_place(class_name, reg_regims, message):
    with pytest.raises(UserError, match=message) as caught:
        make(class_name, reg_regims)
    assert str(caught.value).startswith("regularizers.it.reg_regims")


def test_unknown_criteria_and_arguments():
    with pytest.raises(UserError, match="Did you mean 'Mean_Abs'"):
        make("L1Regularizer", {"conv.weight": 0.1}, threshold_criteria="MeanAbs")
    with pytest.raises(UserError, match="Did you mean 'reg_regims'"):
        build(REGULARIZERS["GroupLassoRegularizer"], {"reg_regimes": {}}, Place("regularizers.it", DIMS, {}))
    with pytest.raises(UserError, match="'reg_regims' is missing"):
        build(REGULARIZERS["GroupVarianceRegularizer"], {}, Place("regularizers.it", DIMS, {}))


def test_it_says_how_far_the_structures_are_from_zero():
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0, 2.0, 5.0]).view(4, 1, 1, 1))
        model[1].weight.fill_(1.0)
    lasso = {"class": "GroupLassoRegularizer", "reg_regims": {"0.weight": [0.1, "3D"], "1.weight": [0.1, "3D"]}}
    policies = [{"regularizer": {"instance_name": "lasso"}, "starting_epoch": 0, "ending_epoch": 2}]
    lines = []
    loop = ScheduledLoop(
        {"regularizers": {"lasso": lasso}, "policies": policies}, model, torch.optim.SGD(model.parameters(), 0.1), 5, 1, report=lines.append
    )
    for epoch in range(5):
        loop.on_epoch_begin(epoch)
        loop.on_epoch_end()
    # norms 0, 1, 2, 5 with a mean of 2: one of six filters is zero, and the weakest of the others has half of the mean
    assert [line for line in lines if "zero" in line] == [
        "lasso: 1 of 6 structures are zero; the weakest of the others, in 0.weight, has 0.5 of the mean norm there"
    ]
