"""Forward passes that begin at the first changed tensor give what whole passes give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compression.layers.replay import Replay
from models.networks import ARCHITECTURES
from tests.architectures import architectures


class Shared(nn.Module):
    """Views of one tensor, written into in place, an operation with two results, one that returns its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).contiguous()
        left, right = x.chunk(2, 1)
        right.mul_(2)
        right = self.second(right)
        left.relu_()  # seen through x
        best, place = x.max(1, keepdim=True)
        x[:, 0] = 1.0
        x.add_(best * place)
        return self.third(torch.cat([x[:, :4], right], 1)).mean((2, 3))


class Iterated(nn.Module):
    """A loop over a tensor: the calls' results are no plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(row) for row in self.first(x)])


def check(model: nn.Module, batches: list[Tensor]) -> None:
    """Change each of some tensors by turns, forwards and then back, and compare with whole passes."""
    model.eval()
    replay = Replay(model, batches)
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    effects = 0
    chosen = names[:: max(len(names) // 5, 1)]
    for name in [*chosen, chosen[0], chosen[-1]]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        value = before[name] * 1.5 + 0.1
        found = replay.outputs({name: value})
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        with torch.no_grad():
            model.state_dict()[name].copy_(value)
            expected = [model(batch) for batch in batches]
            model.load_state_dict(before)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        effects += any(not torch.equal(one, other) for one, other in zip(found, replay.unchanged, strict=True))
    assert effects


@pytest.mark.parametrize("network", [Shared, Iterated])
def test_small(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    size = (4,) if network is Iterated else (3, 8, 8)
    check(network(), [torch.randn(3, *size), torch.randn(2, *size)])


@pytest.mark.parametrize("name", architectures(quick=("yolov5n-cls", "resnet20", "googlenet-cifar", "densenet40", "mobilenet-v1")))
def test_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name](10, 3)
    check(model, [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)])


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "first", "again"), [("0.weight", 4, 4), ("2.bias", 4, 2), ("3.weight", 4, 1)])
def test_calls_before_the_change_are_made_once(name: str, first: int, again: int) -> None:
    replay = Replay(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), [torch.randn(2, 4)])
    for count in (first, again):
        with Products() as products:
            replay.outputs({name: torch.ones_like(replay.model.state_dict()[name])})
        assert products.count == count
