"""Learning-rate schedulers of a schedule: a rate is a closed form of the absolute epoch.

    rate(group, e) = what torch.optim.lr_scheduler's class gives after e steps from the group's initial rate

It does not matter in which epoch the policy's window begins: ExponentialLR(0.9) from epoch 24 gives 0.9^25 of the initial
rate, not 0.9, in epoch 25. Every class of ``torch.optim.lr_scheduler`` that a file can describe is taken by its name;
``MultiStepMultiGammaLR`` is ours. ReduceLROnPlateau is no function of the epoch: see ``Plateau``.

Differs: OneCycleLR and CyclicLR set the rate only, not the momentum; past its total_steps OneCycleLR keeps its last rate,
where torch makes it rise again and then raises.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from utils.errors import nearest, unknown
from utils.options import Place, Reader, boolean, build, choice, integer, listed, number, option, optional, shown, text

PLATEAU = "ReduceLROnPlateau"
MAX_EPOCHS = 100_000
_FUNCTION = "takes a Python function, which a file can't give"
_OTHERS = "takes other schedulers; give each a policy with its own window"
_BASE = "is only the base of the schedulers"
REFUSED = {
    "LambdaLR": _FUNCTION,
    "MultiplicativeLR": _FUNCTION,
    "SequentialLR": _OTHERS,
    "ChainedScheduler": _OTHERS,
    "SWALR": "belongs to weight averaging",
    "LRScheduler": _BASE,
    "_LRScheduler": _BASE,
}
# The injected arguments, and ``verbose``, which older torch had and older files may have: it prints.
_DROPPED = ("self", "optimizer", "last_epoch", "verbose")


def _one_or_each(value: Any, place: Place) -> Any:
    return listed(number())(value, place) if isinstance(value, list) else number()(value, place)


# By the type that torch declares; its releases spell some in two ways.
_READERS: dict[str, Reader] = {
    "int": integer(),
    **dict.fromkeys(("int | None", "Optional[int]"), optional(integer())),
    "float": number(),
    "bool": boolean,
    "Iterable[int]": listed(integer()),
    **dict.fromkeys(("float | list[float]", "list[float] | float", "Union[float, List[float]]", "Union[List[float], float]"), _one_or_each),
}


@dataclass
class MultiStepMultiGammaLR:
    """rate(e) = initial rate * product of the gammas whose milestone <= e.

    Attributes:
        milestones: epochs.
        gammas: one factor per milestone.
    """

    milestones: tuple[int, ...] = option(listed(integer()))
    gammas: tuple[float, ...] = option(listed(number(least=0)))

    def factor(self, epoch: int) -> float:
        """Return the product at an epoch."""
        return math.prod(gamma for milestone, gamma in zip(self.milestones, self.gammas, strict=True) if milestone <= epoch)


def schedulers() -> list[str]:
    """Names of the classes that a file may use."""
    return sorted([*_torch_classes(), "MultiStepMultiGammaLR", PLATEAU])


def check_class(class_name: Any, place: Place) -> None:
    """Check that a file may use a class.

    Raises:
        UserError: it is unknown, or can't be made from a file.
    """
    if not isinstance(class_name, str):
        raise (place / "class").error(f"must be the name of a scheduler, not {shown(class_name)}")
    if class_name in REFUSED:
        raise place.error(f"{class_name} {REFUSED[class_name]}")
    if class_name not in schedulers():
        raise place.error(str(unknown("learning-rate scheduler", class_name, schedulers())))


def learning_rates(
    class_name: str, arguments: Mapping[str, Any], base_lrs: Sequence[float], epochs: int, place: Place
) -> list[list[float]]:
    """Return the rates of all parameter groups in epochs 0, 1, ..., ``epochs``.

    Args:
        class_name: one of ``schedulers()`` but ReduceLROnPlateau.
        arguments: of its constructor, as the file gives them.
        base_lrs: the initial rate of each parameter group.
        epochs: the last epoch that is asked for.
        place: of the instance in the file.

    Raises:
        UserError: the class or an argument does not fit, or a rate would not be a finite number of at least 0.
    """
    check_class(class_name, place)
    if class_name == PLATEAU:
        raise place.error(f"{PLATEAU} is no function of the epoch, so its rates are not known before")
    if epochs > MAX_EPOCHS:
        raise place.error(f"{epochs} epochs are asked for; at most {MAX_EPOCHS} can be scheduled")
    if class_name == "MultiStepMultiGammaLR":
        ours = build(MultiStepMultiGammaLR, arguments, place)
        if len(ours.milestones) != len(ours.gammas):
            raise place.error(f"{len(ours.milestones)} milestones and {len(ours.gammas)} gammas; there must be as many of both")
        rates = [[base * ours.factor(epoch) for base in base_lrs] for epoch in range(epochs + 1)]
    else:
        rates = _stepped(_torch_classes()[class_name], arguments, base_lrs, epochs, place)
    return [[_checked(rate, epoch, class_name, place) for rate in row] for epoch, row in enumerate(rates)]


class Plateau:
    """torch's ReduceLROnPlateau: the rates fall when the watched figure no longer improves.

    Args:
        arguments: of torch's constructor, as the file gives them. ``mode``: min watches the validation loss, max the top-1.
        base_lrs: the initial rate of each parameter group.
        place: of the instance in the file.

    Raises:
        UserError: an argument does not fit.
    """

    def __init__(self, arguments: Mapping[str, Any], base_lrs: Sequence[float], place: Place) -> None:
        self.optimizer = _dummy(base_lrs)
        self.scheduler = _make(lr_scheduler.ReduceLROnPlateau, arguments, self.optimizer, place)
        self.mode: str = self.scheduler.mode

    @property
    def rates(self) -> list[float]:
        """The rates of all parameter groups now."""
        return _rates(self.optimizer)

    def step(self, metric: float) -> list[float]:
        """Take an epoch's figure; return the rates of the next epoch."""
        self.scheduler.step(metric)
        return self.rates

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-able values; ``best`` is None before the first step."""
        known = math.isfinite(self.scheduler.best)
        return {
            "rates": self.rates,
            "best": self.scheduler.best if known else None,
            "bad_epochs": self.scheduler.num_bad_epochs,
            "cooldown": self.scheduler.cooldown_counter,
            "steps": self.scheduler.last_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.scheduler.best = (math.inf if self.mode == "min" else -math.inf) if state["best"] is None else state["best"]
        self.scheduler.num_bad_epochs, self.scheduler.cooldown_counter = state["bad_epochs"], state["cooldown"]
        self.scheduler.last_epoch = state["steps"]


def _torch_classes() -> dict[str, Callable[..., Any]]:
    """The classes of torch whose rate is a function of the epoch, by name."""
    found = {
        name: kind for name, kind in vars(lr_scheduler).items() if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    return {name: kind for name, kind in found.items() if name not in REFUSED and name != PLATEAU and not name.startswith("_")}


def _dummy(base_lrs: Sequence[float]) -> Optimizer:
    """Make an optimizer with these rates and nothing to optimize; some schedulers want a momentum."""
    return SGD([{"params": [torch.zeros(())], "lr": rate} for rate in base_lrs], lr=1.0, momentum=0.9)


def _rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _make(kind: Callable[..., Any], arguments: Mapping[str, Any], optimizer: Optimizer, place: Place) -> Any:
    """Call a scheduler's constructor with what the file says."""
    signature = inspect.signature(kind).parameters
    known = {name: parameter for name, parameter in signature.items() if name not in _DROPPED}
    given = {}
    for name, value in arguments.items():
        if name == "verbose" or (name == "last_epoch" and value == -1):
            continue
        if name not in known:
            raise place.error(f"unknown argument '{name}'.{nearest(str(name), known)} Valid: {', '.join(known)}")
        if name == "scale_fn" and value is not None:
            raise (place / name).error(f"{_FUNCTION}; leave it out")
        given[name] = _reader(known[name])(value, place / name)
    if missing := [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in given]:
        raise place.error(f"'{missing[0]}' is missing")
    try:
        return kind(optimizer, **given)
    except Exception as error:  # what a constructor raises for a value that it did not expect can be anything
        raise place.error(_refusal(kind, error)) from None


