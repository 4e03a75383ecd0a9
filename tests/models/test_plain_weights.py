"""Weights that a network computes become plain ones, and can then be cut."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from models.loading import load_classifier
from models.networks import ARCHITECTURES, build
from models.networks.plain_weights import fold_weights_
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec


class Standardised(nn.Conv2d):
    """A convolution with weight standardisation (arXiv:1903.10520) and a gain (arXiv:2101.08692)."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, images):
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), unbiased=False, keepdim=True)
        weight = self.gain * (self.weight - mean) / (var + 1e-6).sqrt()
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(Standardised):
    """Pads before it convolves, so that it is no convolution with one padding."""

    def forward(self, images):
        return super().forward(F.pad(images, (0, 1, 0, 1)))


class Scaled(nn.Conv2d):
    """Uses its own weight, and scales what comes out."""

    def forward(self, images):
        return 2 * super().forward(images)


class Network(nn.Module):
    def __init__(self, num_classes=3, channels=3):
        super().__init__()
        self.stem = Standardised(channels, 16, 3, padding=1, stride=2)
        self.body = Standardised(16, 24, 3, padding=2, dilation=2, groups=2, bias=False)
        self.head = nn.Linear(24, num_classes)

    def forward(self, images):
        return self.head(F.silu(self.body(F.silu(self.stem(images)))).mean((2, 3)))


def test_standardised_convolutions_are_folded():
    torch.manual_seed(0)
    network, images = Network().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        weight, gain = network.stem.weight.detach(), network.stem.gain.detach()
        by_hand = gain * (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), unbiased=False, keepdim=True)
        assert fold_weights_(network) == ["stem", "body"]
        assert torch.allclose(network(images), expected, atol=1e-5)
    assert torch.allclose(network.stem.weight, by_hand, rtol=1e-3, atol=1e-4)
    assert sorted(network.state_dict()) == ["body.weight", "head.bias", "head.weight", "stem.bias", "stem.weight"]
    assert fold_weights_(network) == []


@pytest.mark.parametrize("layer", [Padded(3, 8, 3), Scaled(3, 8, 3), nn.Conv2d(3, 8, 3)])
def test_what_is_no_convolution_with_a_computed_weight_stays(layer):
    network = nn.Sequential(layer)
    assert fold_weights_(network) == []
    assert network[0] is layer


def test_parametrized_weights_of_any_layer_are_folded():
    torch.manual_seed(0)
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))).eval()
    inputs = torch.randn(3, 6)
    with torch.no_grad():
        expected = network(inputs)
        assert fold_weights_(network) == ["0", "1"]
        assert torch.allclose(network(inputs), expected, atol=1e-6)


def test_a_library_s_network_is_folded_when_it_is_pruned_and_its_file_says_so(script, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "standardised", Network)
    spec = ModelSpec("standardised", 3, 16, class_names=("blue", "green", "red"))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "d.pt", {"spec": spec.to_dict(), "state_dict": build(spec).state_dict(), "plan": None})
    flags = ("--weights", tmp_path / "d.pt", "--data", photos, "--workers", 0, "--images", 24, "--project", tmp_path, "--name", "p")
    done = script("prune.py", *flags, "--macs", 0.5, "--round-to", 1, "--allocation", "uniform")
    assert done.code == 0, done.err
    assert "note   2 layers compute their weights, as stem does; those are plain weights from here on" in done.out
    results = json.loads((tmp_path / "p/results.json").read_text())
    assert results["macs"][1] <= 0.5 * results["macs"][0]
    loaded = load_classifier(tmp_path / "p/weights/pruned.pt")
    assert loaded.spec.plain_weights
    assert type(loaded.model.stem) is nn.Conv2d
    assert loaded.model.stem.out_channels < 16
    tuned = script("train.py", "--weights", tmp_path / "p/weights/pruned.pt", "--data", photos, "--epochs", 1, "--workers", 0)
    assert tuned.code == 0, tuned.err
