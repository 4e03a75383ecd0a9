from __future__ import annotations

import json

import pytest

from compression.schedule.learning_rates import MAX_EPOCHS, PLATEAU, Plateau, check_class, learning_rates, schedulers
from utils.errors import UserError
from utils.options import Place

PLACE = Place("lr_schedulers.it", {}, {})


def rates(class_name, arguments, base_lrs=(1.0,), epochs=4):
    return learning_rates(class_name, arguments, base_lrs, epochs, PLACE)


def first(class_name, arguments, base=1.0, epochs=4):
    return [row[0] for row in rates(class_name, arguments, (base,), epochs)]


def test_the_rate_is_a_function_of_the_absolute_epoch():
    found = first("ExponentialLR", {"gamma": 0.9}, epochs=25)
    assert len(found) == 26
    assert found[0] == 1.0
    assert found[25] == pytest.approx(0.9**25)
    assert round(found[25], 4) == 0.0718


@pytest.mark.parametrize(
    ("class_name", "arguments", "expected"),
    [
        ("StepLR", {"step_size": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1, 0.01]),
        ("MultiStepLR", {"milestones": [1, 3], "gamma": 0.5}, [1, 0.5, 0.5, 0.25, 0.25]),
        ("ConstantLR", {"factor": 0.5, "total_iters": 2}, [0.5, 0.5, 1, 1, 1]),
        ("LinearLR", {"start_factor": 0.5, "total_iters": 2}, [0.5, 0.75, 1, 1, 1]),
        ("PolynomialLR", {"total_iters": 4, "power": 2.0}, [1, 9 / 16, 4 / 16, 1 / 16, 0]),  # (1 - e / 4)^2
        ("CosineAnnealingLR", {"T_max": 4}, [1, 0.853553, 0.5, 0.146447, 0]),  # (1 + cos(pi e / 4)) / 2; cos(pi/4) = 0.707107
        ("CosineAnnealingLR", {"T_max": 2, "eta_min": 0.2}, [1, 0.6, 0.2, 0.6, 1]),  # it rises again after T_max
        ("CosineAnnealingWarmRestarts", {"T_0": 2}, [1, 0.5, 1, 0.5, 1]),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2}, [0.1, 0.3, 0.5, 0.3, 0.1]),
        # Up from 1/4 to 1 within pct_start * 4 - 1 = 1 step, then down over the 2 others: half way at (1 + 0.025) / 2
        (
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 4, "pct_start": 0.5, "div_factor": 4, "final_div_factor": 10},
            [0.25, 1, 0.5125, 0.025, 0.025],
        ),
        ("MultiStepMultiGammaLR", {"milestones": [1, 3], "gammas": [0.5, 0.1]}, [1, 0.5, 0.5, 0.05, 0.05]),
        ("MultiStepMultiGammaLR", {"milestones": [3, 0], "gammas": [0.1, 0.5]}, [0.5, 0.5, 0.5, 0.05, 0.05]),
    ],
)
def test_rates_by_hand(class_name, arguments, expected):
    assert first(class_name, arguments) == pytest.approx(expected, abs=1e-6)


def test_every_parameter_group_has_its_own_initial_rate():
    expected = [[0.1, 0.4], [0.1, 0.4], [0.05, 0.2]]
    assert rates("StepLR", {"step_size": 2, "gamma": 0.5}, (0.1, 0.4), 2) == [pytest.approx(row) for row in expected]
    assert rates("MultiStepMultiGammaLR", {"milestones": [2], "gammas": [0.5]}, (0.1, 0.4), 2) == [pytest.approx(row) for row in expected]
    cyclic = rates("CyclicLR", {"base_lr": [0.0, 1.0], "max_lr": [1.0, 3.0], "step_size_up": 2}, (0.1, 0.4), 2)
    assert cyclic == [pytest.approx(row) for row in ([0, 1], [0.5, 2], [1, 3])]


def test_numbers_that_yaml_takes_for_text_and_arguments_of_older_torch_are_taken():
    assert first("ExponentialLR", {"gamma": "5e-1", "last_epoch": -1, "verbose": True}, epochs=2) == pytest.approx([1, 0.5, 0.25])


def test_a_long_run_takes_no_time_and_one_too_long_is_refused():
    assert len(first("StepLR", {"step_size": 5000}, epochs=10_000)) == 10_001
    with pytest.raises(UserError, match="at most 100000"):
        first("StepLR", {"step_size": 5000}, epochs=MAX_EPOCHS + 1)


