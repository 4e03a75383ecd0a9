"""Layers as problems of least squares: their samples, their solution, and where a forward pass calls them."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.layers import moments as moments_module
from compression.layers.calls import find_layer_calls
from compression.layers.moments import Moments
from compression.layers.samples import layer_samples, output_places, sampled
from tests.zoo import Residual

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


@pytest.mark.parametrize("columns", [7, 8, 11, 12])
def test_a_gram_matrix_in_blocks_is_the_whole_one(columns, monkeypatch):
    monkeypatch.setattr(moments_module, "BLOCK", 4)
    x = torch.randn(2, 9, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(moments_module.gram_matrix(x), x.mT @ x, atol=1e-12)
