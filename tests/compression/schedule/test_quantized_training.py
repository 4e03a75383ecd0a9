"""Quantization-aware training by a schedule: with masks, thinning, distillation, an average, and restarts."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression.quantizers.wrpn import WRPNQuantizer
from compression.schedule.loop import ScheduledLoop
from models.loading import load_classifier
from models.networks import build
from models.quantized.layers import QuantizedLayer
from models.quantized.numbers import dorefa_image, wrpn_image
from models.quantized.preparing import is_quantized, prepare_, recipe_of, weights_by_name
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.loop.ema import EMA
from utils.loop.precision import zero_idle_gradients_
from utils.spec import ModelSpec

SPEC = ModelSpec("resnet20", 4, imgsz=8)
DOREFA = {"class": "DorefaQuantizer", "bits_activations": 8, "bits_weights": 3, "overrides": {"conv1|fc": {"bits_weights": 8}}}
LINEAR = {"class": "QuantAwareTrainRangeLinearQuantizer", "ema_decay": 0.9, "per_channel_wts": True}
PACT = {"class": "PACTQuantizer", "bits_activations": 4, "bits_weights": 4, "act_clip_init_val": 1.5}
STEPS, BATCH = 3, 16


def policy(kind, name, first, last=None):
    window = {"starting_epoch": first} | ({} if last is None else {"ending_epoch": last + 1})
    return {kind: {"instance_name": name}, **window}


def stripes(count, seed):
    """Images of four classes: stripes of four directions, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.6 * direction) for direction in (row, column, row + column, row - column)])
    return waves[labels, None] + 0.4 * torch.randn(count, 3, 8, 8, generator=generator), labels


INPUTS, LABELS = stripes(STEPS * BATCH, 0)


