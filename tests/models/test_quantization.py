"""Numbers and modules of quantized networks; expected values are worked out by hand."""

from __future__ import annotations

import math
import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from models.quantized.activations import ClippedReLU, PactReLU
from models.quantized.numbers import (
    MODES,
    dequantize,
    dorefa_image,
    fake_quantize,
    grid_of,
    levels,
    limits,
    pact,
    quantize,
    range_of,
    wrpn_image,
)
from models.quantized.preparing import (
    is_quantized,
    plain_copy,
    prepare_,
    prepare_alike_,
    recipe_of,
    refresh_,
    replace_,
    replacement,
    weights_by_name,
)
from models.quantized.settings import ClippedSettings, LayerSettings, PactSettings
from utils.errors import UserError


def close(tensor, expected):
    torch.testing.assert_close(tensor.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def grid(low, high, bits, mode):
    return grid_of(torch.tensor(low), torch.tensor(high), bits, mode)


@pytest.mark.parametrize(
    ("mode", "eight", "three"),
    [("sym", (-128, 127), (-4, 3)), ("sym_restr", (-127, 127), (-3, 3)), ("asym_s", (-128, 127), (-4, 3)), ("asym_u", (0, 255), (0, 7))],
)
def test_limits_of_each_mode(mode, eight, three):
    assert (limits(8, mode), limits(3, mode)) == (eight, three)


@pytest.mark.parametrize(
    ("mode", "scale", "zero_point", "numbers"),
    [
        # m = 2, 3 bits: 2 / 3.5; -1 / s = -1.75 -> -2, 0.5 / s = 0.875 -> 1, 2 / s = 3.5 -> 4, which 3 bits do not hold -> 3
        ("sym", 4 / 7, 0, [-2, 0, 1, 3]),
        # m = 2: 2 / 3; -1.5 -> -2 (to even), 0.75 -> 1, 3
        ("sym_restr", 2 / 3, 0, [-2, 0, 1, 3]),
        # 3 / 7; -1 / s = -2.333 -> -2, 0.5 / s = 1.167 -> 1, 2 / s = 4.667 -> 5; zero point round(0 + 2.333) = 2
        ("asym_u", 3 / 7, 2, [0, 2, 3, 7]),
        # zero point round(-4 + 2.333) = -2
        ("asym_s", 3 / 7, -2, [-4, -2, -1, 3]),
    ],
)
def test_scale_zero_point_and_numbers_of_a_range(mode, scale, zero_point, numbers):
    made = grid(-1.0, 2.0, 3, mode)
    assert made.scale.item() == pytest.approx(scale)
    assert made.zero_point.item() == zero_point
    q = quantize(torch.tensor([-1.0, 0.0, 0.5, 2.0]), made)
    assert q.tolist() == numbers
    close(dequantize(q, made), [scale * (n - zero_point) for n in numbers])


def test_every_grid_holds_zero_exactly_and_an_empty_range_is_no_division_by_zero():
    for mode in ("sym", "sym_restr", "asym_s", "asym_u"):
        for low, high in ((0.3, 2.0), (-2.0, -0.3), (-0.7, 1.9), (0.0, 0.0)):
            assert fake_quantize(torch.zeros(2), grid(low, high, 4, mode)).tolist() == [0.0, 0.0]
    assert grid(0.0, 0.0, 8, "asym_u").scale.item() == 1.0
    # a range that lies above zero is widened to it: 2 / 15, not 1.7 / 15
    assert grid(0.3, 2.0, 4, "asym_u").scale.item() == pytest.approx(2 / 15)


def test_a_grid_for_each_channel():
    weight = torch.tensor([[1.0, -0.5], [0.1, 0.2]])
    whole = grid_of(*range_of(weight), 3, "sym_restr")
    each = grid_of(*range_of(weight, per_channel=True), 3, "sym_restr")
    assert whole.scale.item() == pytest.approx(1 / 3)
    close(each.scale, [[1 / 3], [0.2 / 3]])
    # as a whole the second row is 0.3 and 0.6 steps -> 0 and 1; by channel it is 1.5 -> 2 (to even) and 3 steps
    close(fake_quantize(weight, whole), [[1.0, -2 / 3], [0.0, 1 / 3]])
    close(fake_quantize(weight, each), [[1.0, -2 / 3], [0.4 / 3, 0.2]])


def test_gradients_pass_in_the_range_and_stop_outside():
    x = torch.tensor([-0.5, 0.0, 0.4, 1.0, 1.2], requires_grad=True)
    fake_quantize(x, grid(0.0, 1.0, 2, "asym_u")).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    # steps of 1/3; what rounds into 0..3 is inside: up to 1 + 1/6, so 1.2 is not, nor is -0.5
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    # the range's own ends are inside, also where "sym" has no number for the upper one (3.5 -> 3)
    w = torch.tensor([2.0, -2.0], requires_grad=True)
    fake_quantize(w, grid(-2.0, 2.0, 3, "sym")).sum().backward()
    assert w.grad.tolist() == [1.0, 1.0]


def test_levels_round_and_pass_the_gradient():
    x = torch.tensor([0.0, 0.2, 0.5, 0.9], requires_grad=True)
    y = levels(x, 3)  # Q_2: 0, 0.6 -> 1, 1.5 -> 2, 2.7 -> 3, of 3
    close(y, [0.0, 1 / 3, 2 / 3, 1.0])
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_dorefa_image_of_weights():
    # tanh: 0.5 of 1, -0.5 / 2; t / (2 max) + 1/2 = [1, 0.25, 0.75]; times 3: 3, 0.75 -> 1, 2.25 -> 2
    weight = torch.atanh(torch.tensor([0.8, -0.4, 0.4]))
    close(dorefa_image(weight, 2), [1.0, -1 / 3, 1 / 3])
    # 1 bit: sign times the mean magnitude, (1 + 2 + 3) / 3
    close(dorefa_image(torch.tensor([1.0, -2.0, 3.0]), 1), [2.0, -2.0, 2.0])


def test_dorefa_keeps_zeros_at_zero_and_lets_them_learn():
    weight = torch.tensor([0.0, 0.5, -1.0], requires_grad=True)
    image = dorefa_image(weight, 3)
    assert image[0].item() == 0.0  # without care it is 2 * round(3.5) / 7 - 1 = 1/7
    image[0].backward()
    # d tanh(0) / max|tanh| = 1 / tanh 1
    assert weight.grad[0].item() == pytest.approx(1 / math.tanh(1))
    assert dorefa_image(torch.zeros(3), 4).tolist() == [0.0, 0.0, 0.0]


def test_dorefa_gradient_goes_through_tanh_and_the_maximum():
    weight = torch.tensor([0.5, 1.0], requires_grad=True)
    dorefa_image(weight, 4)[0].backward()
    t, peak = math.tanh(0.5), math.tanh(1.0)
    # image ~ t / peak: (1 - t^2) / peak for the weight itself, -t / peak^2 * (1 - peak^2) for the one that is the maximum
    assert weight.grad.tolist() == pytest.approx([(1 - t * t) / peak, -t / peak**2 * (1 - peak**2)], rel=1e-5)


def test_wrpn_image_of_weights():
    weight = torch.tensor([-1.7, -0.4, 0.0, 0.2, 0.5, 3.0], requires_grad=True)
    image = wrpn_image(weight, 3)  # 3 positive levels: -1, -1.2 -> -1/3, 0, 0.6 -> 1/3, 1.5 -> 2/3, 1
    close(image, [-1.0, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0])
    image.sum().backward()
    assert weight.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_pact_clips_rounds_and_learns_its_clip():
    x = torch.tensor([-1.0, 0.5, 1.2, 2.0, 5.0], requires_grad=True)
    alpha = torch.tensor([2.0], requires_grad=True)
    y = pact(x, alpha, 2)  # steps of 2/3: 0, 0.75 -> 1, 1.8 -> 2, 3, 3
    close(y, [0.0, 2 / 3, 4 / 3, 2.0, 2.0])
    y.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 0.0, 0.0]
    assert alpha.grad.tolist() == [11000.0]  # the sum over x >= alpha
    close(pact(x, alpha, None), [0.0, 0.5, 1.2, 2.0, 2.0])


