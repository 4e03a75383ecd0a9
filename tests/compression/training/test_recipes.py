"""Recipes: what trains a network where no flag says it."""

from __future__ import annotations

import pytest

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from compression.training.recipes import RECIPES, choose_recipe, default_recipe
from utils.data.transforms import PRESETS
from utils.loop.optim import OPTIMIZERS


def test_yolov5s_values_are_those_of_its_script():
    recipe = choose_recipe("yolov5", {}, "", 32, 100)
    assert (recipe.optimizer, recipe.lr0, recipe.lrf, recipe.decay, recipe.momentum) == ("Adam", 1e-3, 0.01, 5e-5, 0.9)
    assert (recipe.cos_lr, recipe.warmup_epochs, recipe.label_smoothing, recipe.augment) == (False, 0.0, 0.1, "default")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_what_there_is(name):
    for imgsz in (28, 64, 224):
        recipe = choose_recipe(name, {}, "", imgsz, 100)
        assert recipe.optimizer in OPTIMIZERS
        assert recipe.augment in PRESETS
    assert choose_recipe(name, {"lr0": 0.5, "cos_lr": False, "label_smoothing": 0.0}, "", 64, 100).lr0 == 0.5
    assert not choose_recipe(name, {"cos_lr": False}, "", 64, 100).cos_lr  # False is given; None is not
    assert choose_recipe(name, {"augment": "none"}, "light", 64, 100).augment == "none"


def test_crops_suit_the_size_unless_the_data_set_says_it():
    assert [choose_recipe("default", {}, "", imgsz, 100).augment for imgsz in (32, 96, 97, 224)] == ["light", "light", "default", "default"]
    assert choose_recipe("default", {}, "light", 224, 100).augment == "light"


def test_another_optimizer_has_a_rate_and_a_decay_of_its_own():
    recipe = choose_recipe("default", {"optimizer": "AdamW"}, "", 64, 100)
    assert (recipe.lr0, recipe.decay, recipe.cos_lr) == (1e-3, 0.05, True)
    assert choose_recipe("default", {"optimizer": "AdamW", "lr0": 0.3}, "", 64, 100).lr0 == 0.3


def test_fine_tuning_warms_up_for_64_steps_at_least():
    assert [choose_recipe("finetune", {}, "", 64, steps).warmup_epochs for steps in (1, 20, 128, 1000)] == [64, 3.2, 0.5, 0.5]
    assert choose_recipe("finetune", {"warmup_epochs": 0.1}, "", 64, 1).warmup_epochs == 0.1
    assert choose_recipe("default", {}, "", 64, 1).warmup_epochs == 1


def test_under_a_schedule_sgd_trains():
    assert [default_recipe(*case) for case in ((False, False), (True, False), (False, True), (True, True))] == [
        "default", "finetune", "sgd", "sgd-finetune",
    ]  # fmt: skip


@pytest.mark.parametrize(("flags", "expected"), [({}, "default"), ({"recipe": "yolov5"}, "yolov5")])
def test_a_runs_record_has_the_values(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compressor = ClassifierCompressor(TrainArguments(data="digits", workers=0, **flags))
    for name, value in vars(choose_recipe(expected, {}, "light" if expected == "default" else "", 32, 100)).items():
        assert getattr(compressor.arguments, name) == value
    groups = compressor.run.optimizer.param_groups
    assert type(compressor.run.optimizer) is OPTIMIZERS[RECIPES[expected].optimizer].kind
    assert {group["weight_decay"] for group in groups} == {0.0, RECIPES[expected].decay}
