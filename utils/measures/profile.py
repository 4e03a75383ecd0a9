"""Size and cost of a network: parameters, multiply-adds, latency.

Only the multiply-adds of convolutions and matrix products count, not those of biases, norms, activations and pooling.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import UserError
from utils.modes import eval_mode
from utils.spec import ModelSpec


@dataclass(frozen=True)
class Profile:
    """Parameters, and multiply-adds for one image; ``source`` says what counted them, and why if it was not thop."""

    params: int
    macs: int
    source: str


def profile(model: nn.Module, spec: ModelSpec) -> Profile:
    """Count a network's parameters and multiply-adds at its input size, batch 1.

    thop counts and torch's flop counter checks it; the latter takes over if thop is missing or overlooks operations.

    Raises:
        UserError: the network does not take images of this size.
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = count_macs(model, spec)
    counted = thop_macs(model, spec)
    if counted is None:
        return Profile(params, macs, "torch.utils.flop_counter (thop is not usable here)")
    if counted != macs:
        return Profile(params, macs, f"torch.utils.flop_counter (thop misses operations here: it counts {counted:,})")
    return Profile(params, macs, "thop")


def example_input(model: nn.Module, spec: ModelSpec, batch_size: int = 1) -> torch.Tensor:
    """Return zeros of the network's input shape, on its device."""
    device = next(model.parameters()).device
    return torch.zeros(batch_size, spec.channels, *spec.size, device=device)


@torch.inference_mode()
def measure_latency(models: Sequence[nn.Module], inputs: torch.Tensor, passes: int = 30, warm_up: int = 5) -> list[list[float]]:
    """Time forward passes of several networks in turn, so that noise affects all of them alike.

    Returns:
        Milliseconds of each pass, a list per network; take the median.
    """
    times: list[list[float]] = [[] for _ in models]
    for turn in range(warm_up + passes):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(inputs)
            if inputs.device.type == "cuda":
                torch.cuda.synchronize(inputs.device)
            if turn >= warm_up:
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def count_macs(model: nn.Module, spec: ModelSpec) -> int:
    """Count the multiply-adds of convolutions and matrix products of one image with torch's flop counter.

    Attention is computed by its plain products meanwhile: of the fused ones on a CPU the counter knows nothing.

    Raises:
        UserError: the network does not take images of this size.
    """
    counter = FlopCounterMode(display=False)
    with eval_mode(model), torch.no_grad(), _without_gradients(model), sdpa_kernel(SDPBackend.MATH), counter:
        try:
            model(example_input(model, spec))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{spec.name} does not take images of {spec.size_text} ({reason}); choose another --imgsz") from None
    return int(counter.get_total_flops()) // 2


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient: a view of one that a module is called with would stop the counter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def thop_macs(model: nn.Module, spec: ModelSpec) -> int | None:
    """Count with thop, without its terms for norms, activations and pooling; None if thop can't be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # thop compares versions in a way that is going away
            import thop  # unmaintained: its older releases need distutils, which Python 3.12 no longer has
            from thop.profile import register_hooks
    except ImportError:
        return None
    counted = (nn.modules.conv._ConvNd, nn.Linear)
    ignored = {kind: lambda *_: None for kind in register_hooks if not issubclass(kind, counted)}
    copy = deepcopy(model).eval()  # thop leaves hooks and buffers behind
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        macs, _ = thop.profile(copy, inputs=(example_input(model, spec),), custom_ops=ignored, verbose=False)
    return int(macs)