@pytest.mark.parametrize(
    ("class_name", "arguments", "message"),
    [
        ("ExponetialLR", {"gamma": 0.9}, "unknown learning-rate scheduler 'ExponetialLR'. Did you mean 'ExponentialLR'"),
        ("Optimizer", {}, "unknown learning-rate scheduler"),  # the module has it, but it is no scheduler
        ("LambdaLR", {"lr_lambda": "lambda e: 1"}, "LambdaLR takes a Python function"),
        ("MultiplicativeLR", {}, "MultiplicativeLR takes a Python function"),
        ("SequentialLR", {}, "give each a policy"),
        ("ChainedScheduler", {}, "give each a policy"),
        ("SWALR", {}, "weight averaging"),
        ("LRScheduler", {}, "only the base"),
        ("_LRScheduler", {}, "only the base"),
        (PLATEAU, {}, "no function of the epoch"),
        (3, {}, "must be the name of a scheduler, not 3"),
        ("StepLR", {"stepsize": 3}, "unknown argument 'stepsize'. Did you mean 'step_size'"),
        ("StepLR", {"step_size": 3, 7: 3}, "unknown argument '7'"),
        ("StepLR", {"step_size": 3, "optimizer": "SGD"}, "unknown argument 'optimizer'"),
        ("StepLR", {"step_size": 3, "last_epoch": 4}, "unknown argument 'last_epoch'"),
        ("StepLR", {}, "'step_size' is missing"),
        ("StepLR", {"step_size": 0}, "refuses"),
        ("StepLR", {"step_size": 2.5}, "step_size: must be a whole number"),
        ("StepLR", {"step_size": "all"}, "step_size: must be a whole number, not 'all'"),
        ("MultiStepLR", {"milestones": "12"}, "milestones: must be a list"),
        ("MultiStepLR", {"milestones": [1, "two"]}, r"milestones\[1\]: must be a whole number"),
        ("ExponentialLR", {"gamma": None}, "gamma: must be a number"),
        ("ExponentialLR", {"gamma": -1}, "learning rate -1.0 in epoch 1"),
        ("ExponentialLR", {"gamma": 1e200}, "learning rate inf in epoch 2"),
        ("PolynomialLR", {"total_iters": 4, "power": -2}, "refuses"),
        ("CosineAnnealingLR", {"T_max": 4, "eta_min": -1}, "at least 0"),
        ("OneCycleLR", {"max_lr": [0.1, 0.2], "total_steps": 9}, "refuses"),  # two maxima, one group
        ("OneCycleLR", {"max_lr": 1}, "total_steps"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "mode": "triangel"}, "Did you mean 'triangular'"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "scale_fn": "f"}, "scale_fn: takes a Python function"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "cycle_momentum": "no"}, "true or false"),
        ("MultiStepMultiGammaLR", {"milestones": [1, 2], "gammas": [0.1]}, "2 milestones and 1 gammas"),
        ("MultiStepMultiGammaLR", {"milestones": [1], "gamma": 0.1}, "unknown argument 'gamma'. Did you mean 'gammas'"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_the_place(class_name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        rates(class_name, arguments)
    assert str(caught.value).startswith("lr_schedulers.it")
    assert "\n" not in str(caught.value)


def test_every_class_that_is_offered_can_be_made():
    arguments = {
        "ExponentialLR": {"gamma": 0.9},
        "StepLR": {"step_size": 2},
        "MultiStepLR": {"milestones": [2]},
        "CosineAnnealingLR": {"T_max": 3},
        "CosineAnnealingWarmRestarts": {"T_0": 3},
        "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
        "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
        "MultiStepMultiGammaLR": {"milestones": [2], "gammas": [0.1]},
    }
    assert {"LinearLR", "ConstantLR", "PolynomialLR", PLATEAU, *arguments} <= set(schedulers())
    for name in schedulers():
        check_class(name, PLACE)
        if name != PLATEAU:
            assert len(rates(name, arguments.get(name, {}))) == 5


def test_a_plateau_lowers_the_rates_and_goes_on_after_a_restart():
    arguments = {"mode": "min", "factor": 0.5, "patience": 1}
    plateau = Plateau(arguments, [1.0, 0.2], PLACE)
    assert plateau.mode == "min"
    assert json.loads(json.dumps(plateau.state_dict()))["best"] is None
    assert plateau.step(2.0) == [1.0, 0.2]  # the best so far
    assert plateau.step(2.0) == [1.0, 0.2]  # one bad epoch, which patience allows
    again = Plateau(arguments, [1.0, 0.2], PLACE)
    again.load_state_dict(json.loads(json.dumps(plateau.state_dict())))
    for one in (plateau, again):
        assert one.step(2.5) == [0.5, 0.1]  # the second
        assert one.step(1.0) == [0.5, 0.1]
        assert one.rates == [0.5, 0.1]
    assert again.state_dict() == plateau.state_dict()


def test_a_plateau_goes_on_with_its_cooldown():
    arguments = {"factor": 0.5, "patience": 0, "cooldown": 2}
    plateau, again = Plateau(arguments, [1.0], PLACE), Plateau(arguments, [1.0], PLACE)
    assert [plateau.step(figure) for figure in (1.0, 2.0)] == [[1.0], [0.5]]
    again.load_state_dict(plateau.state_dict())
    for one in (plateau, again):
        assert [one.step(2.0)[0] for _ in range(3)] == [0.5, 0.5, 0.25]  # two epochs do not count


def test_a_plateau_that_watches_accuracy_and_bad_arguments():
    plateau = Plateau({"mode": "max", "patience": 0}, [1.0], PLACE)
    again = Plateau({"mode": "max", "patience": 0}, [1.0], PLACE)
    again.load_state_dict(plateau.state_dict())
    assert [again.step(figure)[0] for figure in (0.5, 0.6, 0.4)] == pytest.approx([1.0, 1.0, 0.1])
    for arguments, message in (
        ({"mode": "maximum"}, "Valid: min, max"),
        ({"factor": 2}, "Factor should be < 1.0"),
        ({"patient": 2}, "Did you mean 'patience'"),
        ({"patience": "long"}, "patience: must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            Plateau(arguments, [1.0], PLACE)