def test_activation_modules():
    x = torch.tensor([-1.0, 0.3, 0.5, 2.0])
    close(ClippedReLU(ClippedSettings(2))(x), [0.0, 1 / 3, 2 / 3, 1.0])  # 0.9 -> 1, 1.5 -> 2
    module = PactReLU(PactSettings(2, initial=3.0))
    assert module.alpha.tolist() == [3.0]
    close(module(x), [0.0, 0.0, 0.0, 2.0])  # steps of 1; 0.5 rounds to even
    module.alpha.data.fill_(-1.0)  # nothing may divide by zero or turn round
    assert module(x).max().item() == pytest.approx(1e-3)
    module.refresh_()  # after a step that went too far the clip still learns
    assert module.alpha.item() == pytest.approx(1e-3)
    module(x).sum().backward()
    assert module.alpha.grad.tolist() == [3.0]  # three values lie above
    assert ClippedReLU(ClippedSettings(2))(x.bfloat16()).dtype == torch.bfloat16


def linear_net():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -0.4], [0.2, 0.5]]))
        net[0].bias.copy_(torch.tensor([0.3, -1.0]))
        net[2].weight.copy_(torch.eye(2))
    return net


def test_weight_becomes_a_buffer_and_float_weight_the_parameter():
    net = linear_net()
    weight, bias = net[0].weight, net[0].bias
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 3, "bits_bias": 2}})
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in net.named_modules()] == ["", "0", "1", "2"]
    assert layer.float_weight is weight  # the same objects, so that an optimizer needs no mending
    assert layer.float_bias is bias
    assert [name for name, _ in layer.named_parameters()] == ["float_weight", "float_bias"]
    close(layer.weight, [[1.0, -1 / 3], [1 / 3, 2 / 3]])  # 3, -1.2 -> -1, 0.6 -> 1, 1.5 -> 2, of 3
    close(layer.bias, [0.0, -1.0])  # one level: 0.3 -> 0
    assert {"weight", "bias"} <= dict(layer.named_buffers()).keys()
    assert list(weights_by_name(net)) == ["0.weight", "0.bias", "2.weight"]
    assert weights_by_name(net)["0.weight"] is weight


