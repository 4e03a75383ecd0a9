from __future__ import annotations

import pytest
import torch
from torch import nn

from models.networks import build
from utils.loop.precision import Precision, zero_idle_gradients_
from utils.spec import ModelSpec

# kernel, stride, padding, map -> positions along one side of the kernel that meet a pixel, by hand
USED = [
    (3, 2, 1, 1, [1]),  # one output, centred on the only pixel
    (3, 1, 1, 1, [1]),
    (3, 2, 1, 2, [1, 2]),
    (3, 1, 1, 2, [0, 1, 2]),
    (5, 2, 2, 2, [2, 3]),
    (7, 1, 3, 2, [2, 3, 4]),
    (3, 2, 1, 4, [0, 1, 2]),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "size", "expected"), USED)
def test_gradients_of_positions_that_meet_only_padding_become_zero_and_no_others(kernel, stride, padding, size, expected):
    convolution = nn.Conv2d(4, 6, kernel, stride, padding, bias=False)
    inputs = torch.ones(2, 4, size, size)
    names = zero_idle_gradients_(nn.Sequential(convolution), inputs)
    assert names == ([] if len(expected) == kernel else ["0"])
    # A gradient of ones from above, as if the backend had left garbage everywhere.
    convolution.weight.backward(torch.ones_like(convolution.weight))
    touched = torch.zeros(kernel, kernel)
    touched[torch.tensor(expected)[:, None], torch.tensor(expected)[None, :]] = 1
    assert torch.equal(convolution.weight.grad, touched.expand_as(convolution.weight))


def test_bfloat16_gradients_on_tiny_maps_are_finite_and_right():
    # Without the hooks a few in a hundred of these are NaN or huge, whatever lay in the memory before.
    spec = ModelSpec("yolov5n-cls", 3, 16)
    for seed in range(15):
        torch.manual_seed(seed)
        junk = [torch.full((256 * 128 * 9 * 2,), float("nan"), dtype=torch.bfloat16) for _ in range(4)]
        del junk
        model = build(spec).train()
        assert "model.7.conv" in zero_idle_gradients_(model, torch.zeros(1, 3, 16, 16))
        with Precision(torch.device("cpu"), torch.bfloat16).autocast():
            outputs = model(torch.randn(5, 3, 16, 16))
        outputs.float().logsumexp(1).sum().backward()
        gradient = model.model[7].conv.weight.grad
        assert torch.isfinite(gradient).all()
        assert torch.count_nonzero(gradient[:, :, 0]) == 0
        assert torch.count_nonzero(gradient[:, :, 1, 1]) > 0


def test_amp_is_float32_where_it_is_off_and_named_in_the_summary():
    precision = Precision.choose(torch.device("cpu"), amp=False)
    assert str(precision) == "float32"
    assert not precision.scaler().is_enabled()
