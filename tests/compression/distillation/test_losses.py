from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
import torch.nn.functional as F

from compression.distillation.arguments import DistillationArguments, add_distillation_args
from compression.distillation.losses import DistillationLossWeights, KnowledgeDistillationPolicy, check, distillation_loss
from tests.teachers import Fixed, Noisy
from utils.arguments import make_parser, parse
from utils.errors import UserError
from utils.loop.hooks import LoopState
from utils.loop.precision import Precision

CPU = torch.device("cpu")
# Divided by T = 2 these are (ln 3, 0) and (0, 0): the probabilities (3/4, 1/4) and (1/2, 1/2).
TEACHER, STUDENT = torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
# 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2) = 0.75 * 0.405465 - 0.25 * 0.693147
KL = 0.130812


def state(model, inputs=None, targets=None, precision=None):
    run = LoopState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, steps_per_epoch=1, precision=precision)
    run.inputs = torch.zeros(1, 3, 2, 2) if inputs is None else inputs
    run.targets = torch.tensor([0]) if targets is None else targets
    run.outputs = model(run.inputs)
    run.loss = F.cross_entropy(run.outputs.float(), run.targets)
    run.loss_parts = {"classification": run.loss}
    return run


def policy(weights=(0.5, 0.5, 0.0), temperature=2.0, student=(0.0, 0.0)):
    model = Fixed(list(student))
    return model, KnowledgeDistillationPolicy(model, Fixed(TEACHER[0].tolist()), temperature, DistillationLossWeights(*weights))


def test_the_loss_by_hand():
    assert distillation_loss(STUDENT, TEACHER, 2).item() == pytest.approx(4 * KL, abs=1e-5)
    two = distillation_loss(torch.cat([STUDENT, TEACHER]), torch.cat([TEACHER, TEACHER]), 2)
    assert two.item() == pytest.approx(4 * KL / 2, abs=1e-5)  # the second image agrees; the mean over both
    # at T = 1 the teacher's probabilities are 9/10 and 1/10: 0.9 ln 1.8 + 0.1 ln 0.2 = 0.529008 - 0.160944
    assert distillation_loss(STUDENT, TEACHER, 1).item() == pytest.approx(0.368064, abs=1e-5)
    assert distillation_loss(TEACHER, STUDENT, 2).item() != pytest.approx(4 * KL, abs=1e-2)  # the order matters


def test_only_the_student_gets_a_gradient():
    student, teacher = STUDENT.repeat(2, 1).requires_grad_(), TEACHER.repeat(2, 1).requires_grad_()
    (0.3 * distillation_loss(student, teacher, 2)).backward()
    # (1/2 - 3/4, 1/2 - 1/4) * T * w / B = (-1/4, 1/4) * 2 * 0.3 / 2
    assert student.grad.tolist() == [pytest.approx([-0.075, 0.075], abs=1e-6)] * 2
    assert teacher.grad is None


def test_half_precision_logits_are_compared_in_float32_and_doubles_in_double():
    assert distillation_loss(STUDENT.bfloat16(), TEACHER, 2).dtype == torch.float32
    assert distillation_loss(STUDENT.double(), TEACHER.double(), 2).dtype == torch.float64
    huge = torch.tensor([[400.0, -400.0]])
    assert torch.isfinite(distillation_loss(huge, -huge, 1))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"teacher's outputs are \[1, 3\], the student's \[1, 2\]"):
        distillation_loss(STUDENT, torch.zeros(1, 3))


def test_the_policy_weighs_the_terms_and_names_them():
    model, hook = policy((0.3, 0.6, 0.1))
    run = state(model)
    loss = hook.before_backward_pass(run)
    parts = {name: part.item() for name, part in run.loss_parts.items()}
    # CE of (1/2, 1/2) is ln 2; the teacher's is -ln 0.9
    assert parts == pytest.approx({"classification": 0.6 * math.log(2), "distillation": 1.2 * KL, "teacher": 0.010536}, abs=1e-5)
    assert loss.item() == pytest.approx(sum(parts.values()))
    loss.backward()
    # 0.6 * (1/2 - 1, 1/2) + 0.3 * 2 * (-1/4, 1/4)
    assert model.logits.grad.tolist() == pytest.approx([-0.45, 0.45])
    assert hook.teacher.model.logits.grad is None


