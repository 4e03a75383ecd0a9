import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.loop.ema import EMA
from utils.loop.norms import FrozenNorms, NormWarmup
from utils.loop.optim import OPTIMIZERS, LearningRate, make_optimizer


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.LayerNorm(5), nn.Linear(4, 2)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_are_biases_weights_and_norms(name):
    model = network()
    optimizer = make_optimizer(model, name, lr0=0.01, momentum=0.8, decay=5e-4)
    groups = {group["name"]: group for group in optimizer.param_groups}
    # biases of conv 0, norms 1, 3, 4 and linear 5; weights of convs 0, 2 and linear 5; weights of norms 1, 3, 4
    expected = {"biases": ["0.bias", "1.bias", "3.bias", "4.bias", "5.bias"], "weights": ["0.weight", "2.weight", "5.weight"]}
    expected["norms"] = ["1.weight", "3.weight", "4.weight"]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    assert {key: sorted(names[id(p)] for p in group["params"]) for key, group in groups.items()} == expected
    assert {key: group["weight_decay"] for key, group in groups.items()} == {"biases": 0.0, "weights": 5e-4, "norms": 0.0}
    assert all(group["lr"] == 0.01 for group in groups.values())
    assert groups["weights"].get("momentum", groups["weights"].get("betas", (None,))[0]) == 0.8


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_optimizer_steps_downhill(name, momentum):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    optimizer = make_optimizer(model, name, 0.05, momentum, 0.0)
    for _ in range(5):
        optimizer.zero_grad()
        model.weight.square().sum().backward()
        optimizer.step()
    assert abs(model.weight.item()) < 1.97


def test_sgd_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = make_optimizer(model, "SGD", 0.1, 0.9, 0.5)
    # gradient g = 2 + decay 0.5 * w; nesterov: v = 0.9 * v + g, w = w - 0.1 * (g + 0.9 * v)
    # g = 2.5, v = 2.5: w = 1 - 0.1 * (2.5 + 2.25) = 0.525
    # g = 2.2625, v = 2.25 + 2.2625 = 4.5125: w = 0.525 - 0.1 * (2.2625 + 4.06125) = -0.107375
    for expected in (0.525, -0.107375):
        optimizer.zero_grad()
        (2 * model.weight).sum().backward()
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    kept = [parameter for group in make_optimizer(model, "SGD", 0.1, 0.9, 0.0).param_groups for parameter in group["params"]]
    assert len(kept) == 9  # of 11
    assert not any(parameter is model[0].weight or parameter is model[0].bias for parameter in kept)
    with pytest.raises(UserError, match="every parameter is frozen"):
        make_optimizer(model.requires_grad_(False), "SGD", 0.1, 0.9, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "SDG"}, r"optimizer 'SDG'.*Valid: SGD, Adam, AdamW, Muon, RMSProp"),
        ({"lr0": 0.0}, "lr0 0.0 must be above 0"),
        ({"lr0": math.nan}, "lr0 nan must be above 0"),
        ({"momentum": 1.0}, r"momentum 1.0 in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum -0.1 in \[0, 1\)"),
        ({"decay": -1.0}, "decay -1.0 at least 0"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(network(), **{"name": "SGD", "lr0": 0.1, "momentum": 0.9, "decay": 0.0, **change})


@pytest.mark.parametrize("written", ["sgd", "adamw", "ADAM", "rmsprop", "RMSprop"])
def test_optimizer_in_other_letters_is_told_the_right_spelling(written):
    right = {name.lower(): name for name in OPTIMIZERS}[written.lower()]
    with pytest.raises(UserError, match=f"Did you mean '{right}'"):
        make_optimizer(network(), written, 0.1, 0.9, 0.0)


@pytest.mark.parametrize(
    ("cosine", "progress", "expected"),
    [
        # lr0 0.1, lrf 0.2, 10 epochs, warm-up 2: 0.1 * (0.2 + 0.8 * fall) * min(progress / 2, 1)
        (False, 0, 0.0),
        (False, 1, 0.046),  # fall 0.9: 0.092, half warmed up
        (False, 2, 0.084),  # fall 0.8
        (False, 5, 0.06),  # fall 0.5
        (False, 10, 0.02),
        (False, 12, 0.02),
        (True, 0, 0.0),
        (True, 2.5, 0.08828427),  # fall (1 + sqrt(1/2)) / 2 = 0.85355339
        (True, 5, 0.06),
        (True, 10, 0.02),
    ],
)
def test_learning_rate_by_hand(cosine, progress, expected):
    assert LearningRate(0.1, 0.2, 10, 2.0, cosine).at(progress) == pytest.approx(expected, abs=1e-8)


def test_short_run_warms_up_over_half_of_it_and_no_warmup_starts_at_lr0():
    assert LearningRate(1.0, 1.0, 2, 3.0, False).at(0.5) == 0.5  # warm-up of one epoch, not of three
    assert LearningRate(1.0, 1.0, 2, 3.0, False).at(1.0) == 1.0
    assert LearningRate(0.3, 0.1, 10, 0.0, True).at(0.0) == 0.3


def test_learning_rate_reaches_every_group_by_its_scale():
    optimizer = make_optimizer(network(), "SGD", 0.1, 0.9, 0.0)
    optimizer.param_groups[1]["lr_scale"] = 0.5
    assert LearningRate(0.2, 0.0, 4, 0.0, False).apply_(optimizer, 1) == pytest.approx(0.15)  # 0.2 * (1 - 1/4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.15, 0.075, 0.15])


@pytest.mark.parametrize(
    ("lrf", "warmup", "words"), [(1.5, 0, "lrf is 1.5.*0, 1"), (-0.1, 0, "lrf is -0.1"), (0.1, -1, "warmup-epochs is -1")]
)
def test_wrong_learning_rate_settings_are_named(lrf, warmup, words):
    with pytest.raises(UserError, match=words):
        LearningRate(0.1, lrf, 10, warmup, True)


def test_average_by_hand():
    model = nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.5, ramp=1 / math.log(2))  # d = 0.5 * (1 - 2^-n): 1/4, 3/8
    model.weight.data.fill_(5.0)
    model.running_var.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    ema.update_(model)
    # from 1: 1/4 * 1 + 3/4 * 5 = 4; 1/4 * 1 + 3/4 * 3 = 2.5
    assert (ema.model.weight.item(), float(ema.model.running_var), int(ema.model.num_batches_tracked)) == (4.0, 2.5, 7)
    model.weight.data.fill_(0.0)
    ema.update_(model)
    assert ema.model.weight.item() == pytest.approx(1.5)  # 3/8 * 4
    assert model.weight.item() == 0.0
    assert ema.state_dict() == {"updates": 2}


