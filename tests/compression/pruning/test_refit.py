"""The refit of a narrow network's weights: its solution is numpy's, and what can be restored is restored."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from compression.pruning.refit import refit_
from compression.pruning.surgery import shrink_
from compression.tracing.channels import trace
from models.networks import ARCHITECTURES
from tests.architectures import architectures
from tests.zoo import ZOO, Residual, example, make, random_keep, randomised


class Concatenated(nn.Module):
    """Two branches, one grouped, side by side."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.mix, self.head = nn.Conv2d(14, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.mix(x).relu().mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between pointwise ones."""

    def __init__(self):
        super().__init__()
        self.grow, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm, self.shrink, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(self.grow(x).relu())).relu()
        return self.head(self.shrink(x).relu().mean((2, 3)))


def copy_channel_(layers, source, target, factor=1.0):
    """Make channel ``target`` of every layer and norm the ``factor`` of channel ``source``."""
    for layer in layers:
        state = [layer.weight, layer.bias, getattr(layer, "running_mean", None)]
        for tensor in state:
            if tensor is not None:
                tensor.data[target] = tensor.data[source] * factor
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data[target] = layer.weight.data[source]
            layer.running_var[target] = layer.running_var[source] * factor**2
            layer.bias.data[target] = layer.bias.data[source]


CASES = {
    # the last channels are copies of the first, so they can be made from those that stay
    "residual": (Residual, {"stem": 8}, lambda n: copy_channel_([n.stem, n.stem_norm, n.b, n.b_norm], slice(0, 3), slice(5, 8)), 5),
    "inside a residual branch": (Residual, {"a": 6}, lambda n: copy_channel_([n.a, n.a_norm], slice(0, 2), slice(4, 6), 2.0), 4),
    "concatenated": (Concatenated, {"left": 8}, lambda n: copy_channel_([n.left], slice(0, 3), slice(5, 8), 3.0), 5),
    "depthwise": (Depthwise, {"grow": 8}, lambda n: copy_channel_([n.grow, n.depthwise, n.norm], slice(0, 3), slice(5, 8)), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_that_others_can_make_are_restored(name):
    build, groups, copy_, kept = CASES[name]
    torch.manual_seed(0)
    model = randomised(build()).eval()
    copy_(model)
    images = torch.randn(64, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    keep = {group: range(kept) for group in groups}
    narrow = deepcopy(model)
    shrink_(narrow, graph, keep, images[:4])
    with torch.no_grad():
        before = (narrow(images) - model(images)).abs().max() / model(images).abs().max()
        refit = refit_(narrow, model, graph, keep, images.split(24))
        after = (narrow(images) - model(images)).abs().max() / model(images).abs().max()
    assert before > 1e-2
    assert after < 1e-5, refit


def test_a_cut_of_nothing_changes_nothing():
    torch.manual_seed(0)
    model = randomised(Residual()).eval()
    images = torch.randn(32, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    narrow = deepcopy(model)
    refit = refit_(narrow, model, graph, {}, images.split(8))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(narrow.state_dict().values(), model.state_dict().values(), strict=True))
    assert all(layer.ridge is None for layer in refit.layers)


def test_no_layers_held_out_error_grows_and_what_was_asked_is_left_alone():
    torch.manual_seed(1)
    model = randomised(Residual()).eval()
    dense = deepcopy(model.state_dict())
    images = torch.randn(48, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    keep = {"stem": (0, 1, 2, 5), "a": (1, 2, 4)}
    narrow = deepcopy(model)
    shrink_(narrow, graph, keep, images[:4])
    narrow.train()
    refit = refit_(narrow, model, graph, keep, images.split(48), seed=2)
    assert [layer.weight for layer in refit.layers] == ["stem.weight", "a.weight", "b.weight", "head.weight"]
    assert all(layer.after <= layer.before for layer in refit.layers)
    assert refit.layers[-1].after < refit.layers[-1].before
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert narrow.training
    assert not model.training


def check_refit(model, graph, keep, images):
    """Refit a cut network; no layer's held-out error may grow, and shapes, dense network and cut stay."""
    narrow, dense = deepcopy(model), deepcopy(model.state_dict())
    shrink_(narrow, graph, keep, images[:2])
    shapes = {name: tensor.shape for name, tensor in narrow.state_dict().items()}
    refit = refit_(narrow, model, graph, keep, images.split(3))
    assert refit.images == len(images)
    assert all(layer.after <= layer.before for layer in refit.layers)
    assert {name: tensor.shape for name, tensor in narrow.state_dict().items()} == shapes
    assert all(torch.isfinite(tensor).all() for tensor in narrow.state_dict().values() if tensor.is_floating_point())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    return refit


@pytest.mark.parametrize("name", ZOO)
def test_any_network_that_can_be_cut_can_be_refitted(name):
    model, images = make(name).eval(), example(name, 8)
    graph = trace(deepcopy(model), images[:1])
    check_refit(model, graph, random_keep(graph, 0.4, torch.Generator().manual_seed(0)), images)


@pytest.mark.parametrize("name", architectures(quick=("yolov5n-cls", "resnet20", "resnet20-b")))
def test_every_architecture_can_be_refitted(name):
    torch.manual_seed(0)
    model = randomised(ARCHITECTURES[name](10, 3)).eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    graph = trace(deepcopy(model), images[:1])
    refit = check_refit(model, graph, random_keep(graph, 0.4, torch.Generator().manual_seed(0)), images)
    weights = [name for name, tensor in model.named_parameters() if tensor.ndim > 1]
    assert sorted(layer.weight for layer in refit.layers) == sorted(weights)


def test_a_layer_too_large_for_its_system_keeps_its_weights(monkeypatch):
    monkeypatch.setattr("compression.pruning.refit.LARGEST_SYSTEM", 5 * 9)  # inputs of an output, after the cut
    torch.manual_seed(0)
    model, images = randomised(Residual()).eval(), torch.randn(16, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    refit = check_refit(model, graph, {"stem": range(6), "a": range(4)}, images)
    assert [layer.weight for layer in refit.layers] == ["stem.weight", "b.weight", "head.weight"]  # a reads 6 channels


def test_half_the_images_of_a_batch_will_do():
    torch.manual_seed(0)
    model, images = randomised(Residual()).eval(), torch.randn(32, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    keep = {"stem": range(5), "a": range(4)}
    whole, half = (check_refit(model, graph, keep, images[:count]) for count in (32, 16))
    assert (whole.images, half.images) == (32, 16)
