"""Recipes: what trains a network where no flag says it."""

from __future__ import annotations

import pytest

from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from compression.training.recipes import RECIPES, choose_recipe
from utils.data.transforms import PRESETS
from utils.loop.optim import OPTIMIZERS


def test_yolov5s_values_are_those_of_its_script():
    recipe = choose_recipe("yolov5", {}, "", 32)
    assert (recipe.optimizer, recipe.lr0, recipe.lrf, recipe.decay, recipe.momentum) == ("Adam", 1e-3, 0.01, 5e-5, 0.9)
    assert (recipe.cos_lr, recipe.warmup_epochs, recipe.label_smoothing, recipe.augment) == (False, 0.0, 0.1, "default")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_what_there_is(name):
    for imgsz in (28, 64, 224):
        recipe = choose_recipe(name, {}, "", imgsz)
        assert recipe.optimizer in OPTIMIZERS
        assert recipe.augment in PRESETS
    assert choose_recipe(name, {"lr0": 0.5, "cos_lr": False, "label_smoothing": 0.0}, "", 64).lr0 == 0.5
    assert not choose_recipe(name, {"cos_lr": False}, "", 64).cos_lr  # False is given; None is not
    assert choose_recipe(name, {"augment": "none"}, "light", 64).augment == "none"


def test_crops_suit_the_size_unless_the_data_set_says_it():
    assert [choose_recipe("default", {}, "", imgsz).augment for imgsz in (32, 96, 97, 224)] == ["light", "light", "default", "default"]
    assert choose_recipe("default", {}, "light", 224).augment == "light"


def test_another_optimizer_has_a_rate_and_a_decay_of_its_own():
    recipe = choose_recipe("default", {"optimizer": "AdamW"}, "", 64)
    assert (recipe.lr0, recipe.decay, recipe.cos_lr) == (1e-3, 0.05, True)
    assert choose_recipe("default", {"optimizer": "AdamW", "lr0": 0.3}, "", 64).lr0 == 0.3


@pytest.mark.parametrize(("flags", "expected"), [({}, "default"), ({"recipe": "yolov5"}, "yolov5")])
def test_a_runs_record_has_the_values(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compressor = ClassifierCompressor(TrainArguments(data="digits", workers=0, **flags))
    for name, value in vars(choose_recipe(expected, {}, "light" if expected == "default" else "", 32)).items():
        assert getattr(compressor.arguments, name) == value
    groups = compressor.run.optimizer.param_groups
    assert type(compressor.run.optimizer) is OPTIMIZERS[RECIPES[expected].optimizer].kind
    assert {group["weight_decay"] for group in groups} == {0.0, RECIPES[expected].decay}
