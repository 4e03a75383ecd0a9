from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compression.schedule.learning_rates import Plateau
from compression.schedule.loop import ScheduledLoop
from compression.schedule.policies import PruningOptions, fold_batchnorm
from compression.schedule.pruners.pruner import Decision
from utils.errors import UserError
from utils.loop.ema import EMA
from utils.measures.metrics import Evaluation

HALF = {"half": {"class": "SparsityLevelParameterPruner", "levels": {"weight": 0.5}}}
THRESHOLD = {"small": {"class": "MagnitudeParameterPruner", "thresholds": {"weight": 1.5}}}
SPLICE = {  # mean |w| of (1, 2, 3, 4) is 2.5: what is below 1.25 goes, what reaches 3.75 comes back
    "surgery": {
        "class": "SplicingPruner",
        "sensitivities": {"weight": 0.0},
        "low_thresh_mult": 0.5,
        "hi_thresh_mult": 1.5,
    }
}


def linear(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def policy(kind, name, window, **arguments):
    return {kind: {"instance_name": name, "args": arguments}, **window}


def from_to(start, end, frequency=1):
    return {"starting_epoch": start, "ending_epoch": end, "frequency": frequency}


def pruning(pruner, window, **arguments):
    return {"pruners": pruner, "policies": [policy("pruner", next(iter(pruner)), window, **arguments)]}


def loop_of(schedule, model, epochs=6, steps=2, lr=0.1, ema=None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    return ScheduledLoop(schedule, model, optimizer, epochs, steps, ema=ema, report=lambda _: None)


def push(loop, step, gradient=0.0):
    """One batch of a linear loss: every weight gets the same gradient."""
    model = loop.state.model
    inputs = torch.full((1, model.weight.shape[1]), gradient)
    loop.on_minibatch_begin(step, inputs, torch.zeros(1))
    outputs = model(inputs)
    loss = loop.before_backward_pass(outputs, outputs.sum())
    loop.state.optimizer.zero_grad()
    loss.backward()
    loop.before_parameter_optimization()
    loop.state.optimizer.step()
    if loop.state.ema:
        loop.state.ema.update_(model)
    loop.on_minibatch_end()
    return loss


def epoch(loop, number, gradient=0.0, steps=2):
    """One epoch; return the weights that a validation sees."""
    loop.on_epoch_begin(number)
    for step in range(steps):
        push(loop, step, gradient)
    seen = weights(loop)
    loop.on_epoch_end()
    return seen


def weights(loop):
    return loop.state.model.weight[0].tolist()


def mask(loop):
    held = loop.scheduler.masks.values.get("weight")
    return None if held is None else held[0].tolist()


def test_a_pruner_is_asked_in_its_epochs_and_its_mask_stays():
    loop = loop_of(pruning(THRESHOLD, from_to(1, 4, 2)), linear(1.0, 2.0, 3.0))
    assert epoch(loop, 0) == [1, 2, 3]
    assert epoch(loop, 1, gradient=5.0) == [0, 1, 2]  # two steps of 0.1 * 5
    assert epoch(loop, 2) == [0, 1, 2]  # not asked
    assert epoch(loop, 3) == [0, 0, 2]  # 1 <= 1.5
    for number in (4, 5):
        assert epoch(loop, number) == [0, 0, 2]


def test_a_list_of_epochs():
    loop = loop_of(pruning(THRESHOLD, {"epochs": [3, 1]}), linear(1.0, 2.0))
    assert [epoch(loop, number)[0] for number in range(4)] == [1, 0, 0, 0]


def test_double_copies_come_back_after_the_window():
    loop = loop_of(pruning(THRESHOLD, from_to(0, 4, 2), use_double_copies=True), linear(1.0, 2.0))
    for number in range(4):  # asked in 0 and 2, in force until 4
        assert epoch(loop, number, gradient=0.5) == [0, pytest.approx(2 - 0.1 * (number + 1))]
    loop.on_epoch_begin(4)
    assert weights(loop) == pytest.approx([0.6, 1.6])  # 8 steps of 0.1 * 0.5 each
    assert loop.scheduler.masks.values == {}


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_keep_mask_is_for_good_from_the_last_epoch_that_really_acts(frequency):
    loop = loop_of(pruning(THRESHOLD, from_to(0, 4, frequency), use_double_copies=True, keep_mask=True), linear(1.0, 2.0))
    last = {1: 3, 2: 2, 3: 3}[frequency]
    for number in range(6):
        assert epoch(loop, number, gradient=0.1)[0] == 0
        assert bool(loop.scheduler.masks.double) == (number < last)
    assert mask(loop) == [0, 1]


def test_keep_mask_is_kept_where_the_run_ends_within_the_window():
    loop = loop_of(pruning(THRESHOLD, from_to(0, 40), use_double_copies=True, keep_mask=True), linear(1.0, 2.0), epochs=2)
    epoch(loop, 0)
    assert loop.scheduler.masks.double
    epoch(loop, 1)
    assert not loop.scheduler.masks.double
    assert not loop.scheduler.masks.hidden


def test_splicing_by_hand():
    loop = loop_of(pruning(SPLICE, from_to(0, 6), use_double_copies=True), linear(1.0, 2.0, 3.0, 4.0), steps=1, lr=1.0)
    assert epoch(loop, 0, gradient=-2.0, steps=1) == [0, 4, 5, 6]  # 1 < 1.25 goes, and trains on unseen: 1 + 2
    assert epoch(loop, 1, gradient=-2.0, steps=1) == [0, 6, 7, 8]  # 3 lies between 1.25 and 3.75: the old mask stays
    loop.on_epoch_begin(2)
    assert weights(loop) == [5, 6, 7, 8]  # 5 >= 3.75 is back


def test_without_double_copies_a_weight_does_not_come_back():
    loop = loop_of(pruning(SPLICE, from_to(0, 6)), linear(1.0, 2.0, 3.0, 4.0), steps=1, lr=1.0)
    for number in range(3):
        assert epoch(loop, number, gradient=-2.0, steps=1)[0] == 0


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_validation_sees_masked_weights(forward_only, double):
    loop = loop_of(pruning(THRESHOLD, from_to(0, 2), mask_on_forward_only=forward_only, use_double_copies=double), linear(1.0, 2.0))
    assert epoch(loop, 0, gradient=-0.5)[0] == 0


def test_mask_gradients_keeps_what_is_hidden_as_it_is():
    arguments = {"use_double_copies": True, "mask_on_forward_only": True, "mask_gradients": True}
    loop = loop_of(pruning(THRESHOLD, from_to(0, 1), **arguments), linear(1.0, 2.0))
    epoch(loop, 0, gradient=5.0)
    loop.on_epoch_begin(1)
    assert weights(loop) == [1, 1]  # without mask_gradients 1 - 2 * 0.1 * 5 = 0 and 1
    with pytest.raises(UserError, match="mask_gradients needs mask_on_forward_only"):
        PruningOptions(mask_gradients=True)


def test_a_mask_may_last_for_one_batch():
    arguments = {"use_double_copies": True, "discard_masks_at_minibatch_end": True}
    loop = loop_of(pruning(THRESHOLD, from_to(0, 2), **arguments), linear(1.0, 2.0))
    loop.on_epoch_begin(0)
    assert weights(loop) == [0, 2]
    push(loop, 0, gradient=1.0)
    assert weights(loop) == pytest.approx([0.9, 1.9])
    assert mask(loop) is None
    push(loop, 1)
    assert weights(loop) == pytest.approx([0.9, 1.9])  # not asked again in this epoch
    loop.on_epoch_begin(1)
    assert weights(loop) == pytest.approx([0, 1.9])


def test_masks_for_one_batch_leave_the_moving_average_alone():
    # all weights train in every batch, so they are all averaged: 0.5 * (1, 2) + 0.5 * (0.9, 1.9)
    model = linear(1.0, 2.0)
    arguments = {"use_double_copies": True, "discard_masks_at_minibatch_end": True, "mini_batch_pruning_frequency": 1}
    loop = loop_of(pruning(THRESHOLD, from_to(0, 2), **arguments), model, ema=EMA(model, 0.5, 1e-9))
    loop.on_epoch_begin(0)
    push(loop, 0, gradient=1.0)
    assert loop.state.ema.model.weight[0].tolist() == pytest.approx([0.95, 1.95])


def test_dropped_filters_scale_the_others_up_for_one_batch():
    drop = {"class": "BernoulliFilterPruner", "group_type": "Filters", "desired_sparsity": 0.5, "weights": ["weight"]}
    model = nn.Conv2d(1, 4, 1, bias=False)
    nn.init.ones_(model.weight)
    arguments = {"use_double_copies": True, "discard_masks_at_minibatch_end": True, "mini_batch_pruning_frequency": 1}
    loop = loop_of(pruning({"drop": drop}, from_to(0, 1), **arguments), model)
    loop.on_epoch_begin(0)
    seen = set()
    for step in range(2):
        loop.on_minibatch_begin(step, torch.ones(1, 1, 1, 1), torch.zeros(1))
        held = model.weight.flatten().tolist()
        assert sum(held) == pytest.approx(4)  # those that stay are divided by their share
        seen.add(tuple(held))
        loop.before_parameter_optimization()
        loop.on_minibatch_end()
        assert model.weight.flatten().tolist() == [1, 1, 1, 1]
    assert len(seen) == 2  # drawn anew
    refused = loop_of(pruning({"drop": drop}, from_to(0, 1)), model)
    with pytest.raises(UserError, match="use_double_copies: true"):
        refused.on_epoch_begin(0)


@pytest.mark.parametrize("double", [False, True])
def test_weights_that_a_pruner_refits_are_taken_up_before_its_masks(double):
    model = linear(1.0, 2.0)
    loop = loop_of(pruning(THRESHOLD, {"epochs": [0]}, use_double_copies=double), model, ema=EMA(model, 0.5, 1e-9))
    refitted = Decision({"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[7.0, 9.0]])})
    loop.scheduler.policies[0].pruner.decide = lambda task: refitted
    loop.on_epoch_begin(0)
    assert weights(loop) == [7, 0]
    assert loop.scheduler.masks.full("weight", model.weight)[0].tolist() == ([7, 9] if double else [7, 0])
    push(loop, 0)
    assert loop.state.ema.model.weight[0].tolist() == [7, 0]
    loop.on_epoch_begin(1)
    assert weights(loop) == ([7, 9] if double else [7, 0])


def asked_at(loop, epochs, steps):
    """Return the (epoch, step) at whose beginning the pruner was asked."""
    found = []
    pruner = loop.scheduler.policies[0].pruner
    decide = pruner.decide
    pruner.decide = lambda task: (found.append((loop.state.epoch, loop.state.step)), decide(task))[1]
    for number in range(epochs):
        epoch(loop, number, steps=steps)
    return found


def test_a_pruner_can_be_asked_every_so_many_batches():
    loop = loop_of(pruning(HALF, from_to(0, 2), mini_batch_pruning_frequency=2), linear(1.0, 2.0), steps=3)
    # batches are counted over all epochs: 0 1 2 | 3 4 5; 0 and 3 begin an epoch, 2 and 4 are multiples of 2
    assert asked_at(loop, 3, 3) == [(0, 0), (0, 2), (1, 0), (1, 1)]


def test_the_first_batch_can_be_skipped():
    loop = loop_of(pruning(HALF, from_to(1, 3), skip_first_minibatch=True), linear(1.0, 2.0), steps=3)
    assert asked_at(loop, 4, 3) == [(1, 1), (2, 0)]


def test_the_only_batch_of_an_epoch_is_not_skipped():
    loop = loop_of(pruning(HALF, from_to(0, 1), skip_first_minibatch=True), linear(1.0, 2.0), steps=1)
    assert asked_at(loop, 2, 1) == [(0, 0)]


def test_levels_of_a_policy_replace_the_pruners_own_for_this_policy_alone():
    schedule = pruning(HALF, {"epochs": [0]}, levels={"weight": 0.25})
    schedule["policies"].append(policy("pruner", "half", {"epochs": [1]}))
    loop = loop_of(schedule, linear(1.0, 2.0, 3.0, 4.0))
    assert epoch(loop, 0) == [0, 2, 3, 4]
    assert epoch(loop, 1) == [0, 0, 3, 4]
    with pytest.raises(UserError, match="MagnitudeParameterPruner has no levels"):
        loop_of(pruning(THRESHOLD, {"epochs": [0]}, levels={"weight": 0.25}), linear(1.0, 2.0))


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0), nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


def test_fold_batchnorm_by_hand():
    model = Folded()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([3.0, 2.0]).view(2, 1, 1, 1))
        model.norm.weight.copy_(torch.tensor([1.0, 6.0]))
        model.norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    names = ("conv.weight", "last.weight")
    found = fold_batchnorm(model, {name: p.detach() for name, p in model.named_parameters()}, names)
    assert {name: w.flatten().tolist() for name, w in found.items()} == {"conv.weight": [1.5, 4.0]}  # 3 * 1 / 2, 2 * 6 / 3
    for folds, expected in ((False, [3.0, 0.0]), (True, [0.0, 2.0])):  # the lower one goes; the weight itself is not folded
        ranked = {"class": "L1RankedStructureParameterPruner", "group_type": "Filters", "desired_sparsity": 0.5, "weights": names[:1]}
        pruned = copy.deepcopy(model)
        loop = loop_of(pruning({"ranked": {**ranked, "weights": ["conv.weight"]}}, {"epochs": [0]}, fold_batchnorm=folds), pruned)
        loop.on_epoch_begin(0)
        assert pruned.conv.weight.flatten().tolist() == expected


@pytest.mark.parametrize("double", [False, True])
def test_gradients_that_add_up_over_two_batches(double):
    loop = loop_of(pruning(THRESHOLD, from_to(0, 1), use_double_copies=double), linear(1.0, 2.0), steps=4)
    model, optimizer = loop.state.model, loop.state.optimizer
    loop.on_epoch_begin(0)
    for step in range(4):
        inputs = torch.full((1, 2), 0.5)
        loop.on_minibatch_begin(step, inputs, torch.zeros(1))
        loss = loop.before_backward_pass(model(inputs), model(inputs).sum())
        loss.backward()
        if step % 2:
            loop.before_parameter_optimization()
            optimizer.step()
            optimizer.zero_grad()
        loop.on_minibatch_end()
        assert weights(loop)[0] == 0
    assert weights(loop)[1] == pytest.approx(1.8)  # 2 - 2 steps * 0.1 * 2 batches * 0.5
    loop.on_epoch_begin(1)
    assert weights(loop)[0] == pytest.approx(0.8 if double else 0.0)


def test_under_bf16_the_mask_holds_in_float32():
    model = linear(1.0, 2.0)
    loop = loop_of(pruning(THRESHOLD, from_to(0, 1)), model)
    loop.on_epoch_begin(0)
    for step in range(2):
        inputs = torch.ones(1, 2)
        loop.on_minibatch_begin(step, inputs, torch.zeros(1))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        assert outputs.dtype == torch.bfloat16
        loop.before_backward_pass(outputs, outputs.float().sum()).backward()
        loop.before_parameter_optimization()
        loop.state.optimizer.step()
        loop.state.optimizer.zero_grad()
        loop.on_minibatch_end()
    assert weights(loop) == [0.0, pytest.approx(1.8)]
    assert loop.scheduler.masks.values["weight"].dtype == torch.float32


def regularizing(window, keep=False, criteria=None, strength=0.5):
    l1 = {"class": "L1Regularizer", "reg_regims": {"weight": strength}, "threshold_criteria": criteria}
    return {"regularizers": {"l1": l1}, "policies": [policy("regularizer", "l1", window, keep_mask=keep)]}


def test_a_regularizers_loss_by_hand():
    loop = loop_of(regularizing(from_to(0, 1)), linear(1.0, -2.0), steps=1)
    loop.on_epoch_begin(0)
    loss = push(loop, 0, gradient=3.0)  # 3 * (1 - 2) + 0.5 * (1 + 2)
    assert loss.item() == pytest.approx(-1.5)
    parts = {name: part.item() for name, part in loop.state.loss_parts.items()}
    assert parts == {"classification": pytest.approx(-3.0), "l1": pytest.approx(1.5)}
    assert weights(loop) == pytest.approx([0.65, -2.25])  # 1 - 0.1 * (3 + 0.5), -2 - 0.1 * (3 - 0.5)
    loop.on_epoch_begin(1)
    assert push(loop, 0, gradient=1.0).item() == pytest.approx(-1.6)  # its window is over
    assert set(loop.state.loss_parts) == {"classification"}


@pytest.mark.parametrize("keep", [False, True])
def test_a_threshold_zeroes_after_every_step_and_for_good_where_it_is_kept(keep):
    model = linear(0.4, 9.0)
    loop = loop_of(regularizing(from_to(0, 4, 3), keep, "Max"), model, lr=1.0, ema=EMA(model, 0.5, 1e-9))
    for number in (0, 1, 2, 3):
        seen = epoch(loop, number, gradient=0.1)
        averaged = loop.state.ema.model.weight[0].tolist()
        if number in (0, 3):
            assert seen[0] == 0
            assert averaged[0] == 0
        else:  # out of its epochs nothing holds it: two steps of -0.1
            assert seen[0] < 0
        assert averaged[1] > 0
    assert epoch(loop, 4, gradient=0.1)[0] == (0 if keep else pytest.approx(-0.2))
    assert mask(loop) == ([0, 1] if keep else None)
    assert loop.scheduler.policies[0].target_epoch(9) == (3 if keep else -1)


def test_a_threshold_is_kept_where_the_run_ends_within_the_window():
    loop = loop_of(regularizing(from_to(0, 40), True, "Max"), linear(0.4, 2.0), epochs=1)
    epoch(loop, 0)
    assert mask(loop) == [0, 1]


RATES = {
    # ExponentialLR(0.5) of 0.8 in epoch e is 0.8 * 0.5^e, from whichever epoch on it acts
    "late": ({"class": "ExponentialLR", "gamma": 0.5}, from_to(2, 4), [0.8, 0.8, 0.8, 0.1, 0.05, 0.05]),
    "every second": ({"class": "ExponentialLR", "gamma": 0.5}, from_to(0, 6, 2), [0.8, 0.4, 0.4, 0.1, 0.1, 0.025]),
    "steps": ({"class": "MultiStepMultiGammaLR", "milestones": [1, 3], "gammas": [0.5, 0.1]}, from_to(0, 9), [0.8, 0.4, 0.4] + 3 * [0.04]),
    # a warm-up begins below the initial rate: 1/4, then a quarter more in each of three epochs
    "warm-up": ({"class": "LinearLR", "start_factor": 0.25, "total_iters": 3}, from_to(0, 6), [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]),
    # without an end it acts to the run's end
    "endless": ({"class": "StepLR", "step_size": 2, "gamma": 0.1}, {"starting_epoch": 0}, [0.8, 0.8, 0.08, 0.08, 0.008, 0.008]),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_a_closed_form_of_the_epoch(name):
    described, window, expected = RATES[name]
    loop = loop_of({"lr_schedulers": {"lr": described}, "policies": [policy("lr_scheduler", "lr", window)]}, linear(1.0), lr=0.8)
    found = []
    for number in range(6):
        loop.on_epoch_begin(number)
        found.append(loop.state.optimizer.param_groups[0]["lr"])
        loop.on_epoch_end()
    assert found == pytest.approx(expected)


def test_groups_keep_their_own_initial_rates():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}])
    schedule = {
        "lr_schedulers": {"lr": {"class": "ExponentialLR", "gamma": 0.5}},
        "policies": [policy("lr_scheduler", "lr", from_to(0, 9))],
    }
    loop = loop_of(schedule, model, optimizer=optimizer)
    loop.on_epoch_begin(0)
    loop.on_epoch_end()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def measured(loss, top1=0.5):
    return Evaluation(top1, 1.0, loss, 4, torch.zeros(2, 2))


