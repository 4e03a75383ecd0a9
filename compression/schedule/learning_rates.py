"""Learning-rate schedulers of a schedule: the rate is a function of the absolute epoch.

    rate(group, e) = what the class of torch.optim.lr_scheduler gives after e steps from the group's initial rate

The epoch in which the policy's window begins does not matter: ExponentialLR(0.9) from epoch 24 on gives 0.9^25 of the
initial rate in epoch 25, not 0.9. Every class of ``torch.optim.lr_scheduler`` that a file can describe is available by its
name, and ``MultiStepMultiGammaLR`` besides. ReduceLROnPlateau is no function of the epoch: see ``Plateau``.

Differs: OneCycleLR and CyclicLR set the rate only, not the momentum; after its total_steps OneCycleLR keeps its last rate,
where torch lets it rise again and then raises.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from utils.errors import nearest, unknown
from utils.options import Place, Reader, boolean, choice, integer, listed, number, optional, shown, text

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
# The injected arguments, and ``verbose``, which only prints: older torch had it and older files may have it.
_DROPPED = ("self", "optimizer", "last_epoch", "verbose")


def _one_or_each(value: Any, place: Place) -> Any:
    return listed(number())(value, place) if isinstance(value, list) else number()(value, place)


# By the type that torch declares; its releases spell some types in two ways.
_READERS: dict[str, Reader] = {
    "int": integer(),
    **dict.fromkeys(("int | None", "Optional[int]"), optional(integer())),
    "float": number(),
    "bool": boolean,
    "Iterable[int]": listed(integer()),
    "Iterable[float]": listed(number(least=0)),
    **dict.fromkeys(("float | list[float]", "list[float] | float", "Union[float, List[float]]", "Union[List[float], float]"), _one_or_each),
}


class MultiStepMultiGammaLR(lr_scheduler.LRScheduler):
    """Distiller's scheduler: rate(e) = initial rate * product of the gammas whose milestone <= e; one gamma per milestone."""

    def __init__(self, optimizer: Optimizer, milestones: Iterable[int], gammas: Iterable[float]) -> None:
        milestones, gammas = list(milestones), list(gammas)
        if len(milestones) != len(gammas):
            raise ValueError(f"{len(milestones)} milestones and {len(gammas)} gammas; there must be as many of both")
        self.steps = list(zip(milestones, gammas, strict=True))
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = math.prod(gamma for milestone, gamma in self.steps if milestone <= self.last_epoch)
        return [base * factor for base in self.base_lrs]


def schedulers() -> list[str]:
    """Return the names of the classes that a file may use."""
    return sorted([*_functions_of_the_epoch(), PLATEAU])


def check_class(class_name: Any, place: Place) -> None:
    """Raise a UserError if a file may not use a class."""
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
        class_name: one of ``schedulers()`` except ReduceLROnPlateau.
        arguments: of its constructor, from the file.
        base_lrs: the initial rate of each parameter group.
        epochs: the last epoch.
        place: of the instance in the file.

    Raises:
        UserError: the class or an argument does not fit, or a rate would be negative or not finite.
    """
    check_class(class_name, place)
    if class_name == PLATEAU:
        raise place.error(f"{PLATEAU} is no function of the epoch, so its rates are not known in advance")
    if epochs > MAX_EPOCHS:
        raise place.error(f"{epochs} epochs are asked for; at most {MAX_EPOCHS} can be scheduled")
    kind, optimizer = _functions_of_the_epoch()[class_name], _dummy(base_lrs)
    scheduler = _make(kind, arguments, optimizer, place)
    rates = [_rates(optimizer)]
    last = min(epochs, scheduler.total_steps - 1) if isinstance(scheduler, lr_scheduler.OneCycleLR) else epochs
    for epoch in range(1, last + 1):
        optimizer.step()  # does nothing; torch warns if a scheduler steps before its optimizer
        try:
            scheduler.step()
        except Exception as error:  # a value that the constructor accepted: a division by zero, the end of a cycle
            raise place.error(f"{_refusal(kind, error)} (epoch {epoch})") from None
        rates.append(_rates(optimizer))
    rates += rates[-1:] * (epochs - last)
    return [[_checked(rate, epoch, class_name, place) for rate in row] for epoch, row in enumerate(rates)]


class Plateau:
    """torch's ReduceLROnPlateau: the rates fall when the watched figure stops improving.

    Args:
        arguments: of torch's constructor, from the file. ``mode``: min watches the validation loss, max the top-1.
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
        """The present rates of all parameter groups."""
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
        """Restore what ``state_dict`` returned."""
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.scheduler.best = (math.inf if self.mode == "min" else -math.inf) if state["best"] is None else state["best"]
        self.scheduler.num_bad_epochs, self.scheduler.cooldown_counter = state["bad_epochs"], state["cooldown"]
        self.scheduler.last_epoch = state["steps"]


@dataclass(frozen=True)
class DescribedRates:
    """A learning-rate scheduler as a file describes it; the rates follow once the optimizer is known."""

    class_name: str
    arguments: Mapping[str, Any]
    place: Place

    def __post_init__(self) -> None:
        check_class(self.class_name, self.place)
        self.of([0.1], 1)  # so that a wrong argument is found when the file is read

    def of(self, base_lrs: list[float], epochs: int) -> list[list[float]] | Plateau:
        """Return the rates by epoch for groups with these initial rates; or a ``Plateau``, which watches the validation."""
        if self.class_name == PLATEAU:
            return Plateau(self.arguments, base_lrs, self.place)
        return learning_rates(self.class_name, self.arguments, base_lrs, epochs, self.place)


def _functions_of_the_epoch() -> dict[str, Callable[..., Any]]:
    """Return the classes whose rate is a function of the epoch, by name."""
    classes = {name: kind for name, kind in vars(lr_scheduler).items() if not name.startswith("_") and name not in (PLATEAU, *REFUSED)}
    ours = {MultiStepMultiGammaLR.__name__: MultiStepMultiGammaLR}
    return {name: kind for name, kind in (classes | ours).items() if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)}


def _dummy(base_lrs: Sequence[float]) -> Optimizer:
    """Make an optimizer with these rates and nothing to optimize; some schedulers need a momentum."""
    return SGD([{"params": [torch.zeros(())], "lr": rate} for rate in base_lrs], lr=1.0, momentum=0.9)


def _rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _make(kind: Callable[..., Any], arguments: Mapping[str, Any], optimizer: Optimizer, place: Place) -> Any:
    """Make a scheduler with the file's arguments."""
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
    except Exception as error:  # a constructor may raise anything for an unexpected value
        raise place.error(_refusal(kind, error)) from None


def _reader(parameter: inspect.Parameter) -> Reader:
    """Return the reader of an argument, by the type that torch declares for it, or by the type of its default."""
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


def _checked(rate: Any, epoch: int, class_name: str, place: Place) -> float:
    try:
        value = float(rate)
    except (TypeError, ValueError, OverflowError):  # a power of a negative number is complex
        value = math.nan
    if not math.isfinite(value) or value < -1e-12:
        raise place.error(f"{class_name} makes the learning rate {shown(rate)} in epoch {epoch}; it must be at least 0 and finite")
    return max(value, 0.0)
