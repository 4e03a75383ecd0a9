from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from compression.statistics import activations
from compression.statistics.activations import ChannelSums, leaves, measure_activations
from utils.errors import UserError
from utils.files.yaml_files import read_yaml


def tiny():
    """Two channels: x and 1 - x of a grey image; ReLU in place; a linear layer on 2 x 2 pixels of both."""
    conv, head = nn.Conv2d(1, 2, 1), nn.Linear(8, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1]).view(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.0, 1]))
        head.weight.fill_(1)
        head.bias.fill_(-3)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), head)


def image(*pixels):
    return torch.tensor(pixels, dtype=torch.float32).view(1, 1, 2, 2)


def batch(*images):
    return torch.cat(images), torch.zeros(len(images))


# Three images in batches of two and one. Channel 0 is x, channel 1 is 1 - x.
BATCHES = [batch(image(0, 1, 2, 3), image(-1, -2, 0, 5)), batch(image(1, 1, 1, 1))]


def row(table, module, channel):
    frame = table.to_frame()
    return frame[(frame["module"] == module) & (frame["channel"] == channel)].iloc[0]


def test_channels_of_a_convolution_by_hand():
    table = measure_activations(tiny(), BATCHES)
    x = row(table, "0", 0)
    # 0 1 2 3 -1 -2 0 5 1 1 1 1: 12 values, two zeros, four not above zero, sum 12, squares 48
    assert (x["count"], x["sparsity"], x["apoz"], x["min"], x["max"]) == (12, 2 / 12, 4 / 12, -2, 5)
    assert x["mean"] == 1
    assert x["std"] == pytest.approx(math.sqrt(48 / 12 - 1))
    assert x["l1"] == 18 / 12
    other = row(table, "0", 1)
    # 1 0 -1 -2 2 3 1 -4 0 0 0 0: five zeros, three below, sum 0, squares 1 + 1 + 4 + 4 + 9 + 1 + 16
    assert (other["sparsity"], other["apoz"], other["min"], other["max"], other["mean"]) == (5 / 12, 8 / 12, -4, 3, 0)
    assert other["std"] == pytest.approx(math.sqrt(36 / 12))
    assert other["l1"] == 14 / 12


def test_an_in_place_relu_is_measured_after_it_and_its_input_before():
    table = measure_activations(tiny(), BATCHES)
    assert row(table, "0", 0)["min"] == -2
    relu = row(table, "1", 0)
    # 0 1 2 3 0 0 0 5 1 1 1 1
    assert (relu["sparsity"], relu["apoz"], relu["min"], relu["max"], relu["mean"]) == (4 / 12, 4 / 12, 0, 5, 15 / 12)
    assert relu["std"] == pytest.approx(math.sqrt(43 / 12 - (15 / 12) ** 2))


def test_modules_as_a_whole_count_every_value_alike():
    table = measure_activations(tiny(), BATCHES)
    frame = table.by_module()
    assert frame["module"].tolist() == ["0", "1", "2", "3"]
    assert frame["channels"].tolist() == [2, 2, 8, 1]
    conv = frame.iloc[0]
    # Both channels: 24 values, sum 12, squares 48 + 36, seven zeros, twelve not above zero.
    assert (conv["min"], conv["max"], conv["mean"], conv["sparsity"], conv["apoz"]) == (-4, 5, 0.5, 7 / 24, 12 / 24)
    assert conv["std"] == pytest.approx(math.sqrt(84 / 24 - 0.25))
    assert conv["l1"] == pytest.approx(32 / 24)
    # The images' extremes are -2..3, -4..5 and 0..1.
    assert (conv["avg_min"], conv["avg_max"]) == (pytest.approx(-2), pytest.approx(3))
    # Sums of both channels after ReLU: 6 + 1 = 7, 5 + 6 = 11, 4 + 0 = 4; minus 3.
    head = frame.iloc[3]
    assert (head["min"], head["max"], head["mean"]) == (1, 8, pytest.approx(13 / 3))
    assert head["std"] == pytest.approx(math.sqrt((16 + 64 + 1) / 3 - (13 / 3) ** 2))


def test_the_split_into_batches_and_chunks_changes_nothing(monkeypatch):
    images = torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = tiny().double()
    whole = measure_activations(model, [(images, None)])
    parts = measure_activations(model, [(images[:3], None), (images[3:6], None), (images[6:], None)])
    monkeypatch.setattr(activations, "CHUNK", 16)  # two images of the convolution's output
    chunks = measure_activations(model, [(images, None)])
    for other in (parts, chunks):
        pd.testing.assert_frame_equal(whole.to_frame(), other.to_frame(), rtol=1e-9)
        pd.testing.assert_frame_equal(whole.by_module(), other.by_module(), rtol=1e-9)
    assert whole.to_frame()["std"][0] == pytest.approx(float(images.std(correction=0)), rel=1e-9)  # channel 0 is the image


