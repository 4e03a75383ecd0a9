"""Quantizers: what they replace, by how many bits, and what post-training quantization keeps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import astuple

import pytest
import torch
from torch import nn

from compression.quantizers import QUANTIZERS
from compression.quantizers.clipping import InputStatistics, clip_range, gauss_clip, laplace_clip
from compression.quantizers.dorefa import DorefaQuantizer
from compression.quantizers.input_statistics import measure_input_statistics, read_input_statistics, write_input_statistics
from compression.quantizers.layout import layout_of
from compression.quantizers.modes import Modes
from compression.quantizers.overrides import Bits, bits_by_name
from compression.quantizers.pact import PACTQuantizer
from compression.quantizers.post_training import PostTrainLinearQuantizer
from compression.quantizers.range_linear import QuantAwareTrainRangeLinearQuantizer
from compression.quantizers.wrpn import WRPNQuantizer
from models.loading import load_classifier
from models.networks import build
from models.quantized.activations import ClippedReLU, PactReLU
from models.quantized.layers import QuantizedLayer
from models.quantized.numbers import dorefa_image, wrpn_image
from models.quantized.preparing import is_quantized, recipe_of
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.options import Place
from utils.options import build as build_options
from utils.spec import ModelSpec

SPEC = ModelSpec("resnet20", 4, imgsz=8)


class Net(nn.Module):
    """Two convolutions with norms, one of them under two names, a ReLU that is used twice, a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.again = self.conv2
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def images(count=4, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def read(name, **values):
    return build_options(QUANTIZERS[name], values, Place(f"quantizers.{name}", {}, {}))


def test_names_stay_and_what_is_shared_is_replaced_once():
    model = net()
    names, weight = [name for name, _ in model.named_modules()], model.conv1.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    DorefaQuantizer(bits_activations=4, bits_weights=3).prepare_model(model, images(), optimizer)
    assert [name for name, _ in model.named_modules()] == names
    assert model.again is model.conv2
    assert isinstance(model.conv2, QuantizedLayer)
    assert isinstance(model.relu, ClippedReLU)
    assert model.conv1.float_weight is weight
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before  # the same, with their momentum
    assert "momentum_buffer" in optimizer.state[model.conv1.float_weight]
    assert torch.equal(model.conv1.weight, dorefa_image(weight.detach(), 3))


@pytest.mark.parametrize(
    ("order", "bits"),
    [
        ([("conv1", 8), ("conv.*", 2)], [8, 2]),  # specific before broad
        ([("conv.*", 2), ("conv1", 8)], [2, 2]),  # the broad one comes first and takes all
    ],
)
def test_the_first_pattern_that_matches_wins(order, bits):
    model = net()
    quantizer = DorefaQuantizer(bits_weights=4, overrides={pattern: {"bits_weights": value} for pattern, value in order})
    quantizer.prepare_model(model)
    assert [model.conv1.settings.bits_weights, model.conv2.settings.bits_weights] == bits
    assert model.fc.settings.bits_weights == 4


def test_overrides_take_layers_out_and_give_activations_their_own():
    model = net()
    overrides = {"module.conv1|fc": {"bits_weights": None}, "relu": {"bits_activations": 2}}
    DorefaQuantizer(bits_activations=8, bits_weights=4, overrides=overrides).prepare_model(model)
    assert (type(model.conv1), type(model.fc)) == (nn.Conv2d, nn.Linear)
    assert model.relu.settings.bits == 2
    assert model.conv2.settings.bits_weights == 4
    other = net()
    DorefaQuantizer(bits_weights=4, overrides={"again": {"bits_weights": 2}}).prepare_model(other)
    assert other.conv2.settings.bits_weights == 2  # by its other name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits_weights": 3, "overrides": {"conv9": {"bits_weights": 8}}}, "overrides: 'conv9' matches no module"),
        (
            {"bits_weights": 3, "overrides": {"conv2": {"bits_weights": 8}, "a.*": {"bits_weights": 2}}},
            "'conv2' and 'again' are one module",
        ),
        ({"bits_weights": None}, "DorefaQuantizer would quantize nothing"),
        ({"bits_weights": 32}, "DorefaQuantizer would quantize nothing"),
    ],
)
def test_a_quantizer_that_does_not_fit_changes_nothing(values, message):
    model = net()
    with pytest.raises(UserError, match=message):
        DorefaQuantizer(**values).prepare_model(model)
    assert not is_quantized(model)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("DorefaQuantizer", {"bits_weights": 17}, "bits_weights: is 17"),
        ("DorefaQuantizer", {"bits_weights": True}, "must be a whole number"),
        ("DorefaQuantizer", {"overrides": {"(a+)+": {}}}, "repeats a repeat"),
        ("DorefaQuantizer", {"overrides": {"(": {}}}, "is no regular expression"),
        ("DorefaQuantizer", {"overrides": {"fc": {"bits": 3}}}, "unknown key 'bits'"),
        ("DorefaQuantizer", {"overrides": ["fc"]}, "overrides: must be a mapping"),
        ("PACTQuantizer", {"act_clip_init_val": 0}, "must be above 0"),
        ("QuantAwareTrainRangeLinearQuantizer", {"mode": "asym"}, "mode: is 'asym'"),
        ("QuantAwareTrainRangeLinearQuantizer", {"ema_decay": 1}, "it must be at least 0 and below 1"),
        ("PostTrainLinearQuantizer", {"clip_acts": "some"}, "Valid: none, avg, n_std, gauss, laplace"),
    ],
)
def test_wrong_options_are_named(name, values, message):
    with pytest.raises(UserError, match=message):
        read(name, **values)