def test_a_regularization_term_is_not_scaled():
    model, hook = policy((0.5, 0.25, 0.0))
    run = state(model)
    term = 7 * (model.logits + 1).sum()  # 14
    run.loss_parts["regularization"] = term
    run.loss = run.loss + term
    loss = hook.before_backward_pass(run)
    assert loss.item() == pytest.approx(14 + 0.25 * math.log(2) + 2 * KL, abs=1e-5)
    loss.backward()
    # 7 + 0.25 * (-1/2, 1/2) + 0.5 * 2 * (-1/4, 1/4)
    assert model.logits.grad.tolist() == pytest.approx([7 - 0.375, 7 + 0.375])
    assert run.loss_parts["regularization"].item() == 14
    assert "teacher" not in run.loss_parts


def test_weight_zero_leaves_the_loss_and_mixed_labels_are_taken():
    model, hook = policy((0.0, 1.0, 0.0))
    run = state(model)
    assert hook.before_backward_pass(run).item() == pytest.approx(math.log(2))
    model, hook = policy((0.0, 0.0, 1.0))
    run = state(model, targets=torch.tensor([[0.5, 0.5]]))
    # the teacher's -(ln 0.9 + ln 0.1) / 2
    assert hook.before_backward_pass(run).item() == pytest.approx(1.203973, abs=1e-5)


def test_forward_runs_the_teacher_once_and_needs_no_inputs_in_the_state():
    model, hook = policy()
    calls = []
    hook.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    run = state(model)
    hook.on_minibatch_begin(run)
    outputs = hook.forward(torch.zeros(3, 3, 2, 2))
    assert outputs.tolist() == [[0, 0]] * 3
    run.inputs = torch.empty(0)
    assert hook.before_backward_pass(run).item() == pytest.approx(0.5 * math.log(2) + 2 * KL, abs=1e-5)
    assert len(calls) == 1
    with pytest.raises(UserError, match=r"forward\(inputs\)"):  # what forward left is used up
        hook.before_backward_pass(run)
    hook.forward(torch.zeros(3, 3, 2, 2))
    hook.on_minibatch_begin(run)  # another batch begins
    with pytest.raises(UserError, match=r"forward\(inputs\)"):
        hook.before_backward_pass(run)
    with torch.no_grad():
        assert hook.forward(torch.zeros(1, 3, 2, 2)).tolist() == [[0, 0]]
    assert len(calls) == 2  # a validation did not ask the teacher


def test_the_teacher_runs_in_the_runs_precision():
    student, network, types = Noisy(), Noisy(), []
    network.conv.register_forward_hook(lambda *arguments: types.append(arguments[2].dtype))
    hook = KnowledgeDistillationPolicy(student, network)
    for precision in (Precision(torch.device("cpu"), torch.bfloat16), None):
        hook.before_backward_pass(state(student, torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.long), precision))
    assert types == [torch.bfloat16, torch.float32]


def test_the_teachers_weight_needs_labels():
    model, hook = policy((0.5, 0.5, 0.5))
    hook.forward(torch.zeros(1, 3, 2, 2))
    run = state(model)
    run.targets = torch.empty(0)
    with pytest.raises(UserError, match="needs the labels"):
        hook.before_backward_pass(run)


def test_the_teacher_stays_in_eval_mode_and_frozen():
    torch.manual_seed(0)
    network = Noisy()
    student, x = Noisy(), torch.randn(8, 3, 4, 4) + 3
    hook = KnowledgeDistillationPolicy(student, network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    student.train()
    network.train()  # whoever does that
    first, second = hook.teacher(x), hook.teacher(x)
    assert torch.equal(first, second)
    assert not any(module.training for module in network.modules())
    assert all(module.training for module in student.modules())
    run = state(student, x, torch.zeros(8, dtype=torch.long))
    hook.before_backward_pass(run).backward()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.grad is None and not value.requires_grad for value in network.parameters())
    assert all(value.grad is not None for value in student.parameters())
    assert not first.requires_grad
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_student_can_not_be_its_own_teacher():
    model = Fixed([0.0, 1.0])
    with pytest.raises(UserError, match="shares parameters"):
        KnowledgeDistillationPolicy(model, model)
    assert model.logits.requires_grad


