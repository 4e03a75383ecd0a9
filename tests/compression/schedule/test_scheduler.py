from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from compression.schedule.loop import ScheduledLoop
from compression.schedule.policies import agreed
from compression.schedule.policy import Policy
from compression.schedule.pruners.pruner import Decision
from compression.schedule.reading import parse_schedule
from compression.schedule.scheduler import CompressionScheduler
from models.networks import build
from tests.launch import Launch
from utils import distributed
from utils.errors import UserError
from utils.loop.ema import EMA
from utils.loop.hooks import LoopState
from utils.spec import ModelSpec


def linear(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def magnitude(threshold):
    return {"class": "MagnitudeParameterPruner", "thresholds": {"weight": threshold}}


def act(kind, name, start, end, frequency=1, **arguments):
    window = {"starting_epoch": start, "ending_epoch": end, "frequency": frequency}
    return {kind: {"instance_name": name, "args": arguments}, **window}


def loop_of(content, model, epochs=10, **more):
    lines = []
    loop = ScheduledLoop(content, model, torch.optim.SGD(model.parameters(), lr=1.0), epochs, 1, report=lines.append, **more)
    loop.lines = lines
    return loop


def test_policies_act_in_the_order_of_the_file_and_learning_rates_come_last():
    third = {"class": "SparsityLevelParameterPruner", "levels": {"weight": 0.34}}
    content = {
        "pruners": {"third": third, "high": magnitude(2.5)},
        "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {"weight": 0.5}}},
        "lr_schedulers": {"lr": {"class": "StepLR", "step_size": 1}},
        "policies": [
            act("lr_scheduler", "lr", 0, 9),
            act("pruner", "high", 0, 1),
            act("regularizer", "l1", 0, 1),
            act("pruner", "third", 0, 1),
        ],
    }
    loop = loop_of(content, linear(1.0, 2.0, 3.0))
    assert [policy.name for policy in loop.scheduler.policies] == ["high", "l1", "third", "lr"]
    loop.on_epoch_begin(0)
    # "high" leaves 3; "third" then masks one of the three. In the other order "high" would be asked last: (0, 0, 1).
    assert loop.state.model.weight[0].tolist() == [0, 0, 3]
    assert loop.scheduler.masks.values["weight"][0].tolist() == [0, 1, 1]


class Recorder(Policy):
    def __init__(self, policy, calls):
        self.policy, self.calls, self.name, self.window = policy, calls, policy.name, policy.window

    def __getattribute__(self, name):
        get = super().__getattribute__
        if name.startswith(("on_", "before_")):
            return lambda run: get("calls").append((get("name"), name, run.epoch))
        return get(name)


CALLS = (
    "on_epoch_begin",
    "on_minibatch_begin",
    "before_backward_pass",
    "before_parameter_optimization",
    "on_minibatch_end",
    "on_epoch_end",
)


def test_hooks_are_called_in_the_windows_only():
    content = {
        "pruners": {"one": magnitude(0.1), "two": magnitude(0.1)},
        "policies": [act("pruner", "one", 1, 6, 3), act("pruner", "two", 4, 5)],
    }
    loop = loop_of(content, linear(1.0))
    calls = []
    loop.scheduler.policies = [Recorder(policy, calls) for policy in loop.scheduler.policies]
    for epoch in range(7):
        loop.on_epoch_begin(epoch)
        loop.on_minibatch_begin(0, torch.ones(1, 1), torch.zeros(1))
        loop.before_backward_pass(torch.ones(1, 1), torch.zeros((), requires_grad=True))
        loop.before_parameter_optimization()
        loop.on_minibatch_end()
        loop.on_epoch_end()
    ones = [("one", call, 1) for call in CALLS]
    both = [(name, call, 4) for call in CALLS for name in ("one", "two")]  # each hook in the file's order
    assert calls == ones + both


@pytest.mark.parametrize(
    ("policies", "epochs", "target"),
    [
        ([act("pruner", "one", 0, 6, 2)], 10, 4),  # acts in 0, 2 and 4
        ([act("pruner", "one", 0, 6, 4), act("pruner", "two", 0, 3)], 10, 4),
        ([act("pruner", "one", 0, 20)], 10, 9),  # the run ends before the window
        ([act("pruner", "one", 0, 20, 4)], 10, 8),
        ([act("pruner", "one", 12, 20)], 10, -1),  # never acts in this run
        ([act("pruner", "one", 0, 6, discard_masks_at_minibatch_end=True)], 10, -1),
        ([act("regularizer", "l1", 0, 6)], 10, -1),
        ([act("regularizer", "l1", 0, 6, keep_mask=True)], 10, 5),
        ([act("lr_scheduler", "lr", 0, 9)], 10, -1),
    ],
)
def test_an_epoch_can_be_the_best_once_the_target_is_reached(policies, epochs, target):
    content = {
        "pruners": {"one": magnitude(0.1), "two": magnitude(0.1)},
        "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {"weight": 0.5}, "threshold_criteria": "Max"}},
        "lr_schedulers": {"lr": {"class": "StepLR", "step_size": 1}},
        "policies": policies,
    }
    loop = loop_of(content, linear(1.0), epochs)
    found = []
    for epoch in range(epochs):
        loop.state.epoch = epoch
        found.append(loop.scheduler.target_reached(loop.state))
    assert found == [epoch >= target for epoch in range(epochs)]


def test_two_policies_of_one_weight():
    # the end of the first, which hides nothing, takes nothing away from the second, which hides weights until its own end
    content = {
        "pruners": {"first": magnitude(1.5), "second": magnitude(2.5)},
        "policies": [act("pruner", "first", 0, 2), act("pruner", "second", 1, 6, 3, use_double_copies=True)],
    }
    loop = loop_of(content, linear(1.0, 2.0, 3.0))
    seen = []
    for epoch in range(7):
        loop.on_epoch_begin(epoch)
        seen.append(loop.state.model.weight[0].tolist())
        loop.on_epoch_end()
    assert seen == [[0, 2, 3]] + 5 * [[0, 0, 3]] + [[0, 2, 3]]


def test_what_is_described_is_reported():
    content = {"pruners": {"one": magnitude(0.1), "spare": magnitude(1.0)}, "policies": [act("pruner", "one", 8, 20)]}
    lines = loop_of(content, linear(1.0)).lines
    assert "schedule pruner one: MagnitudeParameterPruner, epochs 8 to 19" in lines
    assert "schedule pruners.one.thresholds.weight -> weight" in lines
    assert "schedule pruners.spare is described, but no policy uses it" in lines
    assert any("warning: one reaches its target in epoch 19; the run ends in epoch 9" in line for line in lines)


def test_a_policy_that_can_not_be_made_says_which():
    content = {
        "distillers": {"dense": {"class": "KnowledgeDistillation"}},
        "policies": [{"distiller": {"instance_name": "dense"}, "epochs": [0]}],
    }
    with pytest.raises(UserError) as caught:
        loop_of(content, linear(1.0))
    assert str(caught.value) == "dense: to load a teacher, the student's specification must be known; pass it as spec"


def test_a_network_that_was_cut_is_checked_when_a_policy_acts():
    # a resumed run builds the network as it is now; what a policy that is over has done to it must not be refused
    odd = {"class": "L1RankedStructureParameterPruner", "group_type": "Rows", "desired_sparsity": 0.5, "weights": "weight", "group_size": 2}
    content = {"pruners": {"odd": odd}, "policies": [act("pruner", "odd", 0, 2)]}
    with pytest.raises(UserError, match="3 structures"):
        loop_of(content, linear(1.0, 2.0, 3.0))
    for epoch, refused in ((0, True), (2, False)):
        model = linear(1.0, 2.0, 3.0)
        run = LoopState(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=4, steps_per_epoch=1, plan={"kept": {}})
        scheduler = CompressionScheduler(parse_schedule(content, {"weight": 2}), run, lambda: None)
        run.epoch = epoch
        with pytest.raises(UserError, match="3 structures") if refused else nullcontext():
            scheduler.on_epoch_begin(run)


def test_prune_regularize_distil_and_set_the_rate_together(tmp_path):
    spec = ModelSpec("resnet20", 3, imgsz=16, channels=1)
    torch.manual_seed(0)
    student, teacher = build(spec), build(spec)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    conv = "layer1.0.conv1.weight"
    agp = {"class": "AutomatedGradualPruner", "initial_sparsity": 0.1, "final_sparsity": 0.6, "weights": [conv]}
    kd = {
        "class": "KnowledgeDistillation",
        "teacher": "resnet20",
        "resume": str(tmp_path / "teacher.pt"),
        "distill_wt": 0.7,
        "student_wt": 0.3,
    }
    content = {
        "pruners": {"agp": agp},
        "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {conv: 1e-4}}},
        "distillers": {"dense": kd},
        "lr_schedulers": {"lr": {"class": "ExponentialLR", "gamma": 0.1}},
        "policies": [
            act("lr_scheduler", "lr", 0, 9),
            act("pruner", "agp", 0, 2),
            act("regularizer", "l1", 0, 2),
            {"distiller": {"instance_name": "dense"}, "starting_epoch": 0},
        ],
    }
    loop = loop_of(content, student, 3, spec=spec, ema=EMA(student, 0.5, 1e-9))
    optimizer = loop.state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    inputs, targets = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    rates, zeros = [], []
    for epoch in range(3):
        loop.on_epoch_begin(epoch)
        loop.on_minibatch_begin(0, inputs, targets)
        outputs = student(inputs)
        plain = nn.functional.cross_entropy(outputs, targets)
        norm = student.get_parameter(conv).abs().sum().item()
        loss = loop.before_backward_pass(outputs, plain)
        parts = {name: part.item() for name, part in loop.state.loss_parts.items()}
        assert parts["classification"] == pytest.approx(0.3 * plain.item())
        with torch.no_grad():
            logs = outputs.log_softmax(1), teacher.eval()(inputs).log_softmax(1)
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean().item()
        assert parts["distillation"] == pytest.approx(0.7 * kl, rel=1e-4)
        assert parts.get("l1", 0.0) == pytest.approx(1e-4 * norm if epoch < 2 else 0.0)  # not scaled by the student's weight
        assert loss.item() == pytest.approx(sum(parts.values()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        loop.before_parameter_optimization()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        loop.state.ema.update_(student)
        loop.on_minibatch_end()
        assert student.training
        assert not loop.scheduler.policies[-2].teacher.model.training
        zeros += [int((network.get_parameter(conv) == 0).sum()) for network in (student, loop.state.ema.model)]
        loop.on_epoch_end()
    assert rates == pytest.approx([1.0, 0.1, 0.01])
    assert zeros == [230, 230, 1382, 1382, 1382, 1382]  # 10 % and 60 % of 16 * 16 * 9 = 2,304: 230.4 and 1,382.4


def decide():
    distributed.join(torch.device("cpu"))
    rank = distributed.rank()
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():  # the last bits differ: on rank 0 the first is the smaller one of the first two, on rank 1 the second
        model.weight.copy_(torch.tensor([[1.0, 1.0 + 1e-6 * (1 - 2 * rank), 2.0, 3.0]]))
    half = {"class": "SparsityLevelParameterPruner", "levels": {"weight": 0.25}}
    policies = [{"pruner": {"instance_name": "half"}, "epochs": [0]}]
    loop = ScheduledLoop({"pruners": {"half": half}, "policies": policies}, model, torch.optim.SGD(model.parameters(), 0.1), 1, 1)
    loop.on_epoch_begin(0)
    masks = loop.scheduler.masks.values["weight"].tolist()
    refit = agreed(Decision({"w": torch.ones(1)}, {"w": torch.tensor([rank + 5.0])})).weights["w"].tolist()
    print("result", masks, refit)
    distributed.leave()


def test_ranks_agree_on_rank_0s_decision(tmp_path):
    with Launch(tmp_path, "two", decide, world=2) as processes:
        processes.finish()
    outputs = processes.outputs
    assert all("result [[0.0, 1.0, 1.0, 1.0]] [5.0]" in output for output in outputs)
    assert "schedule pruner half" in outputs[0]
    assert "schedule" not in outputs[1]  # rank 0 alone reports


def test_one_process_agrees_with_itself():
    decision = object()
    assert agreed(decision) is decision
