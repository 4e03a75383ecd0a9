from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from compression.schedule.masks import Masks
from utils.loop.ema import EMA
from utils.loop.hooks import LoopState

MASK = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, Nesterov, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=0),
}
NOT_MOMENTUM = ("step", "eta", "mu", "exp_inf", "step_size")  # Adamax's divisor and Rprop's steps have a least value above 0
if hasattr(torch.optim, "Muon"):  # it mixes all elements of a matrix, so that even those without a gradient move
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.1)


def linear(values=((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))):
    model = nn.Linear(len(values[0]), len(values), bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values))
    return model


def running(model, optimizer=None, ema=False):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    average = EMA(model, decay=0.5, ramp=1e-9) if ema else None  # the decay is 0.5 from the first update on
    return LoopState(model=model, optimizer=optimizer, epochs=9, steps_per_epoch=3, ema=average)


def backward(run, target=1.0):
    """One batch of a squared error whose gradient is zero nowhere."""
    inputs = torch.tensor([[1.0, -1.0, 2.0, 0.5], [0.3, 1.0, -1.0, 1.5]])
    ((run.model(inputs) - target) ** 2).sum().backward()


def step(run, masks):
    run.optimizer.zero_grad()
    backward(run)
    masks.before_step_(run)
    run.optimizer.step()
    if run.ema:
        run.ema.update_(run.model)
    masks.after_step_(run)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_mask_holds_on_weights_average_and_momentum(name):
    model = linear()
    run, masks = running(model, OPTIMIZERS[name](model.parameters()), ema=True), Masks()
    for _ in range(2):
        step(run, masks)  # so that there is momentum behind the mask
    masks.set_(run, {"weight": MASK})
    gradients = []
    run.optimizer.register_step_pre_hook(lambda *_: gradients.append(model.weight.grad.clone()))
    before = model.weight.detach().clone()
    for _ in range(4):
        step(run, masks)
        gone = MASK == 0
        state = run.optimizer.state[model.weight]
        moments = [value for key, value in state.items() if key not in NOT_MOMENTUM and value.shape == MASK.shape]
        assert moments
        for tensor in (model.weight, run.ema.model.weight, gradients[-1], *moments):
            assert (tensor[gone] == 0).all()
    assert (gradients[0][MASK == 1] != 0).all()
    assert (model.weight[MASK == 1] != before[MASK == 1]).all()
    assert (run.ema.model.weight[MASK == 1] != 0).all()


def test_without_the_momentum_masked_a_step_would_move_the_weight():
    # the control of the test above: the optimizer alone moves a masked weight by its momentum
    model = linear()
    run = running(model, OPTIMIZERS["SGD"](model.parameters()))
    step(run, Masks())
    with torch.no_grad():
        model.weight.mul_(MASK)
    model.weight.grad.zero_()
    run.optimizer.step()
    assert (model.weight[MASK == 0] != 0).all()


def test_a_plain_step_by_hand():
    # loss = (w . x)^2 / 2, x = (1, 2): gradient (w . x) x; w = (1, 1), the mask takes the second: w . x = 1, gradient (1, 2)
    model = linear([[1.0, 1.0]])
    run, masks = running(model), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])})
    assert model.weight.tolist() == [[1.0, 0.0]]
    (model(torch.tensor([1.0, 2.0])) ** 2 / 2).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 2.0]]
    masks.before_step_(run)
    assert model.weight.grad.tolist() == [[1.0, 0.0]]
    run.optimizer.step()  # 1 - 0.5 * 1
    masks.after_step_(run)
    assert model.weight.tolist() == [[0.5, 0.0]]


def test_a_double_mask_trains_what_it_hides_by_hand():
    model = linear([[1.0, 1.0]])
    run, masks = running(model, ema=True), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    assert model.weight.tolist() == [[1.0, 0.0]]  # what the forward pass sees
    assert masks.full("weight", model.weight).tolist() == [[1.0, 1.0]]
    (model(torch.tensor([1.0, 2.0])) ** 2 / 2).sum().backward()
    masks.before_step_(run)
    assert model.weight.tolist() == [[1.0, 1.0]]  # what the optimizer sees
    assert model.weight.grad.tolist() == [[1.0, 2.0]]
    run.optimizer.step()  # (1, 1) - 0.5 * (1, 2)
    run.ema.update_(model)  # 0.5 * (1, 1) + 0.5 * (0.5, 0)
    masks.after_step_(run)
    assert model.weight.tolist() == [[0.5, 0.0]]
    assert masks.full("weight", model.weight).tolist() == [[0.5, 0.0]]
    assert run.ema.model.weight.tolist() == [[0.75, 0.0]]
    masks.release_(run, ["weight"])
    assert model.weight.tolist() == [[0.5, 0.0]]  # 1 - 0.5 * 2
    assert masks.state_dict() == {"values": {}, "hidden": {}, "double": [], "masks_gradients": []}


def test_mask_gradients_lets_only_kept_weights_train():
    model = linear([[1.0, 1.0]])
    run, masks = running(model), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True, mask_gradients=True)
    (model(torch.tensor([1.0, 2.0])) ** 2 / 2).sum().backward()
    masks.before_step_(run)
    run.optimizer.step()
    masks.after_step_(run)
    assert model.weight.tolist() == [[0.5, 0.0]]
    masks.release_(run, ["weight"])
    assert model.weight.tolist() == [[0.5, 1.0]]  # it comes back as it was