class Training:
    """A loop of one's own around a schedule."""

    def __init__(self, schedule, epochs=4, model=None, ema=True, lr=0.05, kind=torch.optim.SGD):
        torch.manual_seed(0)
        self.model = build(SPEC) if model is None else model
        self.optimizer = kind(self.model.parameters(), lr=lr, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        self.ema = EMA(self.model, decay=0.9, ramp=5) if ema else None
        self.restructured, self.lines, self.losses = 0, [], []
        self.loop = ScheduledLoop(
            schedule, self.model, self.optimizer, epochs, STEPS, (INPUTS[:8], LABELS[:8]), self.ema, SPEC, 0, self.count, self.lines.append
        )

    def count(self):
        self.restructured += 1

    def epoch(self, number):
        self.model.train()
        self.loop.on_epoch_begin(number)
        for step in range(STEPS):
            chosen = slice(step * BATCH, step * BATCH + BATCH)
            self.loop.on_minibatch_begin(step, INPUTS[chosen], LABELS[chosen])
            outputs = self.model(INPUTS[chosen])
            loss = self.loop.before_backward_pass(outputs, F.cross_entropy(outputs, LABELS[chosen]))
            self.optimizer.zero_grad()
            loss.backward()
            self.loop.before_parameter_optimization()
            self.optimizer.step()
            if self.ema:
                self.ema.update_(self.model)
            self.loop.on_minibatch_end()
            self.losses.append(loss.item())
        self.loop.on_epoch_end()

    def state(self):
        return deepcopy(
            {
                "loop": self.loop.state_dict(),
                "model": self.model.state_dict(),
                "average": self.ema.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def take_up(self, state):
        self.loop.load_state_dict(state["loop"])
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["average"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(5)
    save_checkpoint(path, {"spec": SPEC.to_dict(), "plan": None, "state_dict": build(SPEC).state_dict()})
    return str(path)


def everything(quantizer, teacher):
    """Elements and filters are pruned, the filters removed; then the network is quantized, and goes on being pruned."""
    elements = {"class": "AutomatedGradualPruner", "initial_sparsity": 0.1, "final_sparsity": 0.5, "weights": ["layer[23].?.conv2.weight"]}
    filters = {
        "class": "L1RankedStructureParameterPruner",
        "group_type": "Filters",
        "desired_sparsity": 0.5,
        "weights": ["layer1.?.conv1.weight"],
    }
    return {
        "version": 1,
        "pruners": {"elements": elements, "filters": filters},
        "extensions": {"thinning": {"class": "FilterRemover"}},
        "quantizers": {"few_bits": quantizer},
        "distillers": {"dense": {"class": "KnowledgeDistillation", "resume": teacher, "temperature": 2}},
        "lr_schedulers": {"steps": {"class": "MultiStepLR", "milestones": [3], "gamma": 0.1}},
        "policies": [
            policy("pruner", "elements", 0, 3),
            policy("pruner", "filters", 0, 0),
            policy("extension", "thinning", 1, 1),
            policy("quantizer", "few_bits", 2),
            policy("distiller", "dense", 0),
            policy("lr_scheduler", "steps", 0),
        ],
    }


@pytest.mark.parametrize("quantizer", [DOREFA, LINEAR, PACT], ids=lambda quantizer: quantizer["class"])
def test_pruning_thinning_quantization_and_distillation_in_one_schedule(quantizer, teacher, tmp_path):
    training = Training(everything(quantizer, teacher), epochs=5)
    training.epoch(0)
    training.epoch(1)
    assert not is_quantized(training.model)
    assert training.model.layer1[0].conv1.out_channels == 8
    names = [name for name, _ in training.model.named_modules()]
    trained, count = weights_by_name(training.model), training.restructured
    training.epoch(2)
    assert is_quantized(training.model)
    assert training.restructured == count + 1
    assert [name for name, _ in training.model.named_modules()] == names
    after = weights_by_name(training.model)
    assert all(after[name] is parameter for name, parameter in trained.items())
    training.epoch(3)
    training.epoch(4)
    # the pruner that began before has gone on, by the names of the file; masks hold on floats, images and averages
    masks = training.loop.scheduler.masks.values
    pruned = [name for name in masks if "conv2" in name]
    assert len(pruned) == 6
    for name in pruned:
        path = name.removesuffix(".weight")
        gone = masks[name] == 0
        assert gone.float().mean().item() == pytest.approx(0.5, abs=0.01)
        for model in (training.model, training.ema.model):
            layer = model.get_submodule(path)
            assert not layer.float_weight[gone].any()
            assert not layer.weight[gone].any()
            torch.testing.assert_close(layer.weight, layer.image("weight").detach())
    assert recipe_of(training.ema.model) == recipe_of(training.model)
    # and the checkpoint's specification rebuilds it: widths, then modules, then tensors
    state = training.loop.state
    assert state.spec.quantization == recipe_of(training.model)
    content = {"spec": state.spec.to_dict(), "plan": state.plan, "state_dict": training.ema.model.state_dict()}
    save_checkpoint(tmp_path / "best.pt", content)
    loaded = load_classifier(tmp_path / "best.pt").model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), training.ema.model(INPUTS))


def only(quantizer, *more, first=0, last=None, **sections):
    return {"quantizers": {"few_bits": quantizer}, **sections, "policies": [*more, policy("quantizer", "few_bits", first, last)]}


@pytest.mark.parametrize("quantizer", [DOREFA, LINEAR, PACT], ids=lambda quantizer: quantizer["class"])
def test_a_quantized_network_learns(quantizer):
    training = Training(only(quantizer), epochs=12, ema=False, lr=0.01 if quantizer is PACT else 0.05)  # 4 bits jump at more
    for number in range(12):
        training.epoch(number)
    assert sum(training.losses[-STEPS:]) < 0.6 * sum(training.losses[:STEPS])
    layer = training.model.layer1[0].conv1
    levels = layer.weight.detach().unique()
    if quantizer is DOREFA:
        assert len(levels) <= 8  # 3 bits
        torch.testing.assert_close(layer.weight, dorefa_image(layer.float_weight.detach(), 3))
    if quantizer is PACT:
        alphas = next(group for group in training.optimizer.param_groups if group.get("name") == "clips")["params"]
        assert len(alphas) == 10  # the stem's ReLU and those of nine blocks
        assert all(alpha.item() != 1.5 for alpha in alphas)


@pytest.mark.parametrize(
    ("quantizer", "kind", "at"),
    [(DOREFA, torch.optim.SGD, 1), (DOREFA, torch.optim.AdamW, 3), (PACT, torch.optim.Adam, 3)],  # LINEAR: test_resume_schedule.py
)
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_left_alone(quantizer, kind, at, teacher):
    schedule = everything(quantizer, teacher)
    whole = Training(schedule, epochs=4, kind=kind, lr=0.01)
    for number in range(4):
        if number == at:
            kept = whole.state()
        whole.epoch(number)
    other = Training(schedule, epochs=4, kind=kind, lr=0.01)
    other.take_up(kept)
    for number in range(at, 4):
        other.epoch(number)
    for name in ("model", "average"):
        expected, found = whole.state()[name], other.state()[name]
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert whole.losses[at * STEPS :] == other.losses


def test_the_clips_have_their_own_group_from_the_start_and_its_rate_follows_the_schedule():
    rates = {"lr_schedulers": {"steps": {"class": "MultiStepLR", "milestones": [1], "gamma": 0.1}}}
    training = Training(only(PACT, policy("lr_scheduler", "steps", 0), first=1, **rates), lr=0.5)
    group = training.optimizer.param_groups[1]
    assert (group["name"], group["params"]) == ("clips", [])
    training.epoch(0)
    training.epoch(1)
    assert len(group["params"]) == 10
    assert [g["lr"] for g in training.optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_a_network_stays_quantized_when_the_window_has_ended():
    training = Training(only(DOREFA, first=0, last=0))
    training.epoch(0)
    training.epoch(1)
    for model in (training.model, training.ema.model):
        layer = model.layer1[0].conv1
        torch.testing.assert_close(layer.weight, dorefa_image(layer.float_weight.detach(), 3), rtol=0, atol=0)


def test_a_mask_is_set_after_the_preparation():
    half = {"pruners": {"half": {"class": "SparsityLevelParameterPruner", "levels": {"layer1.0.conv1.weight": 0.5}}}}
    regularizers = {"regularizers": {"small": {"class": "L1Regularizer", "reg_regims": {"fc.weight": 1e-3}}}}
    more = [policy("pruner", "half", 1, 2), policy("regularizer", "small", 0, 3)]
    training = Training(only(DOREFA, *more, **half, **regularizers))
    for number in range(3):
        training.epoch(number)
    layer = training.model.layer1[0].conv1
    assert (layer.float_weight == 0).float().mean().item() == 0.5
    assert torch.equal(layer.weight == 0, layer.float_weight == 0)


@pytest.mark.parametrize("name", ["ActivationMeanRankedFilterPruner", "FeatureMapRankFilterPruner"])
def test_a_pruner_that_measures_filters_works_on_a_quantized_network(name):
    ranked = {
        "class": name,
        "group_type": "Filters",
        "desired_sparsity": 0.5,
        "weights": ["layer1.?.conv1.weight"],
    }
    training = Training(only(DOREFA, policy("pruner", "ranked", 1, 1), pruners={"ranked": ranked}))
    training.epoch(0)
    training.epoch(1)
    kept = training.model.layer1[0].conv1.float_weight.flatten(1).any(1)
    assert int(kept.sum()) == 8


def test_ranges_of_post_training_quantization_are_those_of_the_calibration_images_and_stand_still():
    training = Training(only({"class": "PostTrainLinearQuantizer", "per_channel_wts": True}, first=1))
    training.epoch(0)
    float_model = deepcopy(training.model).eval()
    seen = []
    float_model.layer1[0].conv2.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    float_model(INPUTS[:8])  # the loop's examples
    training.loop.on_epoch_begin(1)
    training.model.train()
    training.loop.on_minibatch_begin(0, INPUTS[8:24], LABELS[8:24])
    for model in (training.model, training.ema.model):
        layer = model.layer1[0].conv2
        assert layer.input_low.item() == seen[0].min().item() == 0.0
        assert layer.input_high.item() == seen[0].max().item()
    assert training.model.training
    before = {name: [end.clone() for end in (layer.input_low, layer.input_high)] for name, layer in layers(training.model).items()}
    weight = training.model.layer1[0].conv2.float_weight.detach().clone()
    training.epoch(1)
    for name, layer in layers(training.model).items():
        assert [layer.input_low, layer.input_high] == before[name]
    assert not torch.equal(training.model.layer1[0].conv2.float_weight, weight)


def test_without_float_copies_the_average_moves_and_its_forward_pass_rounds():
    training = Training(only({"class": "WRPNQuantizer", "bits_weights": 4, "train_with_fp_copy": False}, first=0))
    training.epoch(0)
    layer, average = training.model.layer1[0].conv1, training.ema.model.layer1[0].conv1
    torch.testing.assert_close(layer.weight.detach(), wrpn_image(layer.weight.detach(), 4), rtol=0, atol=1e-6)
    assert not torch.allclose(average.weight, wrpn_image(average.weight, 4), atol=1e-4)  # it lies between grid points
    torch.testing.assert_close(average.used("weight"), wrpn_image(average.weight.detach(), 4), rtol=0, atol=0)
    with pytest.raises(UserError, match="train_with_fp_copy must be true"):
        Training(only({**DOREFA, "train_with_fp_copy": False}))


def test_only_a_quantized_epoch_can_be_the_best():
    training = Training(only(DOREFA, first=2))
    assert [training.loop.scheduler.target_epoch, Training(only(DOREFA, first=9)).loop.scheduler.target_epoch] == [2, -1]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (only({"class": "DorefaQuantizer"}), "few_bits: DorefaQuantizer would quantize nothing"),
        (only(DOREFA, policy("quantizer", "few_bits", 3)), "two policies quantize"),
        (only({**DOREFA, "overrides": {"conv7": {"bits_weights": 2}}}), "few_bits: overrides: 'conv7' matches no module"),
        (only({"class": "WRPNQuantizer", "bits_weights": 1}), "few_bits: bits_weights is 1; only DoReFa"),
        (
            only(DOREFA, policy("extension", "cut", 1, 3), extensions={"cut": {"class": "FilterRemover"}}, first=2),
            "cut removes channels in epoch 3, but few_bits quantizes from epoch 2",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(schedule, message):
    with pytest.raises(UserError, match=message):
        Training(schedule)


def test_a_network_that_is_quantized_already_is_refused():
    model = build(SPEC)
    WRPNQuantizer(bits_weights=4).prepare_model(model)
    with pytest.raises(UserError, match="few_bits: the network that the run began with is quantized already"):
        Training(only(DOREFA, first=2), model=model).loop.on_epoch_begin(0)


def test_kernel_positions_that_only_meet_padding_have_no_gradient():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    WRPNQuantizer(bits_weights=8).prepare_model(model)
    assert zero_idle_gradients_(model, torch.ones(1, 1, 1, 1)) == ["0"]
    model[0].image = lambda key: model[0].float_weight * 2 if key == "weight" else model[0].bias
    weight = model[0].used("weight")
    weight.sum().backward()  # as if garbage stood at all nine positions: only that of the centre is used on a map of 1 px
    assert model[0].float_weight.grad.flatten().tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert not deepcopy(model)[0].weight.requires_grad


def test_gradients_under_mixed_precision_reach_the_float_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    entry = {"kind": "layer", "bits_weights": 8, "bits_inputs": 8}
    prepare_(model, {"0": entry, "1": {"kind": "pact", "bits": 8}, "3": {**entry, "method": "dorefa"}})
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    assert all(bool(layer.float_weight.grad.any()) for layer in layers(model).values())


def test_a_quantized_network_is_not_cut(script, tmp_path):
    model = build(SPEC)
    WRPNQuantizer(bits_weights=4).prepare_model(model)
    spec = SPEC.with_(quantization=recipe_of(model))
    save_checkpoint(tmp_path / "few.pt", {"spec": spec.to_dict(), "plan": None, "state_dict": model.state_dict()})
    result = script("prune.py", "--weights", tmp_path / "few.pt", "--data", "digits", "--macs", 0.5)
    assert (result.code, "few.pt is quantized, so its channels can't be cut" in result.err) == (2, True)
