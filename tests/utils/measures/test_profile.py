import sys

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.measures.profile import Profile, count_macs, example_input, profile, thop_macs
from utils.spec import ModelSpec

SPEC = ModelSpec("net", 5, imgsz=8)

NETWORKS = {
    # 8 x 8 outputs, 4 channels, each of 3 * 3 * 3 products
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), 8 * 8 * 4 * 27, 4 * 27 + 4),
    # stride 2 without padding: (8 - 3) // 2 + 1 = 3
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, bias=False), 3 * 3 * 4 * 27, 4 * 27),
    # each of 6 channels sees one of 3
    "grouped": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), 8 * 8 * 6 * 9, 6 * 9),
    # 192 inputs
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 192 * 5, 192 * 5 + 5),
    # norm, activation and pooling count nothing; the linear layer 4 * 5
    "whole": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5)
        ),
        8 * 8 * 4 * 3 + 20,
        16 + 8 + 25,
    ),
}


class Functional(nn.Module):
    """A network whose matrix product is no module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 192))

    def forward(self, images):
        return nn.functional.linear(images.flatten(1), self.weight)


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_by_hand_and_thop_agrees(name):
    make, macs, params = NETWORKS[name]
    assert count_macs(make(), SPEC) == macs
    assert thop_macs(make(), SPEC) == macs
    assert profile(make(), SPEC) == Profile(params, macs, "thop")


def test_grey_input_has_one_channel():
    grey = ModelSpec("net", 5, imgsz=16, channels=1)
    assert example_input(nn.Conv2d(1, 2, 3), grey, 3).shape == (3, 1, 16, 16)
    assert count_macs(nn.Conv2d(1, 2, 3, padding=1), grey) == 16 * 16 * 2 * 9


def test_functional_operations_that_thop_misses_are_counted():
    result = profile(Functional(), SPEC)
    assert (result.params, result.macs) == (960, 960)
    assert "flop_counter (thop misses operations here: it counts 0)" in result.source


class Token(nn.Module):
    """A module is called with a view of a parameter, as in class attention."""

    def __init__(self):
        super().__init__()
        self.token, self.stem, self.inner = nn.Parameter(torch.zeros(1, 8)), nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)

    def forward(self, images):
        return self.inner(self.token.expand(len(images), -1)) + self.stem(images).mean((1, 2, 3))[:, None]


def test_a_view_of_a_parameter_as_a_modules_input_does_not_stop_the_counter():
    model = Token()
    model.inner.bias.requires_grad_(False)
    assert count_macs(model, ModelSpec("x", 2, 16)) == 4 * 4 * 3 * 8 * 4 * 4 + 8 * 2
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["inner.bias"]


def test_without_thop_the_flop_counter_counts_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    assert thop_macs(Functional(), SPEC) is None
    assert profile(Functional(), SPEC) == Profile(960, 960, "torch.utils.flop_counter (thop is not usable here)")


@pytest.mark.parametrize("training", [True, False])
def test_profile_leaves_the_network_as_it_was(training):
    model = NETWORKS["whole"][0]().train(training)
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    profile(model, SPEC)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 9), nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), nn.Conv2d(1, 1, 1)])
def test_network_that_does_not_take_the_size_is_refused(model):
    with pytest.raises(UserError, match=r"net does not take images of 8 px \(.+\); choose another --imgsz"):
        profile(model, SPEC)
    assert model.training
