"""How a network is trained where no flag says it: optimizer, rates, decay, smoothing, augmentation. ``RECIPES`` lists them.

How they were chosen, and what others give: docs/training.md, "Recipes".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from utils.loop.optim import OPTIMIZERS


@dataclass(frozen=True)
class Recipe:
    """Values of the flags of the same names.

    Attributes:
        augment: a preset; "" for the data set's own, and without one the preset that suits the size of the images.
    """

    optimizer: str
    lr0: float
    lrf: float
    cos_lr: bool
    warmup_epochs: float
    momentum: float
    decay: float
    label_smoothing: float
    augment: str


RECIPES = {
    "default": Recipe("Muon", 0.01, 0.001, True, 1.0, 0.9, 0.05, 0.1, ""),
    "finetune": Recipe("Muon", 0.003, 0.001, True, 0.5, 0.9, 0.05, 0.0, ""),
    "sgd": Recipe("SGD", 0.03, 0.001, True, 1.0, 0.9, 5e-4, 0.1, ""),
    "sgd-finetune": Recipe("SGD", 0.02, 0.001, True, 0.5, 0.9, 5e-4, 0.0, ""),
    "yolov5": Recipe("Adam", 1e-3, 0.01, False, 0.0, 0.9, 5e-5, 0.1, "default"),
}
SMALL, LIGHT, HEAVIER = 96, "light", "default"  # up to so many pixels crops keep most of an image
FINETUNE_WARMUP = 64  # steps at least: a refitted network whose rate rises faster is thrown off, and takes long to come back


def default_recipe(trained: bool, compressed: bool) -> str:
    """Return the recipe of a run that names none.

    Args:
        trained: whether it starts from trained weights.
        compressed: whether a schedule compresses the network. Strengths and thresholds of regularizers are chosen for SGD,
            whose steps are as large as the gradients; Muon's are not.
    """
    name = "finetune" if trained else "default"
    return {"default": "sgd", "finetune": "sgd-finetune"}[name] if compressed else name


def choose_recipe(name: str, given: Mapping[str, Any], preset: str, imgsz: int, epoch_steps: float) -> Recipe:
    """Return the values of a run: those that flags give, and the recipe's for the others.

    The rate and the decay of another optimizer than the recipe's are that optimizer's own.

    Args:
        name: of the recipe.
        given: values that flags give, by name; None where one does not.
        preset: the augmentation of the data set, if it has one.
        imgsz: side of the input.
        epoch_steps: steps in an epoch.
    """
    recipe = RECIPES[name]
    if name.endswith("finetune"):
        recipe = replace(recipe, warmup_epochs=max(recipe.warmup_epochs, round(FINETUNE_WARMUP / epoch_steps, 2)))
    given = {field.name: given[field.name] for field in fields(Recipe) if given.get(field.name) is not None}
    if (optimizer := given.get("optimizer", recipe.optimizer)) != recipe.optimizer and optimizer in OPTIMIZERS:
        recipe = replace(recipe, lr0=OPTIMIZERS[optimizer].lr0, decay=OPTIMIZERS[optimizer].decay)
    fitting = preset or (LIGHT if imgsz <= SMALL else HEAVIER)
    return replace(recipe, **{"augment": recipe.augment or fitting, **given})
