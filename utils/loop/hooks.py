"""Hooks: code that runs at fixed points of a training loop, and the state that is passed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.loop.ema import EMA
from utils.loop.precision import Precision
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec


@dataclass(kw_only=True)
class LoopState:
    """The state of a training loop: of ``engine.fit``, whose ``Run`` extends it, or of a user's own loop.

    Attributes:
        model: the bare network, whose weights are trained.
        spec: the network's specification, if it has one.
        plan: which channels of the dense network are left, if some were cut.
        epoch, step: the position of the loop; ``step`` counts batches within the epoch.
        loss_parts: named parts of the last batch's loss, as weighted in it; on the tape during ``before_backward_pass``.
        evaluation: the result of the last validation.
        metrics: further figures of the epoch, for the log.
        restructured: called after channels were cut and parameters replaced, for whatever holds the old ones.
    """

    model: nn.Module
    optimizer: Optimizer
    epochs: int
    steps_per_epoch: int
    spec: ModelSpec | None = None
    ema: EMA | None = None
    precision: Precision | None = None
    plan: dict[str, Any] | None = None
    seed: int = 0

    epoch: int = 0
    step: int = 0
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_parts: dict[str, Tensor] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    restructured: Callable[[], None] = lambda: None

    @property
    def averaged(self) -> nn.Module:
        """The network that is validated and saved: the moving average if there is one, else the model."""
        return self.ema.model if self.ema else self.model

    @property
    def steps(self) -> int:
        """Batches since the first epoch."""
        return self.epoch * self.steps_per_epoch + self.step


class Hook:
    """Runs at fixed points of a training run. All methods are optional; ``before_backward_pass`` may return a new loss."""

    def on_run_begin(self, run: Any) -> None:
        """Before the first epoch of this process, after the state of a resumed run was loaded."""

    def on_epoch_begin(self, run: Any) -> None:
        """Before an epoch's first batch, in training mode; ``run.step`` is above 0 if an interrupted epoch continues."""

    def on_minibatch_begin(self, run: Any) -> None:
        """Before the forward pass; inputs and targets are set."""

    def before_backward_pass(self, run: Any) -> Tensor | None:
        """After the forward pass; outputs and loss are set. A returned tensor becomes the loss."""

    def before_parameter_optimization(self, run: Any) -> None:
        """Before the optimizer step; gradients are complete, unscaled and clipped."""

    def on_minibatch_end(self, run: Any) -> None:
        """After the backward pass, and after the optimizer step and the EMA update if there was one."""

    def on_epoch_end(self, run: Any) -> None:
        """After validation; ``run.evaluation`` is set."""

    def on_run_end(self, run: Any) -> None:
        """After the last epoch, also if the run stops early, but not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


Event = Literal[
    "on_run_begin",
    "on_epoch_begin",
    "on_minibatch_begin",
    "before_parameter_optimization",
    "on_minibatch_end",
    "on_epoch_end",
    "on_run_end",
]


def notify(hooks: Iterable[Hook], event: Event, run: Any) -> None:
    """Call the same method of every hook, in order."""
    for hook in hooks:
        getattr(hook, event)(run)
