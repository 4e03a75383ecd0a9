from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compression.statistics.summaries import (
    ELSEWHERE,
    SUMMARIES,
    compute_table,
    masks_table,
    modules_table,
    render,
    sparsity_of,
    sparsity_table,
    summary,
)
from models.networks import build
from utils.errors import UserError
from utils.measures.profile import count_macs
from utils.spec import ModelSpec

SPEC = ModelSpec("net", 2, imgsz=8, channels=3)


def tiny():
    """A convolution with a zero filter and a zero channel, and a linear layer."""
    conv, head = nn.Conv2d(3, 2, 2, stride=4), nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0] = torch.tensor([[1.0, -1], [2, 0]])
        conv.weight[0, 2] = 0.5
        head.weight.fill_(-2)
    return nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), head)


def test_sparsity_by_hand():
    table = sparsity_table(tiny()).set_index("name")
    assert list(table.index) == ["0.weight", "4.weight", "total"]
    conv = table.loc["0.weight"]
    # 2 * 3 * 4 = 24 weights, of which 3 + 4 are not zero: sums 2 + 2, magnitudes 4 + 2, squares 6 + 1
    assert (conv["shape"], conv["nnz_dense"], conv["nnz"]) == ("2x3x2x2", 24, 7)
    assert conv["sparsity"] == pytest.approx(17 / 24)
    assert conv["filters"] == 1 / 2  # the second filter
    assert conv["channels"] == pytest.approx(1 / 3)  # the second channel
    assert (conv["mean"], conv["abs_mean"]) == (pytest.approx(4 / 24), pytest.approx(6 / 24))
    assert conv["std"] == pytest.approx(math.sqrt(7 / 24 - (4 / 24) ** 2))
    head = table.loc["4.weight"]
    assert (head["shape"], head["nnz"], head["sparsity"], head["std"], head["mean"], head["abs_mean"]) == ("2x8", 16, 0, 0, -2, 2)
    total = table.loc["total"]
    assert (total["nnz_dense"], total["nnz"]) == (40, 23)
    assert total["sparsity"] == pytest.approx(17 / 40)


def test_sparsity_per_weight_and_in_total():
    each, total = sparsity_of(tiny())
    assert each == {"0.weight": pytest.approx(17 / 24), "4.weight": 0}
    assert total == pytest.approx(17 / 40)
    assert sparsity_of(nn.BatchNorm2d(2)) == ({}, 0)  # biases and norms do not count


def test_masks_by_hand():
    parameters = {name: torch.zeros(shape) for name, shape in (("a", (2, 2, 1, 2)), ("b", (4,)), ("c", (3, 2)), ("d", (5, 5)))}
    masks = {
        "c": torch.tensor([[0.0], [1], [0.0]]),  # of filters: it expands to 3 x 2
        "b": torch.tensor([1.0, 0, 2, 1]),  # a mask may scale what stays
        "a": torch.tensor([[[[0.0, 0]], [[1, 0]]], [[[0, 0]], [[1, 1]]]]),
    }
    table = masks_table(masks, parameters)
    assert list(table.columns) == ["name", "shape", "pruned", "of", "sparsity", "filters", "channels"]
    assert table["name"].tolist() == ["a", "b", "c"]  # the order of the parameters
    assert table["shape"].tolist() == ["2x2x1x2", "4", "3x2"]
    assert table["pruned"].tolist() == [5, 1, 4]
    assert table["of"].tolist() == [8, 4, 6]
    assert table["sparsity"].tolist() == [5 / 8, 1 / 4, pytest.approx(2 / 3)]
    assert table["filters"].tolist() == [0, 1 / 4, pytest.approx(2 / 3)]
    assert table["channels"].tolist()[::2] == [1 / 2, 0]
    assert math.isnan(table["channels"][1])
    assert render(table).splitlines()[2] == "b     4             1   4       25.00      25.00"
    with pytest.raises(KeyError, match="masks of no parameter: e"):
        masks_table({"e": torch.ones(1)}, parameters)
    assert len(masks_table({}, parameters)) == 0