def test_average_has_yolov5s_decay_and_goes_on_from_its_count():
    model = nn.Linear(1, 1)
    ema = EMA(model)
    ema.load_state_dict({"updates": 1999})
    ema.model.weight.fill_(1.0)
    model.weight.data.fill_(0.0)
    ema.update_(model)
    assert ema.model.weight.item() == pytest.approx(0.6320573, abs=1e-5)  # 0.9999 * (1 - 1/e)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_frozen_norms_keep_their_statistics():
    model = network().train()
    FrozenNorms([model[1]]).on_epoch_begin(None)
    assert [module.training for module in model] == [True, False, True, True, True, True]


def test_norm_warmup_averages_the_last_fifth_of_the_steps_until_the_own_momentum_takes_over():
    norm, draw = nn.BatchNorm1d(1, momentum=0.5), torch.Generator().manual_seed(0)
    hook = NormWarmup(nn.Sequential(norm, nn.BatchNorm1d(1, momentum=None)))
    expected = 0.0
    for step, momentum in enumerate([1.0, 5 / 6, 5 / 7, 5 / 8, 5 / 9, *[0.5] * 3]):
        hook.on_minibatch_begin(SimpleNamespace(epoch=step // 3, steps_per_epoch=3, step=step % 3))
        assert norm.momentum == pytest.approx(momentum)
        batch = torch.rand(8, 1, generator=draw)
        expected = (1 - momentum) * expected + momentum * float(batch.mean())
        norm(batch)
        assert float(norm.running_mean) == pytest.approx(expected, abs=1e-5)


def test_norm_warmup_does_not_start_again_in_a_resumed_run():
    norm = nn.BatchNorm1d(1, momentum=0.03)
    NormWarmup(norm).on_minibatch_begin(SimpleNamespace(epoch=6, steps_per_epoch=30, step=0))
    assert norm.momentum == 0.03  # 5 / 185 is less