def test_options_read_from_a_file():
    quantizer = read("DorefaQuantizer", bits_activations=8, bits_weights=3, overrides={"conv1": {"bits_weights": 32}, "fc": {}})
    assert quantizer.overrides == {"conv1": {"bits_weights": None}, "fc": {}}
    assert read("QuantAwareTrainRangeLinearQuantizer", mode="ASYMMETRIC_SIGNED").mode == Modes("asym_s", "asym_s")
    given = {"activations": "asym_u", "weights": "sym"}
    assert read("PostTrainLinearQuantizer", mode=given).mode == Modes("asym_u", "sym")


def test_a_single_layer_is_no_network_whose_layers_could_be_replaced():
    with pytest.raises(UserError, match="would quantize nothing"):
        WRPNQuantizer(bits_weights=4).prepare_model(nn.Linear(2, 2))


def test_one_bit_is_for_dorefa_only():
    with pytest.raises(UserError, match="1 bit"):
        WRPNQuantizer(bits_weights=1).prepare_model(net())
    DorefaQuantizer(bits_weights=1).prepare_model(net())


def test_a_second_preparation_is_refused():
    model, quantizer = net(), WRPNQuantizer(bits_weights=4)
    with pytest.raises(UserError, match="prepare_model comes before"):
        quantizer.quantize_params()
    quantizer.prepare_model(model)
    with pytest.raises(UserError, match="quantized already"):
        quantizer.prepare_model(model)


def test_quantize_params_refreshes_the_images():
    model, quantizer = net(), WRPNQuantizer(bits_activations=8, bits_weights=4)
    quantizer.prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(images()).square().sum().backward()
    before = model.fc.float_weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.fc.float_weight, before)
    quantizer.quantize_params()
    assert torch.equal(model.fc.weight, wrpn_image(model.fc.float_weight.detach(), 4))


def test_relu_quantizers_want_a_relu():
    silu = nn.Sequential(nn.Conv2d(3, 2, 1), nn.SiLU())
    with pytest.raises(UserError, match="the network has none"):
        DorefaQuantizer(bits_activations=8, bits_weights=8).prepare_model(silu)
    DorefaQuantizer(bits_weights=8).prepare_model(silu)


