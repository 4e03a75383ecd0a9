from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.scoring.calibration import Calibration
from compression.scoring.criteria import CRITERIA, score
from compression.scoring.criteria.chip import losses
from compression.tracing.channels import trace
from models.networks import build
from utils.data.transforms import normalise
from utils.errors import UserError
from utils.spec import ModelSpec


class Tiny(nn.Module):
    """Three channels, a norm, ReLU, and a linear layer that reads their means."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3, eps=0)
        self.head = nn.Linear(3, 2)
        self.activation = activation
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, -3, 4], [1, 1, 0]]).view(3, 3, 1, 1))
            self.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))

    def forward(self, x):
        return self.head(self.activation(self.norm(self.conv(x))).mean((2, 3)))


class Residual(nn.Module):
    """Two layers of different scale whose outputs are added up, and a linear layer that reads each channel four times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0, 0], [3, 0, 0]]).view(2, 3, 1, 1))
            self.b.weight.copy_(torch.tensor([[0.0, 30, 0], [0, 0, 10]]).view(2, 3, 1, 1))

    def forward(self, x):
        return self.head((self.a(x) + self.b(x)).relu().flatten(1))


def images(count, size, seed=0):
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Calibration(pixels, torch.arange(count) % 2, ModelSpec("resnet20", 2, imgsz=8), 8)


def values(criterion, model, size=4, calibration=None):
    graph = trace(model, torch.zeros(1, 3, size, size))
    scored = score(criterion, model, graph, calibration, 0)
    assert list(scored.groups) == [group.name for group in graph.prunable]
    return next(iter(scored.groups.values())).values.tolist()


def inputs_of(calibration):
    return normalise(calibration.images, calibration.spec)


def test_weight_norms():
    l1, l2 = torch.tensor([1.0, 7, 2]), torch.tensor([1.0, 5, math.sqrt(2)])
    assert values("l1", Tiny()) == pytest.approx((l1 / l1.mean()).tolist())
    assert values("l2", Tiny()) == pytest.approx((l2 / l2.mean()).tolist())


def test_scales_of_batch_norm():
    assert values("bn_scale", Tiny()) == pytest.approx([0.5 * 3 / 3.5, 2 * 3 / 3.5, 3 / 3.5])
    with pytest.raises(UserError, match="'bn_scale' can't score group 'a': it has no batch norm"):
        values("bn_scale", Residual(), 2)


def test_distances_to_the_other_filters():
    first_second, first_third, second_third = math.sqrt(1 + 9 + 16), 1.0, math.sqrt(1 + 16 + 16)
    sums = torch.tensor([first_second + first_third, first_second + second_third, first_third + second_third])
    assert values("fpgm", Tiny()) == pytest.approx((sums / sums.mean()).tolist())


def test_layers_of_one_group_count_alike_whatever_their_scale():
    assert values("l1", Residual(), 2) == pytest.approx([(1 / 2 + 30 / 20) / 2, (3 / 2 + 10 / 20) / 2])


def test_activations():
    model, calibration = Tiny(), images(20, 4)
    maps = model.norm.eval()(model.conv(inputs_of(calibration))).relu().detach()
    assert values("apoz", model, 4, calibration) == pytest.approx((maps > 0).double().mean((0, 2, 3)).tolist())
    assert values("mean_activation", model, 4, calibration) == pytest.approx(maps.double().mean((0, 2, 3)).tolist(), rel=1e-5)
    negative = nn.functional.silu(model.norm(model.conv(inputs_of(calibration)))).detach()
    assert values("mean_activation", Tiny(F.silu), 4, calibration) == pytest.approx(negative.abs().mean((0, 2, 3)).tolist(), rel=1e-5)
    # SiLU is negative where ReLU is zero.
    assert values("apoz", Tiny(F.silu), 4, calibration) == pytest.approx(values("apoz", model, 4, calibration))


def test_singular_values():
    model, calibration = Tiny(), images(20, 4)
    spectra = torch.linalg.svdvals(model.norm.eval()(model.conv(inputs_of(calibration))).relu().detach())
    shares = spectra / spectra.sum(-1, keepdim=True).clamp_min(1e-30)
    effective = torch.where(spectra.sum(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0)
    assert values("nuclear_norm", model, 4, calibration) == pytest.approx(spectra.sum(-1).mean(0).tolist(), rel=1e-5)
    assert values("effective_rank", model, 4, calibration) == pytest.approx(effective.mean(0).tolist(), rel=1e-5)


def test_taylor_is_the_squared_gradient_of_a_gate():
    """Batches have 16 images; the gate multiplies what the linear layer reads."""
    model, calibration = Tiny(), images(40, 4)
    model.eval()
    squares = []
    for begin in (0, 16, 32):
        part = slice(begin, begin + 16)
        gate = torch.ones(3, requires_grad=True)
        read = model.norm(model.conv(inputs_of(calibration)[part])).relu().mean((2, 3))
        loss = F.cross_entropy(model.head(read * gate), calibration.labels[part])
        squares.append(torch.autograd.grad(loss, gate)[0].square())
    model.head.weight.requires_grad_(False)
    assert values("taylor", model, 4, calibration) == pytest.approx(torch.stack(squares).mean(0).tolist(), rel=1e-4)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("channels", "length"), [(2, 3), (4, 9), (9, 4), (6, 6), (1, 5)])