def plateau(lr=1.0):
    described = {"class": "ReduceLROnPlateau", "factor": 0.1, "patience": 1}
    schedule = {"lr_schedulers": {"lr": described}, "policies": [policy("lr_scheduler", "lr", from_to(0, 9))]}
    return loop_of(schedule, linear(1.0), lr=lr)


def test_a_plateau_lowers_the_rate_and_goes_on_after_a_restart():
    losses = [2.0, 2.0, 2.0, 2.0, 2.0]  # the best in epoch 0; the second in a row without a better one lowers
    whole, first, second = plateau(), plateau(), plateau()
    rates = []
    for number, loss in enumerate(losses):
        for loop in (whole, first) if number < 2 else (whole, second):
            loop.on_epoch_begin(number)
            loop.on_epoch_end(measured(loss))
        if number == 1:
            second.load_state_dict(first.state_dict())
            second.state.optimizer.load_state_dict(first.state.optimizer.state_dict())
        elif number > 1:
            assert second.state.optimizer.param_groups[0]["lr"] == whole.state.optimizer.param_groups[0]["lr"]
        rates.append(whole.state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert isinstance(whole.scheduler.policies[0].rates, Plateau)
    fresh = plateau()
    fresh.on_epoch_begin(0)
    with pytest.raises(UserError, match="needs the validation's figures"):
        fresh.on_epoch_end()


def test_a_restart_goes_on_with_the_first_deviations_and_what_is_hidden():
    sensitivity = {"spread": {"class": "SensitivityPruner", "sensitivities": {"weight": 1.0}}}
    schedule = pruning(sensitivity, from_to(0, 6, 2), use_double_copies=True)
    values = (3.0, -3.0, 1.25, -1.25)  # their deviation is 2.65; that of what is left would be 3.46
    whole, first, second = (loop_of(schedule, linear(*values)) for _ in range(3))
    for number in range(2):
        epoch(first, number, gradient=0.3)
    state = copy.deepcopy((first.state_dict(), first.state.model.state_dict(), first.state.optimizer.state_dict()))
    second.load_state_dict(state[0])
    second.state.model.load_state_dict(state[1])
    second.state.optimizer.load_state_dict(state[2])
    for number in range(6):
        epoch(whole, number, gradient=0.3)
        if number > 1:
            epoch(second, number, gradient=0.3)
            assert weights(second) == weights(whole)
            assert mask(second) == mask(whole)
    for loop in (whole, second):
        loop.on_epoch_begin(6)
    assert weights(second) == weights(whole) == pytest.approx([2.64, -3.36, 0.89, -1.61])  # 12 steps of -0.03
    deviation = whole.scheduler.policies[0].pruner.state_dict()["deviations"]["weight"]
    assert deviation.item() == pytest.approx(2.6536, abs=1e-4)  # sqrt((9 + 9 + 1.5625 + 1.5625) / 3)


def test_a_restart_refuses_another_schedule():
    first, other = loop_of(pruning(HALF, from_to(0, 2)), linear(1.0, 2.0)), loop_of(pruning(THRESHOLD, from_to(0, 2)), linear(1.0, 2.0))
    with pytest.raises(UserError, match="has the policies half, the file now has small"):
        other.load_state_dict(first.state_dict())


def test_a_pruner_that_does_not_fit_is_refused_before_anything_is_trained():
    odd = {
        "class": "L1RankedStructureParameterPruner",
        "group_type": "Rows",
        "desired_sparsity": 0.5,
        "weights": ["weight"],
        "group_size": 2,
    }
    with pytest.raises(UserError, match=r"odd: weight has 3 structures .* no multiple of group_size 2"):
        loop_of(pruning({"odd": odd}, from_to(0, 1)), linear(1.0, 2.0, 3.0))


def test_options_are_read_from_the_file():
    with pytest.raises(UserError, match=r"policies\[0\].pruner.args: unknown argument 'keepmask'. Did you mean 'keep_mask'"):
        loop_of(pruning(HALF, from_to(0, 1), keepmask=True), linear(1.0, 2.0))