def test_pact_puts_its_clips_into_a_group_of_their_own():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9, weight_decay=1e-3)
    PACTQuantizer(bits_activations=4, bits_weights=4, act_clip_init_val=5.0, act_clip_decay=0.01).prepare_model(model, None, optimizer)
    assert isinstance(model.relu, PactReLU)
    assert len(optimizer.param_groups) == 2
    group = optimizer.param_groups[1]
    assert group["params"] == [model.relu.alpha]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.25, 0.01, 0.9)
    (10 * model(images())).sum().backward()
    optimizer.step()
    # one made anew over all parameters is brought into the same order
    other = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    PACTQuantizer(bits_activations=4).mend_(other, model)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[1]["params"] == [model.relu.alpha]
    assert other.param_groups[1]["weight_decay"] == 0.01


def test_the_layout_finds_norms_and_who_reads_the_input():
    found = layout_of(net(), images())
    assert found.norms == {"conv1": "bn1"}
    assert found.first == {"conv1"}
    assert found.run == {"conv1", "conv2", "fc"}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


def test_a_norm_that_runs_twice_is_not_folded():
    assert layout_of(Twice().eval(), images()).norms == {}


def test_a_pattern_names_whole_modules():
    chosen = bits_by_name(Bits(), {"conv1": {"bits_weights": 2}}, ["conv1", "conv10", "a.conv1"], {"conv1", "conv10", "a.conv1"})
    assert chosen == {"conv1": Bits(None, 2, None)}


def test_bits_for_what_is_not_replaced_are_refused():
    with pytest.raises(UserError, match="overrides: 'bn1' gives bits to bn1, which this quantizer does not replace"):
        WRPNQuantizer(bits_weights=4, overrides={"bn1": {"bits_weights": 2}}).prepare_model(net())
    old = {"bn1": {"bits_weights": None}}  # as old files say of everything between first and last layer
    assert recipe_of(WRPNQuantizer(bits_weights=4, overrides=old).prepare_model(net()))


def test_an_image_of_ones_own_is_not_silently_ignored():
    class Own(WRPNQuantizer):
        def param_quantization_fn(self, weight, bits):
            return weight * 0

    with pytest.raises(UserError, match=r"Own\.param_quantization_fn has no effect"):
        Own(bits_weights=4).prepare_model(net())


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_the_image_of_a_weight_is_what_the_layers_compute(name):
    bits = {"bits_parameters": 4} if name == "PostTrainLinearQuantizer" else {"bits_weights": 4}
    quantizer = QUANTIZERS[name](**bits)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    weight = model[0].weight.detach().clone()
    quantizer.prepare_model(model, torch.randn(2, 3))
    torch.testing.assert_close(model[0].weight, quantizer.param_quantization_fn(weight, 4), rtol=0, atol=0)
    assert len(model[0].weight.unique()) <= 12


@pytest.mark.parametrize("quantize_inputs", [True, False])
def test_range_linear_prepares_weights_and_inputs(quantize_inputs):
    model, x = net(), images()
    model(3 * x)  # so that the norm has seen something
    quantizer = QuantAwareTrainRangeLinearQuantizer(quantize_inputs=quantize_inputs, per_channel_wts=True)
    with pytest.raises(UserError, match="needs a batch of inputs"):
        quantizer.prepare_model(model)
    quantizer.prepare_model(model, x)
    recipe = recipe_of(model)
    assert sorted(recipe) == ["conv1", "conv2", "fc"]
    assert recipe["conv1"]["norm"] == "bn1"
    assert [recipe[name]["bits_inputs"] for name in ("conv1", "conv2", "fc")] == [8 if quantize_inputs else None, 8, 8]
    assert (recipe["fc"]["mode"], recipe["fc"]["input_mode"], recipe["fc"]["per_channel"]) == ("sym_restr", "asym_u", True)
    assert model.conv2.input_low.item() == 0.0  # behind a ReLU
    assert model.conv2.input_high.item() > 0  # ranges begin with those of the batch
    if quantize_inputs:
        assert model.conv1.input_high.item() == pytest.approx(x.max().item())


def test_eight_bits_change_little_and_two_bits_much():
    model, x = net().eval(), images(16)
    before = model(x)
    changes = []
    for bits in (8, 2):
        copy = deepcopy(model)
        QuantAwareTrainRangeLinearQuantizer(bits_activations=bits, bits_weights=bits).prepare_model(copy, x)
        changes.append(((copy.eval()(x) - before).norm() / before.norm()).item())
    assert changes[0] < 0.02 < changes[1]


