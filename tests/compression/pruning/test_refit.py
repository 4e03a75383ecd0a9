"""The refit of a narrow network's weights: its solution is numpy's, and what can be restored is restored."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.pruning.layer_calls import find_layer_calls
from compression.pruning.least_squares import Moments, layer_samples, output_places, sampled
from compression.pruning.refit import refit_
from compression.pruning.surgery import shrink_
from compression.tracing.channels import trace
from models.networks import ARCHITECTURES
from tests.architectures import architectures
from tests.zoo import ZOO, example, make, random_keep, randomised

LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear over tokens": (nn.Linear(6, 4), (5, 6)),
    "1-D": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 11)),
    "3x3": (nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6)),
    "strided and dilated": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)), (3, 9, 8)),
    "same": (nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), (3, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False), (5, 6, 6)),
    "3-D": (nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 4)),
    "transposed, grouped, dilated": (nn.ConvTranspose2d(4, 6, 3, stride=(3, 1), dilation=(1, 2), groups=2), (4, 4, 5)),
    "transposed, 1-D": (nn.ConvTranspose1d(3, 2, 4, stride=2, padding=2), (3, 6)),
}


def call_of(layer, inputs):
    """Return the function and the arguments that a layer's forward calls."""
    calls = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if any(argument is layer.weight for argument in args):
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        outputs = layer(inputs)
    return *calls[0], outputs


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_samples_times_the_matrix_are_the_layers_outputs(name):
    layer, shape = deepcopy(LAYERS[name][0]), LAYERS[name][1]
    inputs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    func, args, kwargs, outputs = call_of(layer, inputs)
    for most in (5, 10_000):
        samples = layer_samples(func, args, kwargs, most, seed=3)
        ((_, x),) = samples.chunks(0, 4)
        made = (x @ samples.matrix).transpose(0, 1).reshape(4, samples.per_image, -1)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        torch.testing.assert_close(made + bias, sampled(outputs, func, most, 3).double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(samples.restore(samples.matrix).float(), layer.weight)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_solution_is_numpys(name):
    layer, shape = deepcopy(LAYERS[name][0]), LAYERS[name][1]
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(60, *shape, generator=generator)
    func, args, kwargs, outputs = call_of(layer, inputs)
    targets = sampled(outputs + torch.randn(outputs.shape, generator=generator), func, 9, 0).double()
    samples = layer_samples(func, args, kwargs, 9, seed=0)
    moments = Moments.of(samples, targets, 0, 60)
    found = moments.centred().ridge(samples.matrix, 0.0)
    bias = moments.bias(found)
    ((_, x),) = samples.chunks(0, 60)
    y = targets.reshape(x.shape[1], samples.groups, -1).transpose(0, 1)
    for group in range(samples.groups):
        design = np.concatenate([x[group].numpy(), np.ones((x.shape[1], 1))], 1)
        expected, residual, _, _ = np.linalg.lstsq(design, y[group].numpy(), rcond=None)
        np.testing.assert_allclose(found[group].numpy(), expected[:-1], atol=1e-8)
        np.testing.assert_allclose(bias[group, 0].numpy(), expected[-1], atol=1e-8)
        np.testing.assert_allclose(moments.errors(found, bias)[group, 0].numpy(), residual, rtol=1e-8)


def test_a_ridge_pulls_towards_the_weights_as_they_are():
    # one input, one output: x = 1, -1, y = 4, -4; w = old + (8 - 2 old) / (2 + 2 ridge), since the Gram matrix is 2
    samples = layer_samples(F.linear, (torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0]])), {}, 1, 0)
    moments = Moments.of(samples, torch.tensor([[[4.0]], [[-4.0]]]), 0, 2)
    assert [float(moments.ridge(samples.matrix, ridge)) for ridge in (0.0, 1.0, 2.0)] == pytest.approx([4.0, 2.5, 2.0])


def test_positions_are_those_of_the_seed_and_all_where_there_are_few():
    assert output_places(2, (2, 2), 4, 0).tolist() == [[0, 1, 2, 3]] * 2
    drawn = output_places(3, (10, 10), 7, 5)
    assert drawn.shape == (3, 7)
    assert torch.equal(drawn, output_places(3, (10, 10), 7, 5))
    assert not torch.equal(drawn, output_places(3, (10, 10), 7, 6))


class Residual(nn.Module):
    """A stem, a residual branch with norms, a layer behind the sum, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.b_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


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


def test_layers_norms_and_shortcuts_are_found():
    calls = find_layer_calls(Residual().eval(), torch.randn(1, 3, 8, 8))
    layers = {call.weight: call for call in calls.values()}
    assert {weight: call.norm for weight, call in layers.items()} == {
        "stem.weight": "stem_norm",
        "a.weight": "a_norm",
        "b.weight": "b_norm",
        "head.weight": "",
    }
    assert [weight for weight, call in layers.items() if call.addend is not None] == ["b.weight"]


def test_a_weight_that_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.shared(self.shared(x)))

    assert [call.weight for call in find_layer_calls(Twice(), torch.randn(2, 4)).values()] == ["head.weight"]


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


def test_half_the_images_of_a_batch_will_do():
    torch.manual_seed(0)
    model, images = randomised(Residual()).eval(), torch.randn(32, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    keep = {"stem": range(5), "a": range(4)}
    whole, half = (check_refit(model, graph, keep, images[:count]) for count in (32, 16))
    assert (whole.images, half.images) == (32, 16)