def test_what_is_spliced_in_again_has_its_value_and_so_has_its_average():
    model = linear([[1.0, 3.0]])
    run, masks = running(model, ema=True), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    masks.after_step_(run)
    assert run.ema.model.weight.tolist() == [[1.0, 0.0]]
    masks.set_(run, {"weight": torch.tensor([[0.0, 1.0]])}, double=True)
    assert model.weight.tolist() == [[0.0, 3.0]]
    assert run.ema.model.weight.tolist() == [[1.0, 3.0]]
    masks.after_step_(run)
    assert run.ema.model.weight.tolist() == [[0.0, 3.0]]


def test_kept_masks_are_for_good():
    model = linear([[1.0, 3.0]])
    run, masks = running(model, OPTIMIZERS["SGD"](model.parameters()), ema=True), Masks()
    (model(torch.tensor([1.0, 2.0])) ** 2 / 2).sum().backward()
    run.optimizer.step()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    masks.keep_(run, ["weight", "another"])
    assert masks.hidden == {}
    assert masks.double == set()
    momentum = run.optimizer.state[model.weight]["momentum_buffer"]
    for tensor in (model.weight, run.ema.model.weight, momentum):
        assert tensor[0, 1] == 0
        assert tensor[0, 0] != 0
    before = model.weight.detach().clone()
    masks.release_(run, ["weight"])  # nothing is hidden any more
    assert torch.equal(model.weight, before)
    assert masks.values["weight"].tolist() == [[1, 0]]


def test_a_mask_with_a_factor_is_applied_once_however_long_it_lasts():
    # a kept weight of DropFilter is divided by the share of those that stay: 1 / 0.5
    model = linear([[1.0, 3.0]])
    run, masks = running(model, ema=True), Masks()
    masks.set_(run, {"weight": torch.tensor([[2.0, 0.0]])}, double=True)
    for _ in range(3):
        model.zero_grad()
        masks.before_step_(run)
        run.ema.update_(run.model)
        masks.after_step_(run)
        assert model.weight.tolist() == [[2.0, 0.0]]
        assert run.ema.model.weight.tolist() == [[1.0, 0.0]]
    masks.keep_(run, ["weight"])
    masks.after_step_(run)
    assert model.weight.tolist() == [[2.0, 0.0]]
    assert masks.values["weight"].tolist() == [[1.0, 0.0]]


def test_a_plain_mask_takes_over_from_a_double_one_the_values_behind_it():
    model = linear([[1.0, 3.0, 5.0]])
    run, masks = running(model), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0, 0.0]])}, double=True)
    masks.set_(run, {"weight": torch.tensor([[0.0, 1.0, 0.0]])})
    assert model.weight.tolist() == [[0.0, 3.0, 0.0]]
    assert masks.hidden == {}


def test_new_values_reach_what_is_hidden_and_averaged():
    model = linear([[1.0, 3.0]])
    run, masks = running(model, ema=True), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    masks.rewrite_(run, {"weight": torch.tensor([[7.0, 9.0]])})
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    assert model.weight.tolist() == [[7.0, 0.0]]
    assert masks.full("weight", model.weight).tolist() == [[7.0, 9.0]]
    assert run.ema.model.weight.tolist() == [[7.0, 9.0]]  # until the next step


def test_while_gradients_add_up_the_forward_pass_sees_masked_weights():
    model = linear([[1.0, 1.0]])
    run, masks = running(model), Masks()
    masks.set_(run, {"weight": torch.tensor([[1.0, 0.0]])}, double=True)
    x = torch.tensor([1.0, 2.0])
    (model(x) ** 2 / 2).sum().backward()
    masks.after_step_(run)  # no step: the group of batches goes on
    assert model.weight.tolist() == [[1.0, 0.0]]
    (model(x) ** 2 / 2).sum().backward()
    masks.before_step_(run)
    run.optimizer.step()  # (1, 1) - 0.5 * 2 * (1, 2)
    masks.after_step_(run)
    assert model.weight.tolist() == [[0.0, 0.0]]
    assert masks.full("weight", model.weight).tolist() == [[0.0, -1.0]]


def test_parameters_without_gradient_or_state_do_not_matter():
    model = linear()
    model.weight.requires_grad_(False)
    extra = nn.Parameter(torch.ones(1))
    run, masks = running(model, torch.optim.Adam([extra], lr=0.1)), Masks()
    masks.set_(run, {"weight": MASK})
    masks.before_step_(run)
    masks.after_step_(run)
    assert torch.equal(model.weight, linear().weight * MASK)


@pytest.mark.parametrize("double", [False, True])
def test_a_state_that_is_loaded_goes_on_identically(double):
    model = linear()
    run, masks = running(model, OPTIMIZERS["SGD"](model.parameters())), Masks()
    masks.set_(run, {"weight": MASK}, double=double, mask_gradients=double)
    step(run, masks)
    other = linear()
    again, fresh = running(other, OPTIMIZERS["SGD"](other.parameters())), Masks()
    state = deepcopy(masks.state_dict())
    assert state["values"]["weight"].dtype == torch.bool
    fresh.load_state_dict(state, other)
    other.load_state_dict(model.state_dict())
    again.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
    for _ in range(3):
        step(run, masks)
        step(again, fresh)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(fresh.full("weight", other.weight), masks.full("weight", model.weight))
    assert fresh.state_dict()["double"] == (["weight"] if double else [])


def test_factors_survive_a_restart():
    run, masks = running(linear([[1.0, 3.0]])), Masks()
    masks.set_(run, {"weight": torch.tensor([[2.0, 0.0]])}, double=True)
    fresh = Masks()
    fresh.load_state_dict(masks.state_dict(), run.model)
    assert fresh.values["weight"].tolist() == [[2.0, 0.0]]
