"""What the readers of a channel lose with it: the residual of numpy's least squares."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from compression.layers import readers
from compression.layers.readers import measure_readers, readers_of
from compression.layers.samples import layer_samples
from compression.tracing.channels import trace
from tests.zoo import ZOO, example, make


class Chain(nn.Module):
    """Channels of ``made`` that ``reader`` reads, flattened if it is linear."""

    def __init__(self, made, reader):
        super().__init__()
        self.made, self.reader, self.head = made, reader, nn.Linear(4, 3)

    def forward(self, x):
        x = self.made(x).relu()
        x = self.reader(x.flatten(1) if isinstance(self.reader, nn.Linear) else x)
        return self.head(x.relu() if x.ndim == 2 else x.relu().mean((2, 3)))


NETWORKS = {
    "3x3": lambda: Chain(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, padding=1)),
    "1x1": lambda: Chain(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False)),
    "flattened": lambda: Chain(nn.Conv2d(3, 5, 7), nn.Linear(20, 4)),
    "transposed": lambda: Chain(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 4, 2, stride=2)),
}


def residuals(model, images, columns):
    """Return numpy's squared error of the reader's outputs without some inputs, and the outputs' variance, per sample."""
    calls = []
    module = model.reader
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
    model(images)
    functions = {nn.Conv2d: torch.conv2d, nn.ConvTranspose2d: torch.conv_transpose2d, nn.Linear: nn.functional.linear}
    names = ("stride", "padding") if not isinstance(module, nn.Linear) else ()
    samples = layer_samples(functions[type(module)], (calls[0], module.weight.detach()), {n: getattr(module, n) for n in names}, 10**6, 0)
    ((_, x),) = samples.chunks(0, len(images))
    x = x[0].numpy()
    y = x @ samples.matrix[0].numpy()
    left = np.delete(x, columns, 1)
    design = np.concatenate([left, np.ones((len(x), 1))], 1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    return ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), y.mean(0) - left.mean(0) @ solution[:-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_those_of_the_best_refit(name, monkeypatch):
    monkeypatch.setattr(readers, "DAMPING", 1e-12)
    monkeypatch.setattr(readers, "positions_for", lambda images: 1000)  # all of them
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = torch.randn(24, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    moments = measure_readers(model, graph, images.split(10))
    assert moments["reader.weight"].count == residual_count(name)
    (reader,) = readers_of(graph.group("made"), graph.shapes, moments)
    taps = reader.moments.matrix.shape[1] // 5
    for unit, loss in enumerate(reader.losses(range(5)).tolist()):
        expected, _ = residuals(model, images, range(unit * taps, (unit + 1) * taps))
        assert loss == pytest.approx(expected, rel=1e-4)
    # two go, one after the other: the sum of what they cost is what both cost
    first, second = reader.remove_([1]), float(reader.losses([3])[0])
    assert reader.remove_([3]) == pytest.approx(second)
    gone = [*range(taps, 2 * taps), *range(3 * taps, 4 * taps)]
    expected, shift = residuals(model, images, gone)
    assert first + second == pytest.approx(expected, rel=1e-4)
    weight, lost = reader.refitted()
    assert weight.shape == model.reader.weight.shape
    assert not weight.movedim(0 if name == "transposed" else 1, 0).reshape(5, -1)[[1, 3]].any()
    np.testing.assert_allclose(lost.numpy(), shift, atol=1e-6)


def test_a_grouped_transposed_reader_is_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6 * 49, 2)).eval()
    images = torch.randn(6, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    moments = measure_readers(model, graph, [images])
    read = {group.name: [reader.name for reader in readers_of(group, graph.shapes, moments)] for group in graph.prunable}
    assert "2.weight" not in read.get("0", [])
    for group in graph.prunable:
        for reader in readers_of(group, graph.shapes, moments):
            assert sum(len(columns) for columns in reader.columns) == reader.moments.matrix.shape[1]


def residual_count(name):
    return {"3x3": 24 * 36, "1x1": 24 * 36, "flattened": 24, "transposed": 24 * 144}[name]


def test_together_or_apart_the_same_is_left():
    torch.manual_seed(0)
    model, images = NETWORKS["3x3"]().eval(), torch.randn(24, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    moments = measure_readers(model, graph, [images])
    (one,), (other,) = (readers_of(graph.group("made"), graph.shapes, moments) for _ in range(2))
    together = one.remove_([0, 4])
    assert together == pytest.approx(other.remove_([4]) + other.remove_([0]))
    torch.testing.assert_close(one.matrix, other.matrix)
    for ours, theirs in zip(one.refitted(), other.refitted(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_of_too_many_inputs_only_the_variances_count(monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 8)
    torch.manual_seed(0)
    model, images = NETWORKS["flattened"]().eval(), torch.randn(50, 3, 8, 8)
    graph = trace(deepcopy(model), images[:1])
    (reader,) = readers_of(graph.group("made"), graph.shapes, measure_readers(model, graph, [images]))
    x = model.made(images).relu().flatten(1).detach().double()
    weight = model.reader.weight.detach().double()
    shares = (x.var(0, unbiased=False) * weight.square().sum(0)).reshape(5, 4).sum(1)
    torch.testing.assert_close(reader.losses(range(5)), shares / shares.sum())
    assert reader.remove_([2]) == pytest.approx(float(shares[2] / shares.sum()))
    torch.testing.assert_close(reader.refitted()[0][:, :8], weight[:, :8])


@pytest.mark.parametrize("name", ZOO)
def test_every_groups_readers_are_found_and_cost_what_is_finite(name):
    model, images = make(name).eval(), example(name, 6)
    graph = trace(deepcopy(model), images[:1])
    before = deepcopy(model.state_dict())
    moments = measure_readers(model, graph, images.split(4))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for group in graph.prunable:
        for reader in readers_of(group, graph.shapes, moments):
            losses = reader.losses(range(group.size))
            assert torch.isfinite(losses).all()
            assert (losses > -1e-9).all()
            free = [unit for unit in range(group.size) if unit not in group.fixed]
            reader.remove_(free[:1])
            assert torch.isfinite(reader.refitted()[0]).all()