def _reader(parameter: inspect.Parameter) -> Reader:
    """Return what checks an argument, by the type that torch declares for it, or by that of its default."""
    annotation = parameter.annotation
    declared = (annotation.__name__ if isinstance(annotation, type) else str(annotation)).replace("typing.", "")
    if declared in _READERS:
        return _READERS[declared]
    if declared.startswith("Literal["):
        return choice(*re.findall(r"['\"](\w+)['\"]", declared))
    by_default: dict[type, Reader] = {str: text, bool: boolean, float: _one_or_each}
    return by_default.get(type(parameter.default), lambda value, place: value)


def _refusal(kind: Callable[..., Any], error: Exception) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return f"{getattr(kind, '__name__', 'the scheduler')} refuses these arguments: {reason}"


def _stepped(
    kind: Callable[..., Any], arguments: Mapping[str, Any], base_lrs: Sequence[float], epochs: int, place: Place
) -> list[list[float]]:
    optimizer = _dummy(base_lrs)
    scheduler = _make(kind, arguments, optimizer, place)
    rates = [_rates(optimizer)]
    last = min(epochs, scheduler.total_steps - 1) if isinstance(scheduler, lr_scheduler.OneCycleLR) else epochs
    for epoch in range(1, last + 1):
        optimizer.step()  # nothing to do; but torch warns of a scheduler that steps before its optimizer
        try:
            scheduler.step()
        except Exception as error:  # a value that the constructor let pass: a division by zero, the end of a cycle
            raise place.error(f"{_refusal(kind, error)} (epoch {epoch})") from None
        rates.append(_rates(optimizer))
    return rates + rates[-1:] * (epochs - last)


def _checked(rate: Any, epoch: int, class_name: str, place: Place) -> float:
    try:
        value = float(rate)
    except (TypeError, ValueError, OverflowError):  # a power of a negative number is complex
        value = math.nan
    if not math.isfinite(value) or value < -1e-12:
        raise place.error(f"{class_name} makes the learning rate {shown(rate)} in epoch {epoch}; it must be at least 0 and finite")
    return max(value, 0.0)