def test_the_forward_pass_uses_the_image_and_gradients_reach_the_float_weight():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 3}})
    x = torch.tensor([[1.0, 2.0]])
    y = net[0](x)
    close(y, [[1.0 - 2 / 3 + 0.3, 1 / 3 + 4 / 3 - 1.0]])
    y.sum().backward()
    assert net[0].float_weight.grad.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    with torch.no_grad():
        net[0].float_weight.fill_(0.9)
    assert net[0].weight[0, 0].item() == 1.0
    close(net[0].weight, [[1.0, -1 / 3], [1 / 3, 2 / 3]])  # of the step before, until
    refresh_(net)
    close(net[0].weight, [[1.0, 1.0], [1.0, 1.0]])  # 2.7 -> 3, of 3
    close(net[0](x), [[3.3, 2.0]])


def test_without_float_copies_the_weights_are_rounded_themselves():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 3, "float_copy": False}})
    assert isinstance(net[0].weight, nn.Parameter)
    close(net[0].weight, [[1.0, -1 / 3], [1 / 3, 2 / 3]])


def test_a_saved_state_holds_current_images_and_loads_into_a_network_prepared_alike():
    net, other = linear_net(), linear_net()
    recipe = {
        "0": {"kind": "layer", "method": "dorefa", "bits_weights": 3, "bits_inputs": 8},
        "1": {"kind": "pact", "bits": 4, "initial": 8.0},
    }
    prepare_(net, recipe)
    with torch.no_grad():
        net[0].float_weight.add_(0.3)
        net[0].input_high.fill_(4.0)
        net[1].alpha.fill_(2.5)
    state = net.state_dict()
    torch.testing.assert_close(state["0.weight"], dorefa_image(net[0].float_weight.detach(), 3))
    prepare_(other, recipe_of(net))
    assert recipe_of(other) == recipe_of(net)
    other.load_state_dict(state)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net.eval()(x), other.eval()(x))


def test_gradients_have_the_strides_of_their_weight():
    net = nn.Sequential(nn.Conv2d(1, 4, 3)).to(memory_format=torch.channels_last)
    assert net[0].weight.stride() == (9, 1, 3, 1)  # and a contiguous one would have (9, 9, 3, 1)
    prepare_(net, {"0": {"kind": "layer", "method": "dorefa", "bits_weights": 4}})
    net(torch.randn(2, 1, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    assert net[0].float_weight.grad.stride() == net[0].float_weight.stride() == (9, 1, 3, 1)


def test_a_copy_stands_for_itself():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 3}})
    copy = deepcopy(net)
    with torch.no_grad():
        net[0].float_weight.zero_()
    refresh_(net)
    close(copy[0].weight, [[1.0, -1 / 3], [1 / 3, 2 / 3]])
    close(copy[0](torch.tensor([[1.0, 2.0]])), [[1.0 - 2 / 3 + 0.3, 1 / 3 + 4 / 3 - 1.0]])


