"""Networks of the user's own code: a factory by name, for as long as the process lives."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn

from models.networks.plain_weights import fold_weights_
from utils.errors import UserError

PREFIX = "own/"
_factories: dict[str, Callable[[], nn.Module]] = {}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside what DataParallel, DDP and torch.compile put around it."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def register(network: nn.Module | Callable[[], nn.Module]) -> str:
    """Make a network known under the name of its class, and return that name.

    Args:
        network: a module, of which copies are built; or what returns a new one: a class that takes no arguments, a function.

    Raises:
        UserError: it is neither.
    """
    if isinstance(network, nn.Module):
        original = deepcopy(unwrapped(network)).cpu()
        fold_weights_(original)
        factory: Callable[[], nn.Module] = partial(deepcopy, original)
    else:
        factory, original = network, network() if callable(network) else network
        if not isinstance(original, nn.Module):
            raise UserError(f"network must be a module, or a class or function that makes one, and not {original!r}")
    name = PREFIX + type(original).__name__
    _factories[name] = factory
    return name


def build(name: str) -> nn.Module:
    """Build a registered network.

    Raises:
        UserError: it was not registered.
    """
    if name not in _factories:
        kind = name.removeprefix(PREFIX)
        raise UserError(f"{kind} is a network of your own code, which is not in the file: rankcut.load(FILE, network={kind})")
    model = unwrapped(_factories[name]())
    fold_weights_(model)
    return model.train()
