"""A schedule in your own training loop: six calls, without train.py.

::

    loop = ScheduledLoop("schedule.yaml", model, optimizer, epochs, len(loader), examples)
    for epoch in range(epochs):
        loop.on_epoch_begin(epoch)                                                      # 1
        for step, (inputs, targets) in enumerate(loader):
            loop.on_minibatch_begin(step, inputs, targets)                              # 2
            outputs = model(inputs)
            loss = loop.before_backward_pass(outputs, criterion(outputs, targets))      # 3
            optimizer.zero_grad(); loss.backward()
            loop.before_parameter_optimization()                                        # 4
            optimizer.step()
            loop.on_minibatch_end()                                                     # 5
        loop.on_epoch_end(evaluation)                                                   # 6
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compression.pruning.narrowing import spec_of
from compression.schedule.reading import parse_schedule, read_schedule
from compression.schedule.scheduler import CompressionScheduler, report_on_main
from compression.scoring.calibration import Calibration
from models.networks.widths import group_counts, resize_
from models.quantized.preparing import weights_by_name
from utils.errors import UserError
from utils.loop.ema import EMA
from utils.loop.hooks import LoopState
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec

BATCH = 32


@dataclass(frozen=True)
class Examples(Calibration):
    """Calibration images that are already normalised: float32 [N, C, H, W]."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, len(self), self.batch_size):
            yield self.images[begin : begin + self.batch_size], self.labels[begin : begin + self.batch_size]

    def head(self, count: int) -> Calibration:
        return Examples(self.images[:count], self.labels[:count], self.spec, self.batch_size)


def _pair(examples: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and labels.

    Raises:
        UserError: they are not a pair of tensors of as many entries.
    """
    if examples is None:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    if not (isinstance(examples, tuple | list) and len(examples) == 2 and all(isinstance(part, Tensor) for part in examples)):
        kind = f"{type(examples).__name__} of {len(examples)}" if isinstance(examples, tuple | list) else type(examples).__name__
        raise UserError(f"examples is a {kind}; expected a pair of tensors, inputs [N, C, H, W] as the network sees them and labels [N]")
    inputs, labels = examples
    if inputs.ndim < 2 or labels.ndim < 1 or len(inputs) != len(labels):
        shapes = f"{list(inputs.shape)} and {list(labels.shape)}"
        raise UserError(f"examples have the shapes {shapes}; expected inputs [N, C, H, W] and as many labels [N]")
    return inputs, labels


class ScheduledLoop:
    """Applies a schedule in your own training loop.

    Args:
        schedule: the YAML file, or its content as a mapping.
        model: the bare network; under DDP, the wrapped module. If the schedule removes channels, wrap it again in
            ``restructured``.
        optimizer: any of torch.optim.
        epochs, steps_per_epoch: of the loop.
        examples: some inputs and labels as the network sees them, for proofs of thinning and for measurements.
        ema: a moving average of the model, if the loop keeps one (and updates it before ``on_minibatch_end``).
        spec: of the network; only needed for distillation.
        seed: of pruners that draw at random.
        restructured: called after channels were cut.
        report: receives one line per event.

    Raises:
        UserError: the schedule does not fit; the message names the place in the file.
    """

    def __init__(
        self,
        schedule: str | Path | Mapping[str, Any],
        model: nn.Module,
        optimizer: Optimizer,
        epochs: int,
        steps_per_epoch: int,
        examples: tuple[Tensor, Tensor] | None = None,
        ema: EMA | None = None,
        spec: ModelSpec | None = None,
        seed: int = 0,
        restructured: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = report_on_main,
    ) -> None:
        if not isinstance(schedule, str | Path | Mapping):
            raise UserError(f"schedule is a {type(schedule).__name__}; expected the path of a YAML file, or its content as a mapping")
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise UserError(f"expected a module and its optimizer, not {type(model).__name__} and {type(optimizer).__name__}")
        self.state = LoopState(
            model=model,
            optimizer=optimizer,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            spec=spec,
            ema=ema,
            seed=seed,
            restructured=restructured,
        )
        names = {name: parameter.ndim for name, parameter in weights_by_name(model).items()}
        read = parse_schedule(schedule, names) if isinstance(schedule, Mapping) else read_schedule(schedule, names)
        inputs, labels = _pair(examples)
        calibration = Examples(inputs, labels, spec or ModelSpec("", 1), BATCH)
        self.scheduler = CompressionScheduler(read, self.state, lambda: calibration, report)
        for line in self.scheduler.describe():
            report(f"schedule {line}")

    def on_epoch_begin(self, epoch: int, step: int = 0) -> None:
        """Call before an epoch's first batch, or before its batch ``step`` when resuming within the epoch."""
        self.state.epoch, self.state.step = epoch, step
        self.scheduler.on_epoch_begin(self.state)

    def on_minibatch_begin(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Call before the forward pass; channels may be cut here."""
        self.state.step, self.state.inputs, self.state.targets = step, inputs, targets
        self.scheduler.on_minibatch_begin(self.state)

    def before_backward_pass(self, outputs: Tensor, loss: Tensor) -> Tensor:
        """Call after the forward pass; returns the loss with the terms of regularizers and distillation."""
        self.state.outputs, self.state.loss, self.state.loss_parts = outputs, loss, {"classification": loss}
        return self.scheduler.before_backward_pass(self.state)

    def before_parameter_optimization(self) -> None:
        """Call when gradients are complete, before the optimizer's step."""
        self.scheduler.before_parameter_optimization(self.state)

    def on_minibatch_end(self) -> None:
        """Call after the optimizer's step."""
        self.scheduler.on_minibatch_end(self.state)

    def on_epoch_end(self, evaluation: Evaluation | None = None) -> None:
        """Call after the validation; only ReduceLROnPlateau needs its result. Sets the next epoch's learning rate."""
        self.state.evaluation = evaluation
        self.scheduler.on_epoch_end(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, besides the model's and the optimizer's: tensors and JSON-able values."""
        shapes = {name: list(tensor.shape) for name, tensor in self.state.model.state_dict().items()}
        structure = {"shapes": shapes, "groups": group_counts(self.state.model), "plan": self.state.plan}
        return {"scheduler": self.scheduler.state_dict(), "structure": structure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, before the model's and the optimizer's: a thinned network gets its widths here."""
        structure, model, optimizer = state["structure"], self.state.model, self.state.optimizer
        old, counts = weights_by_name(model), group_counts(model)
        shapes = {name: torch.empty(shape, device="meta") for name, shape in structure["shapes"].items()}
        resize_(model, shapes, structure["groups"])
        if self.state.ema:
            resize_(self.state.ema.model, shapes, structure["groups"])
        new = weights_by_name(model)
        renewed = {parameter: new[name] for name, parameter in old.items()}
        for group in optimizer.param_groups:
            group["params"] = [renewed.get(parameter, parameter) for parameter in group["params"]]
        self.state.plan = structure["plan"]
        if self.state.spec:
            self.state.spec = spec_of(self.state.spec, counts, model)
        self.scheduler.load_state_dict(state["scheduler"])
        if any(old[name] is not new[name] for name in old):
            self.state.restructured()