SPREAD = InputStatistics(min=-4.0, max=6.0, avg_min=-2.0, avg_max=3.0, mean=0.5, std=1.0, b=0.7)
POSITIVE = InputStatistics(min=0.0, max=100.0, avg_min=0.0, avg_max=3.0, mean=0.4, std=0.3, b=0.25)


@pytest.mark.parametrize(
    ("clip", "spread", "expected"),
    [
        ("none", SPREAD, (-4.0, 6.0)),
        ("avg", SPREAD, (-2.0, 3.0)),
        ("n_std", SPREAD, (-1.5, 2.5)),  # 0.5 -+ 2 * 1
        ("gauss", SPREAD, (0.5 - 2.559136, 0.5 + 2.559136)),  # 4 bits, sigma 1
        ("laplace", SPREAD, (0.5 - 5.028640 * 0.7, 0.5 + 5.028640 * 0.7)),
        # half of a distribution around zero: sigma^2 = 2 (0.09 + 0.16) = 0.5, b = 0.8; 5 bits' 2.936201 and 6.204766
        ("gauss", POSITIVE, (0.0, 2.936201 * 0.5**0.5)),
        ("laplace", POSITIVE, (0.0, 6.204766 * 0.8)),
    ],
)
def test_clipping_of_a_range(clip, spread, expected):
    assert clip_range(clip, spread, 4) == pytest.approx(expected, rel=1e-5)


def test_the_best_clips_are_those_of_the_paper():
    assert [laplace_clip(bits) for bits in (2, 3, 4)] == pytest.approx([2.83, 3.89, 5.03], abs=0.01)
    assert [gauss_clip(bits) for bits in (2, 3, 4)] == pytest.approx([1.71, 2.15, 2.55], abs=0.01)
    # and they do what they are for: the mean squared error on a sample is not lower at a clip 15 % off on either side
    sample = torch.distributions.Laplace(0.0, 1.0).icdf((torch.arange(20000) + 0.5) / 20000)

    def error(alpha):
        step = 2 * alpha / 15
        return (((sample.clamp(-alpha, alpha) / step - 0.5).round() + 0.5) * step - sample).square().mean().item()

    best = laplace_clip(4)
    assert error(best) < min(error(0.85 * best), error(1.15 * best), error(sample.max().item()))


def test_statistics_are_those_of_the_inputs_and_survive_a_file(tmp_path):
    layer = nn.Sequential(nn.Linear(2, 1))
    spreads = measure_input_statistics(layer, [torch.tensor([[0.0, 4.0], [2.0, 2.0]])])
    # images' extremes 0..4 and 2..2; mean 2; squared distances 4, 4, 0, 0; distances 2, 2, 0, 0
    assert list(spreads) == ["0"]
    assert astuple(spreads["0"]) == pytest.approx((0.0, 4.0, 1.0, 3.0, 2.0, 2**0.5, 1.0))
    write_input_statistics(tmp_path / "stats.yaml", spreads)
    assert read_input_statistics(tmp_path / "stats.yaml") == spreads
    (tmp_path / "bad.yaml").write_text("fc: {inputs: {0: {min: 0, max: 1}}}\n")
    with pytest.raises(UserError, match="'avg_min' is missing"):
        read_input_statistics(tmp_path / "bad.yaml")
    (tmp_path / "outputs.yaml").write_text("fc: {min: 0, max: 1}\n")
    with pytest.raises(UserError, match="no statistics of the inputs"):
        read_input_statistics(tmp_path / "outputs.yaml")
    with pytest.raises(UserError, match="there are none"):
        measure_input_statistics(layer, [])


