"""What takes part in a training run: hooks, and the state that every one of them receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.loop.ema import EMA
from utils.loop.precision import Precision
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec


@dataclass(kw_only=True)
class LoopState:
    """Where a training loop is, whoever runs it: ``engine.fit``, whose ``Run`` is one of these, or a loop of one's own.

    Attributes:
        model: the bare network, whose weights are trained.
        spec: of the network, where it has one.
        plan: which channels of the dense network are left, where some were cut.
        epoch, step: where the loop is; ``step`` counts batches within the epoch.
        loss_parts: named parts of the last batch's loss as they enter it, on the tape during ``before_backward_pass``.
        evaluation: of the last validation.
        metrics: further figures of the epoch, for the log.
        restructured: called after channels were cut and parameters replaced; whoever holds the old ones renews them.
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
        """The network that is validated and saved: the moving average, or the model itself without one."""
        return self.ema.model if self.ema else self.model

    @property
    def steps(self) -> int:
        """Batches since the first epoch."""
        return self.epoch * self.steps_per_epoch + self.step


class Hook:
    """Something that takes part in a run. Every method may be left out; ``before_backward_pass`` may return a new loss."""

    def on_run_begin(self, run: Any) -> None:
        """Before the first epoch of this process, after a resume's state was loaded."""

    def on_epoch_begin(self, run: Any) -> None:
        """Before an epoch's first batch, in training mode; ``run.step`` is above 0 where an interrupted epoch goes on."""

    def on_minibatch_begin(self, run: Any) -> None:
        """Before the forward pass; inputs and targets are set."""

    def before_backward_pass(self, run: Any) -> Tensor | None:
        """After the forward pass; outputs and loss are set. A returned tensor becomes the loss."""

    def before_parameter_optimization(self, run: Any) -> None:
        """Gradients are complete, unscaled and clipped."""

    def on_minibatch_end(self, run: Any) -> None:
        """After the optimizer step (or, while accumulating, after the backward pass) and the EMA update."""

    def on_epoch_end(self, run: Any) -> None:
        """After validation; ``run.evaluation`` is set."""

    def on_run_end(self, run: Any) -> None:
        """After the last epoch, also of a run that stops early; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