def test_a_small_deviation_from_a_large_mean_is_not_lost():
    """A sum of squares would be 1e16 * n, where float64 has no digits left for deviations of 0.5."""
    sums = ChannelSums()
    for _ in range(3):
        sums.add(torch.tensor([[1e8], [1e8 + 1]], dtype=torch.float64), 1)
    assert sums.per_channel()["std"] == [0.5]
    assert sums.whole()["std"] == pytest.approx(0.5, rel=1e-6)


class Wide(nn.Module):
    """One ReLU for two widths, as in a bottleneck."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x), self.relu(torch.cat((x, -x), 1))


def test_a_module_that_is_called_several_times_is_measured_over_all_calls():
    table = measure_activations(Wide(), [(torch.tensor([[1.0, -2], [3, 4]]), None)])
    frame = table.to_frame()
    assert frame["count"].tolist() == [4, 4, 2, 2]
    assert frame["mean"].tolist() == [(1 + 3) * 2 / 4, (0 + 4) * 2 / 4, 0, 1]
    assert frame["sparsity"].tolist() == [0, 0.5, 1, 0.5]
    whole = table.by_module().iloc[0]
    assert (whole["mean"], whole["sparsity"]) == (18 / 12, 5 / 12)
    assert whole["std"] == pytest.approx(math.sqrt((2 * (1 + 9 + 16) + 4) / 12 - 1.5**2))


@pytest.mark.parametrize(
    ("module", "shape", "channels"),
    [
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 5), 4),
        (nn.Conv1d(3, 4, 1), (2, 3, 5), 4),
        (nn.BatchNorm1d(3), (2, 3, 5), 3),
        (nn.Linear(5, 4), (2, 3, 5), 4),
        (nn.Linear(5, 4), (2, 3, 6, 5), 4),
        (nn.LayerNorm(5), (2, 3, 6, 5), 5),
        (nn.GELU(), (2, 3, 5), 5),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 5, 5), 3),
        (nn.Linear(5, 4), (2, 5), 4),
    ],
)
def test_where_the_channels_are(module, shape, channels):
    table = measure_activations(nn.Sequential(module), [(torch.randn(shape), None)])
    assert table.by_module()["channels"].tolist() == [channels]


class Odd(nn.Module):
    """Modules that put out what is not measured: two tensors, integers, nothing."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.empty = nn.Identity()
        self.count = nn.Identity()
        self.conv = parametrizations.weight_norm(nn.Conv2d(1, 2, 1))

    def forward(self, x):
        pooled, _ = self.pool(x)
        self.empty(x[:0])
        self.count(x.long())
        return self.conv(pooled)


def test_only_single_floating_tensors_are_measured_and_parametrisations_are_no_modules():
    model = Odd()
    assert [name for name, _ in leaves(model)] == ["pool", "empty", "count", "conv"]
    assert list(measure_activations(model, [(torch.randn(1, 1, 4, 4), None)]).modules) == ["conv"]


def hooks(model):
    return [module for module in model.modules() if module._forward_hooks]


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = measure_activations(model, [(torch.ones(2, 1, 2, 2), None)])
    assert row(table, "2", 0)["sparsity"] == 0  # eval mode: nothing is dropped
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks(model) == []
    with pytest.raises(RuntimeError):
        measure_activations(model, [(torch.ones(2, 3, 2, 2), None)])
    assert [module.training for module in model] == [True, False, True]
    assert hooks(model) == []


def test_no_images_is_an_error():
    with pytest.raises(UserError, match="no activations to measure"):
        measure_activations(tiny(), [])


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (value, step)


def test_files_and_tensorboard(tmp_path):
    table = measure_activations(tiny(), BATCHES)
    table.write(tmp_path)
    frame = pd.read_csv(tmp_path / "activations.csv", dtype={"module": str})
    columns = ["module", "channel", "count", "sparsity", "apoz", "min", "max", "mean", "std", "l1"]
    assert list(frame.columns) == columns
    pd.testing.assert_frame_equal(frame, table.to_frame(), check_dtype=False)
    content = read_yaml(tmp_path / "activations.yaml", "activations")
    assert list(content) == ["0", "1", "2", "3"]
    assert list(content["0"]) == ["min", "max", "avg_min", "avg_max", "mean", "std", "sparsity", "apoz", "l1"]
    assert (content["0"]["min"], content["0"]["mean"]) == (-4.0, 0.5)
    writer = Writer()
    table.log(writer, 7)
    assert len(writer.scalars) == 4 * 9
    assert writer.scalars["activations/sparsity/0"] == (7 / 24, 7)