def test_independence_is_what_the_nuclear_norm_loses(channels, length):
    rows = torch.randn(channels, length, generator=torch.Generator().manual_seed(channels)).relu()
    rows[-1] = rows[0]
    whole = torch.linalg.svdvals(rows.double()).sum()
    without = [torch.linalg.svdvals(torch.cat([rows[:c], rows[c + 1 :]]).double()).sum() if channels > 1 else 0 for c in range(channels)]
    assert losses(rows).tolist() == pytest.approx([float(whole - rest) for rest in without], abs=1e-5 * float(whole))
    assert losses(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    assert losses(torch.diag(torch.tensor([3.0, 1, 2]))).tolist() == pytest.approx([3, 1, 2], rel=1e-5)


def test_independence_of_a_network():
    model, calibration = Tiny(), images(70, 4)
    maps = model.norm.eval()(model.conv(inputs_of(calibration))).relu().detach().flatten(2)[:64]
    assert values("chip", model, 4, calibration) == pytest.approx(torch.stack([losses(one) for one in maps]).mean(0).tolist(), rel=1e-4)


def test_reconstruction_takes_what_others_can_make(monkeypatch):
    """Channel 2 is twice channel 0: one of both goes for nothing, and the readers' error after both is that of channel 0."""
    monkeypatch.setattr("compression.layers.readers.DAMPING", 1e-9)
    model, calibration = Tiny(), images(200, 4)
    model.eval()
    model.conv.weight.data[2] = 2 * model.conv.weight.data[0]
    for name, value in {"weight": 1.5, "bias": 0.25, "running_mean": 0.0, "running_var": 1.0}.items():
        getattr(model.norm, name).data.fill_(value)
    model.norm.bias.data[2] = 0.5
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    read = model.norm(model.conv(inputs_of(calibration))).relu().mean((2, 3)).detach().double().numpy()
    y = read @ model.head.weight.detach().double().numpy().T
    y = centred(y)
    residuals = [np.linalg.lstsq(centred(read[:, [stays]]), y, rcond=None)[1].sum() for stays in (0, 1)]
    scored = score("reconstruction", model, graph, calibration, 0).groups["conv"]
    assert int(scored.order[0]) in (0, 2)
    found = scored.values[scored.order]
    assert float(found[0]) < 1e-6
    assert float(found[1]) == pytest.approx(min(residuals) / (y**2).sum(), abs=1e-5)
    assert float(found[2]) == pytest.approx(1, abs=1e-5)


def centred(values):
    return values - values.mean(0)


NETWORKS = {
    "resnet20": lambda: (build(ModelSpec("resnet20", 2, imgsz=16)), 16),
    "yolov5n-cls": lambda: (build(ModelSpec("yolov5n-cls", 2, imgsz=32)), 32),
    "flat": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), 4),
    "depthwise": lambda: (
        nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)),
        ),
        4,
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model, size = NETWORKS[request.param]()
    model(torch.zeros(2, 3, size, size))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.reset_running_stats()
    return model, trace(model, torch.zeros(1, 3, size, size)), images(24, size)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_contract_of_every_criterion(network, criterion):
    model, graph, calibration = network
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    first, second = (score(criterion, model, graph, calibration, 3) for _ in range(2))
    assert list(first.groups) == [group.name for group in graph.prunable]
    assert (first.maps is not None) == (criterion in ("rank", "effective_rank", "nuclear_norm"))
    assert first.seconds > 0
    for group in graph.prunable:
        result = first.groups[group.name]
        assert result.values.dtype == torch.float64
        assert result.values.shape == (group.size,)
        assert result.values.isfinite().all()
        assert result.order.dtype == torch.int64
        assert sorted(result.order.tolist()) == list(range(group.size))
        assert (result.values[result.order].diff() >= 0).all()
        assert 0 <= result.tied <= 1
        assert result.images == (0 if CRITERIA[criterion].needs == "weights" else 24)
        assert torch.equal(result.values, second.groups[group.name].values)
        assert torch.equal(result.order, second.groups[group.name].order)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_random_scores_follow_the_seed():
    model = Tiny()
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    drawn = [score("random", model, graph, None, seed).groups["conv"].values.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_scored_is_refused():
    model = Tiny()
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match=r"unknown criterion 'ranks'. Did you mean 'rank'\? Valid: rank"):
        score("ranks", model, graph, None, 0)
    for criterion in ("rank", "taylor"):
        with pytest.raises(UserError, match=f"criterion '{criterion}' needs images"):
            score(criterion, model, graph, None, 0)


def test_every_method_says_where_it_comes_from():
    for name, criterion in CRITERIA.items():
        assert criterion.needs in ("weights", "maps", "gradients")
        assert criterion.meaning
        text = sys.modules[criterion.function.__module__].__doc__
        assert "score(c)" in text, name
        assert name == "random" or "Differs:" in text, name