@pytest.mark.parametrize(
    ("temperature", "weights", "message"),
    [
        (0.0, (0.5, 0.5, 0.0), "temperature of distillation is 0.0"),
        (math.nan, (0.5, 0.5, 0.0), "above 0 and finite"),
        (1.0, (-1.0, 0.5, 0.0), "distill weight of distillation is -1.0"),
        (1.0, (0.5, math.inf, 0.0), "student weight"),
        (1.0, (0.5, 0.5, math.nan), "teacher weight"),
    ],
)
def test_values_out_of_range(temperature, weights, message):
    with pytest.raises(UserError, match=message):
        policy(weights, temperature)


def test_a_restart_takes_the_same_teacher_only():
    _, hook = policy()
    kept = json.loads(json.dumps(hook.state_dict()))
    policy()[1].load_state_dict(kept)
    other = KnowledgeDistillationPolicy(Fixed([0.0, 0.0]), Fixed([0.0, 1.0]))
    with pytest.raises(UserError, match="another teacher"):
        other.load_state_dict(kept)
    with pytest.raises(UserError, match="another teacher"):
        other.load_state_dict({})


def test_distillers_flags_on_any_parser():
    parser = argparse.ArgumentParser()
    add_distillation_args(parser)
    defaults = vars(parser.parse_args([]))
    assert defaults == {
        "kd_teacher": "",
        "kd_pretrained": False,
        "kd_resume": "",
        "kd_temperature": 1.0,
        "kd_distill_wt": 0.5,
        "kd_student_wt": 0.5,
        "kd_teacher_wt": 0.0,
        "kd_start_epoch": 0,
    }
    assert DistillationArguments(**defaults) == DistillationArguments()
    short = "--kd-teacher resnet56 --kd-pretrained --kd-resume t.pt --kd-temp 5 --kd-dw 0.7 --kd-sw 0.3 --kd-tw 0.1 --kd-start-epoch 2"
    long = (
        "--kd_teacher resnet56 --kd_pretrained --kd_resume t.pt --kd-temperature 5 --kd-distill-wt 0.7 "
        "--kd_student_wt 0.3 --kd-teacher-wt 0.1 --kd_start_epoch 2"
    )
    expected = DistillationArguments("resnet56", True, "t.pt", 5.0, 0.7, 0.3, 0.1, 2)
    for line in (short, long):
        assert DistillationArguments(**vars(parser.parse_args(line.split()))) == expected
        assert parse(DistillationArguments, "", line.split())[0] == expected
    assert set(make_parser(DistillationArguments, "")._option_string_actions) == set(parser._option_string_actions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd_temperature": -1.0}, "temperature of distillation is -1.0"),
        ({"kd_distill_wt": -0.5}, "distill weight"),
        ({"kd_student_wt": math.inf}, "student weight"),
        ({"kd_teacher_wt": math.nan}, "teacher weight"),
        ({"kd_start_epoch": -1}, "--kd-start-epoch is -1"),
        ({"kd_pretrained": True}, "--kd-pretrained needs --kd-teacher"),
        ({"kd_pretrained": True, "kd_resume": "a.pt"}, "--kd-pretrained needs --kd-teacher"),
        ({"kd_pretrained": True, "kd_teacher": "a.pt"}, "--kd-pretrained needs --kd-teacher with the name"),
        ({"kd_pretrained": True, "kd_teacher": "alexnet", "kd_resume": "a.pt"}, "--kd-resume and --kd-pretrained exclude each other"),
        ({"kd_teacher": "a.pt", "kd_resume": "b.pt"}, "--kd-resume and --kd-teacher a.pt exclude each other"),
        ({"kd_teacher": "resnet56"}, "--kd-teacher resnet56 has no weights"),
    ],
)
def test_flags_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        check(DistillationArguments(**arguments))


def test_flags_that_fit():
    for given in ({}, {"kd_resume": "a.pt"}, {"kd_teacher": "a.pt"}, {"kd_teacher": "resnet56", "kd_resume": "a.pt"}):
        check(DistillationArguments(**given))
    check(DistillationArguments(kd_teacher="alexnet", kd_pretrained=True, kd_distill_wt=2.0, kd_student_wt=0.0))