def test_ranges_are_averaged_in_training_and_fixed_in_eval_mode():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "bits_inputs": 8, "decay": 0.9}})
    layer = net[0].train()
    layer(torch.tensor([[-1.0, 2.0]]))
    assert (layer.input_low.item(), layer.input_high.item()) == (-1.0, 2.0)  # the first as it is
    layer(torch.tensor([[-2.0, 4.0]]))
    assert layer.input_low.item() == pytest.approx(-1.1)  # 0.9 * -1 + 0.1 * -2
    assert layer.input_high.item() == pytest.approx(2.2)
    assert layer.input_seen.item() == 2
    layer.eval()(torch.tensor([[-9.0, 9.0]]))
    assert layer.input_high.item() == pytest.approx(2.2)
    # outside the range is its end: steps of 3.3 / 255, zero point round(1.1 / s) = 85; (255 - 85) s = 2.2
    close(layer.quantized_input(torch.tensor([[9.0, -9.0]])), [[2.2, -1.1]])


def conv_and_norm(gamma=(2.0, -0.5)):
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.3, 1.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor(gamma))
        net[1].bias.copy_(torch.tensor([0.1, 0.2]))
        net[1].running_var.copy_(torch.tensor([4.0, 0.25]))
        net[1].running_mean.copy_(torch.tensor([1.0, -1.0]))
    return net


def test_the_grid_of_a_folded_layer_is_that_of_the_folded_weights():
    net = conv_and_norm()
    prepare_(net, {"0": {"kind": "layer", "bits_weights": 3, "norm": "1"}})
    # gamma / sigma = 1, -1: folded 0.3 and -1, steps of 1/3: 0.9 -> 1, -3; unfolded again 1/3 and 1
    close(net[0].multiplier().flatten(), [1.0, -1.0])
    close(net[0].weight.flatten(), [1 / 3, 1.0])
    net.eval()
    # the folded network: (1/3) x + 0.1 - 1, -x + 0.2 - 1
    close(net(torch.full((1, 1, 1, 1), 3.0)).flatten(), [0.1, -3.8])
    copy = deepcopy(net)
    net[1].running_var.fill_(1e6)
    assert copy[0].multiplier()[0].item() == 1.0  # the copy folds its own norm
    net[0].fold_with(copy[1])
    assert [name for name, _ in net.named_modules()] == ["", "0", "1"]


def test_the_norms_eps_counts():
    net = conv_and_norm()
    net[1].eps = 3.0
    net[1].running_var.fill_(1.0)
    prepare_(net, {"0": {"kind": "layer", "bits_weights": 3, "norm": "1"}})
    close(net[0].multiplier().flatten(), (net[1].weight.detach() / 2).tolist())


def test_a_bias_has_its_own_grid():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "bits_bias": 3}})
    close(net[0].bias, [1 / 3, -1.0])  # 0.3 and -1 on steps of 1/3
    assert [name for name, _ in net[0].named_parameters()] == ["weight", "float_bias"]


def test_parameters_keep_their_order_and_one_bit_its_gradient():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "method": "dorefa", "bits_weights": 1}})
    assert [name for name, _ in net[0].named_parameters()] == ["float_weight", "bias"]
    close(net[0].weight.abs().unique(), [0.525])  # (1 + 0.4 + 0.2 + 0.5) / 4
    net[0](torch.tensor([[2.0, 5.0]])).sum().backward()
    assert net[0].float_weight.grad.tolist() == [[2.0, 5.0], [2.0, 5.0]]


def test_the_end_of_a_range_itself_has_a_gradient():
    # Of the grid "sym" the greatest value stands at 127.5 steps, the very edge; divisions must not push it out.
    ends = torch.linspace(0.1, 30, 2000, requires_grad=True)
    for mode in MODES:
        (gradient,) = torch.autograd.grad(fake_quantize(ends, grid_of(-ends.detach(), ends.detach(), 8, mode)).sum(), ends)
        assert bool((gradient == 1).all())


def test_a_channel_that_its_norm_has_switched_off_stays_finite():
    net = conv_and_norm(gamma=(0.0, -0.5))
    net[1].eps = 1e-5
    prepare_(net, {"0": {"kind": "layer", "bits_weights": 3, "norm": "1"}})
    close(net[0].weight.flatten(), [0.0, 1.0])
    net(torch.randn(4, 1, 2, 2)).sum().backward()
    assert bool(net[0].float_weight.grad.isfinite().all())


