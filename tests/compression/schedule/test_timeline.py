from __future__ import annotations

import pytest

from compression.schedule.reading import parse_schedule
from compression.schedule.timeline import rates_by_epoch, timeline, warnings

NAMES = {"conv.weight": 4, "fc.weight": 2}


def gradual(initial=0.0, final=0.8):
    return {"class": "AutomatedGradualPruner", "initial_sparsity": initial, "final_sparsity": final, "weights": ["*"]}


def window(start, end, frequency=1):
    return {"starting_epoch": start, "ending_epoch": end, "frequency": frequency}


def schedule(policies, **sections):
    """Return a schedule; a policy is (kind, name, window)."""
    listed = [{kind: {"instance_name": name}, **when} for kind, name, when in policies]
    return parse_schedule({**sections, "policies": listed}, NAMES)


def test_a_row_for_each_change_with_targets_and_rates_worked_out_by_hand():
    """AGP 0 -> 0.8 asked in 0, 2, 4: 0.8 - 0.8 (1 - e/4)^3 = 0, 0.8 - 0.8/8 = 0.7, 0.8. ExponentialLR from epoch 3: 0.1 * 0.5^e."""
    found = schedule(
        [("pruner", "p", window(0, 6, 2)), ("lr_scheduler", "r", window(3, 100))],
        pruners={"p": gradual()},
        lr_schedulers={"r": {"class": "ExponentialLR", "gamma": 0.5}},
    )
    assert [line.split() for line in timeline(found, 8, 0.1).splitlines()] == [
        ["epochs", "learning", "rate", "active", "(target", "sparsity)"],
        ["0", "0.1", "p", "(0.0%)"],
        ["1", "0.1", "-"],
        ["2", "0.1", "p", "(70.0%)"],
        ["3", "0.1", "r"],  # sets the rate of epoch 4
        ["4", "0.00625", "p", "(80.0%),", "r"],  # 0.1 / 16
        ["5", "to", "7", "0.003125", "to", "0.0007813", "r"],  # 0.1 / 32, 0.1 / 128 = 0.00078125
    ]


def test_columns_stand_under_each_other():
    found = schedule([("pruner", "p", window(0, 3))], pruners={"p": gradual(0.5, 0.5)})
    assert timeline(found, 12, 0.1) == "\n".join(
        [
            "     epochs           learning rate  active (target sparsity)",
            "     0 to 2                     0.1  p (50.0%)",
            "    3 to 11                     0.1  -",
        ]
    )


def test_without_a_policy_of_rates_the_run_s_own_are_shown():
    found = schedule([("pruner", "p", {"epochs": [1]})], pruners={"p": gradual()})
    assert rates_by_epoch(found, 3, 0.1) == [0.1, 0.1, 0.1]
    assert rates_by_epoch(found, 3, 0.1, [0.3, 0.2, 0.1, 0.05]) == [0.3, 0.2, 0.1]
    assert timeline(found, 3, 0.1, [0.3, 0.2, 0.1]).splitlines()[2].split() == ["1", "0.2", "p", "(80.0%)"]  # asked once: at its end


def test_rates_of_several_policies_the_last_wins_and_what_none_sets_stays():
    """StepLR(2, 0.1) in epochs 0 and 1; then nobody; MultiStepMultiGammaLR in 4: 0.5 at milestone 1, 0.1 at 5."""
    found = schedule(
        [("lr_scheduler", "a", window(0, 2)), ("lr_scheduler", "b", window(4, 5))],
        lr_schedulers={
            "a": {"class": "StepLR", "step_size": 2, "gamma": 0.1},
            "b": {"class": "MultiStepMultiGammaLR", "milestones": [1, 5], "gammas": [0.5, 0.1]},
        },
    )
    assert rates_by_epoch(found, 7, 1.0) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.1, 0.05, 0.05])


def test_a_rate_that_follows_the_validation_is_not_guessed():
    found = schedule([("lr_scheduler", "r", window(1, 3))], lr_schedulers={"r": {"class": "ReduceLROnPlateau", "patience": 1}})
    assert rates_by_epoch(found, 5, 0.1) == [0.1, 0.1, None, None, None]
    rows = [line.split() for line in timeline(found, 5, 0.1).splitlines()[1:]]
    assert rows == [["0", "0.1", "-"], ["1", "to", "2", "0.1", "r"], ["3", "to", "4", "by", "validation", "-"]]