def test_cost_by_hand():
    model = tiny().train()
    table = compute_table(model, SPEC).set_index("name")
    assert list(table.index) == ["0", "4", "total"]
    conv, head, total = table.loc["0"], table.loc["4"], table.loc["total"]
    assert (conv["type"], conv["attributes"], conv["input"], conv["output"]) == ("Conv2d", "k=2 s=4 p=0 g=1", "1x3x8x8", "1x2x2x2")
    assert (conv["params"], conv["macs"]) == (24 + 2, 2 * 2 * 24)  # 2 x 2 places
    assert conv["sparsity"] == pytest.approx(17 / 24)
    assert (head["type"], head["attributes"], head["input"], head["output"]) == ("Linear", "", "1x8", "1x2")
    assert (head["params"], head["macs"], head["sparsity"]) == (16, 16, 0)
    assert (total["params"], total["macs"], total["sparsity"]) == (42, 112, pytest.approx(17 / 40))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("module", "macs", "attributes"),
    [
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 64 * 6 * 9, "k=3 s=1 p=1 g=3"),  # each of 6 channels sees one of 3
        (nn.ConvTranspose2d(3, 6, 2, 2, groups=3), 64 * 6 * 4, "k=2 s=2 p=0 g=3"),  # each of 64 places of an input makes 2 x 4
        (nn.Conv2d(3, 2, (1, 3), padding="same"), 64 * 2 * 9, "k=1x3 s=1 p=same g=1"),
        (nn.Linear(8, 5), 3 * 8 * 8 * 5, ""),  # on the last dimension of 1 x 3 x 8 x 8
    ],
)
def test_cost_of_every_kind_of_layer(module, macs, attributes):
    table = compute_table(nn.Sequential(module), SPEC)
    assert table["name"].tolist() == ["0", "total"]
    assert table["macs"].tolist() == [macs, macs]
    assert table["attributes"][0] == attributes


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20-b", 32), ("resnet20", 32), ("resnet50", 64), ("vgg16-cifar", 32), ("yolov5n-cls", 64)]
)
def test_the_cost_of_our_networks_is_all_in_their_layers(name, size):
    spec = ModelSpec(name, 10, imgsz=size)
    model = build(spec)
    table = compute_table(model, spec)
    assert ELSEWHERE not in table["name"].tolist()
    assert table["macs"].tolist()[:-1] == [int(n) for n in table["macs"].tolist()[:-1]]
    assert sum(table["macs"].tolist()[:-1]) == table["macs"].tolist()[-1] == count_macs(model, spec)
    if name == "resnet20-b":
        assert table["macs"].tolist()[-1] == 40_813_184
        assert "40,813,184" in summary("compute", model, spec).splitlines()[-1]


class Attention(nn.Module):
    """A layer that is used twice, one that is not, and a product that is no layer's."""

    def __init__(self):
        super().__init__()
        self.twice, self.unused = nn.Linear(8, 8, bias=False), nn.Linear(7, 7)

    def forward(self, x):
        x = self.twice(self.twice(x[:, 0]))  # [1, 8, 8]
        return x @ x.transpose(1, 2)


def test_what_is_no_layers_has_a_row_and_repeated_calls_add_up():
    table = compute_table(Attention(), SPEC)
    assert table["name"].tolist() == ["twice", "unused", "(no module)", "total"]
    assert table["macs"].tolist() == [2 * 8 * 64, 0, 8 * 8 * 8, 1536]
    assert table["params"].tolist()[:2] == [64, 56]
    lines = render(table).splitlines()
    assert lines[2].split()[:3] == ["unused", "Linear", "56"]  # no shapes
    assert lines[3].split() == ["(no", "module)", "512"]


def test_modules_by_hand():
    table = modules_table(nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)), nn.ReLU()))
    assert table["name"].tolist() == ["0", "0.0", "0.1", "1", "total"]
    assert table["type"].tolist() == ["Sequential", "Conv2d", "BatchNorm2d", "ReLU", "Sequential"]
    assert table["params"].tolist() == [30, 26, 4, 0, 30]


def test_text_is_aligned():
    assert render(modules_table(nn.Sequential(nn.Linear(1000, 2), nn.ReLU()))).splitlines() == [
        "name   type        params",
        "0      Linear       2,002",
        "1      ReLU             0",
        "total  Sequential   2,002",
    ]
    lines = summary("sparsity", tiny(), SPEC).splitlines()
    shares = ["sparsity", "%", "filters", "%", "channels", "%"]
    assert lines[0].split() == ["name", "shape", "nnz_dense", "nnz", *shares, "std", "mean", "abs_mean"]
    assert lines[1].split() == ["0.weight", "2x3x2x2", "24", "7", "70.83", "50.00", "33.33", "0.51370", "0.16667", "0.25000"]
    assert lines[3].split() == ["total", "40", "23", "42.50"]
    assert len({line.index(figure) + len(figure) for line, figure in zip(lines[1:], ("24", "16", "40"), strict=True)}) == 1


def test_every_summary_is_text_and_leaves_the_network():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(SUMMARIES) == ["sparsity", "compute", "model", "modules"]
    assert all(len(summary(kind, model, SPEC).splitlines()) > 3 for kind in SUMMARIES)
    assert summary("model", model, SPEC) == repr(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"unknown summary 'computes'. Did you mean 'compute'\? Valid: sparsity, compute, model, modules"):
        summary("computes", model, SPEC)
    with pytest.raises(UserError, match="does not take images of 16 px"):
        summary("compute", model, ModelSpec("net", 2, imgsz=16))