def test_accumulators_of_few_bits_saturate():
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    entry = {"kind": "layer", "bits_weights": 3, "bits_inputs": 3, "input_mode": "asym_u", "frozen": True, "bits_accum": 4}
    prepare_(net, {"0": entry})
    net[0].input_high.fill_(7.0)
    # steps: weights 1, inputs 1. 3 * 7 + 3 * 7 = 42, but 4 bits hold 7; -8 is the other end
    assert net(torch.tensor([[7.0, 7.0]])).item() == 7.0
    assert net(torch.tensor([[1.0, 1.0]])).item() == 6.0
    with torch.no_grad():
        net[0].float_weight.fill_(-3.0)
    assert net(torch.tensor([[7.0, 7.0]])).item() == -8.0


def test_accumulators_count_in_steps_of_the_folded_weights():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    with torch.no_grad():
        net[0].weight.fill_(3.0)
        net[1].weight.fill_(2.0)
        net[1].eps = 0.0
    entry = {"kind": "layer", "bits_weights": 3, "bits_inputs": 3, "input_mode": "asym_u", "frozen": True, "bits_accum": 4, "norm": "1"}
    prepare_(net, {"0": entry})
    net[0].input_high.fill_(7.0)
    # Folded, a step of the weights is 2 and one of the inputs 1: 4 bits hold 7 * 2; the norm's 2 comes behind the layer.
    assert net[0](torch.full((1, 1, 1, 1), 7.0)).item() == 7.0


def test_shared_modules_are_replaced_once():
    relu, layer = nn.ReLU(), nn.Linear(2, 2)
    net = nn.ModuleDict({"a": nn.Sequential(layer, relu), "b": nn.Sequential(layer, relu)})
    settings = PactSettings(4)
    replace_(net, {"a.1": replacement(relu, "pact", settings), "a.0": replacement(layer, "layer", LayerSettings("wrpn", 4))})
    assert net["a"][1] is net["b"][1]
    assert isinstance(net["b"][1], PactReLU)
    assert net["a"][0] is net["b"][0]
    assert sorted(recipe_of(net)) == ["a.0", "a.1"]


def test_a_moving_average_is_quantized_like_its_network():
    net = linear_net()
    average = deepcopy(net).requires_grad_(False)
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 3, "bits_inputs": 8}, "1": {"kind": "pact", "bits": 4}})
    net[0](torch.tensor([[-1.0, 2.0]]))
    prepare_alike_(average, net)
    assert torch.equal(average[0].weight, net[0].weight)
    assert average[0].input_high.item() == 2.0
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert [tuple(t.shape) for t in average.state_dict().values()] == [tuple(t.shape) for t in net.state_dict().values()]


def test_a_plain_copy_is_the_original_network():
    net = linear_net()
    x = torch.tensor([[1.0, -1.0], [2.0, 0.5], [-0.3, 0.7]])
    before, names = net(x), list(net.state_dict())
    prepare_(net, {"0": {"kind": "layer", "method": "wrpn", "bits_weights": 2, "bits_bias": 2}, "1": {"kind": "clipped_relu", "bits": 2}})
    assert not torch.equal(net(x), before)
    plain = plain_copy(net)
    assert not is_quantized(plain)
    assert list(plain.state_dict()) == names
    assert torch.equal(plain(x), before)
    assert is_quantized(net)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"0": {"kind": "wide"}}, "quantization.0: kind is 'wide'; valid: layer, clipped_relu, pact"),
        ({"9": {"kind": "layer"}}, "unknown quantized module '9'"),
        ({"1": {"kind": "layer", "bits_weights": 8}}, "a ReLU can't be quantized as 'layer'; valid: Conv2d, Linear"),
        ({"0": {"kind": "layer", "bits_weights": 99}}, "quantization.0.bits_weights: is 99"),
        ({"0": {"kind": "layer", "bits_weights": 1}}, "only DoReFa quantizes to 1 bit, and only weights"),
        ({"0": {"kind": "layer", "bits_weights": 8, "norm": "1"}}, "0: '1' is no batch norm with running statistics"),
        ({"0": {"kind": "layer", "mode": "odd"}}, "quantization.0.mode: is 'odd'"),
        ({"1": {"kind": "pact"}}, "'bits' is missing"),
        ({"0": 3}, "quantization.0: must be a mapping, not 3"),
    ],
)
def test_a_recipe_that_does_not_fit_changes_nothing(recipe, message):
    net = linear_net()
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_(net, recipe)
    assert not is_quantized(net)


def test_a_network_is_quantized_once():
    net = linear_net()
    prepare_(net, {"0": {"kind": "layer", "bits_weights": 8}})
    with pytest.raises(UserError, match="quantized already"):
        prepare_(net, {"2": {"kind": "layer", "bits_weights": 8}})