def test_pruners_without_a_known_target_are_named_without_one():
    found = schedule(
        [("pruner", "p", window(0, 2)), ("regularizer", "l1", window(0, 2))],
        pruners={"p": {"class": "SensitivityPruner", "sensitivities": {"*": 0.5}}},
        regularizers={"l1": {"class": "L1Regularizer", "reg_regims": {"*": 0.1}}},
    )
    assert timeline(found, 2, 0.1).splitlines()[1].split() == ["0", "to", "1", "0.1", "p,", "l1"]


def test_what_a_run_cuts_short_is_warned_of():
    found = schedule(
        [("pruner", "late", window(5, 9)), ("pruner", "p", window(0, 8, 3)), ("extension", "thin", {"epochs": [3, 9]})],
        pruners={"p": gradual(), "late": gradual()},
        extensions={"thin": {"class": "FilterRemover"}},
    )
    assert warnings(found, 10) == [
        "warning: thin removes in epoch 3, but p prunes until 6: from then on its sparsity counts from what is left",
    ]
    assert warnings(found, 5)[:2] == [
        "warning: late begins in epoch 5; the run ends in epoch 4",
        "warning: p reaches its target in epoch 6; the run ends in epoch 4",
    ]
    assert warnings(found, 7)[:2] == [
        "warning: late reaches its target in epoch 8; the run ends in epoch 6",
        "warning: thin removes for the last time in epoch 9; the run ends in epoch 6",
    ]


def test_thinning_in_the_epoch_of_the_last_pruning_comes_after_it_before_that_too_early():
    def found(epoch):
        return schedule(
            [("pruner", "p", window(3, 10, 3)), ("extension", "thin", {"epochs": [epoch]})],  # asked in 3, 6, 9
            pruners={"p": gradual()},
            extensions={"thin": {"class": "FilterRemover"}},
        )

    assert warnings(found(9), 10) == []
    assert warnings(found(10), 11) == []
    for early in (3, 8):
        assert warnings(found(early), 10) == [
            f"warning: thin removes in epoch {early}, but p prunes until 9: from then on its sparsity counts from what is left"
        ]


def test_masks_are_kept_where_the_run_ends_so_nothing_is_warned_of():
    content = {
        "regularizers": {"l1": {"class": "L1Regularizer", "reg_regims": {"*": 0.1}, "threshold_criteria": "Max"}},
        "policies": [{"regularizer": {"instance_name": "l1", "args": {"keep_mask": True}}, **window(0, 5)}],
    }
    found = parse_schedule(content, NAMES)
    assert warnings(found, 5) == []
    assert warnings(found, 4) == []


def test_rates_of_epoch_0_are_the_schedulers_own_and_levels_those_of_the_policy():
    content = {
        "pruners": {"level": {"class": "SparsityLevelParameterPruner", "levels": {"*": 0.1}}},
        "lr_schedulers": {"linear": {"class": "LinearLR", "start_factor": 0.5, "total_iters": 2}},
        "policies": [
            {"pruner": {"instance_name": "level", "args": {"levels": {"*": 0.3}}}, **window(0, 1)},
            {"lr_scheduler": {"instance_name": "linear"}, **window(0, 3)},
        ],
    }
    found = parse_schedule(content, NAMES)
    # factors 0.5, 0.75, 1 of the initial rate
    assert rates_by_epoch(found, 3, 0.1) == pytest.approx([0.05, 0.075, 0.1])
    assert "level (30.0%)" in timeline(found, 3, 0.1)


def test_masks_of_one_batch_have_no_target_to_miss():
    pruner = {"class": "RandomRankedFilterPruner", "desired_sparsity": 0.5, "group_type": "Filters", "weights": [next(iter(NAMES))]}
    args = {"discard_masks_at_minibatch_end": True}
    content = {"pruners": {"drop": pruner}, "policies": [{"pruner": {"instance_name": "drop", "args": args}, **window(0, 9)}]}
    assert warnings(parse_schedule(content, NAMES), 3) == []