def test_post_training_takes_ranges_from_images_or_from_a_file(tmp_path):
    model, x = net(), images()
    measured = PostTrainLinearQuantizer(clip_acts="avg", bits_accum=20).prepare_model(deepcopy(model), x, batches=[x, 2 * x])
    write_input_statistics(tmp_path / "stats.yaml", measure_input_statistics(model, [x, 2 * x]))
    stored = PostTrainLinearQuantizer(clip_acts="avg", bits_accum=20, model_activation_stats=str(tmp_path / "stats.yaml"))
    stored.prepare_model(model, x)
    assert measured.conv1.input_high.item() == pytest.approx(torch.cat((x, 2 * x)).amax((1, 2, 3)).mean().item())
    assert torch.equal(measured(x), model(x))
    assert model.conv1.settings.bits_accum == 20
    high = model.conv1.input_high.item()
    model.train()(9 * x)
    assert model.conv1.input_high.item() == high  # given, and not tracked
    (tmp_path / "few.yaml").write_text((tmp_path / "stats.yaml").read_text().replace("fc:", "other:"))
    with pytest.raises(UserError, match="no statistics of the inputs of fc"):
        PostTrainLinearQuantizer(model_activation_stats=str(tmp_path / "few.yaml")).prepare_model(net(), x)


def stripes(count, seed):
    """Images of four classes: stripes of four directions, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.6 * direction) for direction in (row, column, row + column, row - column)])
    return waves[labels, None] + 0.6 * torch.randn(count, 3, 8, 8, generator=generator), labels


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = build(SPEC)
    inputs, labels = stripes(256, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(24):
        chosen = slice(64 * (step % 4), 64 * (step % 4) + 64)
        loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 0.99),
        ({"mode": "sym", "per_channel_wts": True}, 0.99),
        ({"mode": "asym_s", "clip_acts": "avg"}, 0.98),
        ({"clip_acts": "gauss", "bits_activations": 6, "per_channel_wts": True}, 0.98),
    ],
)
def test_a_trained_network_keeps_its_predictions(trained, options, least):
    inputs, labels = stripes(256, 1)
    with torch.no_grad():
        before = trained(inputs).argmax(1)
        assert (before == labels).float().mean() > 0.8  # there is something to keep
        model = PostTrainLinearQuantizer(**options).prepare_model(deepcopy(trained), inputs[:64], batches=stripes(128, 2)[0].split(64))
        after = model(inputs).argmax(1)
    assert (after == before).float().mean().item() >= least  # measured: 1.0, 1.0, 0.996, 1.0
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, QuantizedLayer) and m.settings.norm for m in convolutions)


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_a_checkpoint_rebuilds_every_quantized_network(trained, name, tmp_path):
    inputs, _ = stripes(16, 3)
    model = deepcopy(trained)
    QUANTIZERS[name](bits_activations=8, bits_weights=6).prepare_model(model, inputs)
    spec = SPEC.with_(quantization=recipe_of(model))
    save_checkpoint(tmp_path / "quantized.pt", {"spec": spec.to_dict(), "plan": None, "state_dict": model.state_dict()})
    loaded = load_classifier(tmp_path / "quantized.pt")
    assert loaded.spec == spec
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize("quantization", [[1], {"conv1": {"kind": "layer", "norm": "nowhere"}}, {"gone": {"kind": "pact"}}])
def test_a_damaged_recipe_is_one_clear_line(trained, quantization, tmp_path):
    spec = {**SPEC.to_dict(), "quantization": quantization}
    save_checkpoint(tmp_path / "damaged.pt", {"spec": spec, "plan": None, "state_dict": trained.state_dict()})
    with pytest.raises(UserError, match="damaged"):
        load_classifier(tmp_path / "damaged.pt")


def test_the_input_of_a_layer_may_be_clipped_by_a_rule_of_its_own():
    model, x = net(), images()
    overrides = {"conv1": {"input_overrides": {0: {"from_output": True}}}, "fc": {"input_overrides": {0: {"clip_acts": "avg"}}}}
    plain, own = (
        PostTrainLinearQuantizer(clip_acts="none", overrides=given).prepare_model(deepcopy(model), x, batches=[x, 2 * x])
        for given in (None, overrides)
    )
    everywhere = PostTrainLinearQuantizer(clip_acts="avg").prepare_model(deepcopy(model), x, batches=[x, 2 * x])
    assert own.conv1.input_high.item() == plain.conv1.input_high.item() != everywhere.conv1.input_high.item()
    assert own.fc.input_high.item() == everywhere.fc.input_high.item() != plain.fc.input_high.item()
