"""The loop: ``fit`` trains, ``evaluate`` measures. Everything else that happens in a run is a hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import distributed
from utils.ema import EMA
from utils.errors import UserError
from utils.loaders import Batch, mix_seed
from utils.metrics import Evaluation, Tally
from utils.optim import LearningRate
from utils.precision import Precision
from utils.spec import ModelSpec
from utils.transforms import normalise


@dataclass
class Run:
    """The whole state of a training run, which every hook receives.

    Attributes:
        model: the bare network, whose weights are trained.
        network: what is called in the forward pass: ``model``, or its DDP or compiled wrapper.
        batches: (epoch, first step) -> the rest of the epoch's batches.
        mix: changes a batch's images and labels (mixup, cutmix).
        criterion: (outputs, targets) -> loss.
        validate: measures a network on the validation split.
        epoch, step: where the run is; ``step`` counts batches within the epoch.
        loss_parts: named parts of the last batch's loss, for the log.
        stop: set by a hook to end the run after this epoch; says why.
        interrupted: set from outside (a signal) to end the run after this optimizer step.
    """

    model: nn.Module
    spec: ModelSpec
    ema: EMA | None
    optimizer: Optimizer
    learning_rate: LearningRate
    precision: Precision
    batches: Callable[[int, int], Iterable[Batch]]
    steps_per_epoch: int
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    criterion: Callable[[Tensor, Tensor], Tensor]
    validate: Callable[[nn.Module], Evaluation]
    epochs: int
    network: Callable[[Tensor], Tensor]
    accumulate: int = 1
    clip_norm: float = 10.0
    seed: int = 0

    epoch: int = 0
    step: int = 0
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_parts: dict[str, Tensor] = field(default_factory=dict)
    loss_sum: float = 0.0
    images_seen: int = 0
    unreadable: set[int] = field(default_factory=set)
    evaluation: Evaluation | None = None
    stop: str = ""
    interrupted: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = self.precision.scaler()

    @property
    def averaged(self) -> nn.Module:
        """The network that is validated and saved: the moving average, or the model itself without one."""
        return self.ema.model if self.ema else self.model

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.precision.device

    @property
    def group_size(self) -> int:
        """Batches in the current accumulation group; an epoch's last group may be shorter."""
        return min(self.accumulate, self.steps_per_epoch - self.step // self.accumulate * self.accumulate)

    @property
    def ends_group(self) -> bool:
        """Whether the optimizer steps after the current batch."""
        return (self.step + 1) % self.accumulate == 0 or self.step + 1 == self.steps_per_epoch


class Hook:
    """Something that takes part in a run. Every method may be left out; ``before_backward_pass`` may return a new loss."""

    def on_run_begin(self, run: Run) -> None:
        """Before the first epoch of this process, after a resume's state was loaded."""

    def on_epoch_begin(self, run: Run) -> None:
        """Before an epoch's first batch, in training mode; ``run.step`` is above 0 where an interrupted epoch goes on."""

    def on_minibatch_begin(self, run: Run) -> None:
        """Before the forward pass; inputs and targets are set."""

    def before_backward_pass(self, run: Run) -> Tensor | None:
        """After the forward pass; outputs and loss are set. A returned tensor becomes the loss."""

    def before_parameter_optimization(self, run: Run) -> None:
        """Gradients are complete, unscaled and clipped."""

    def on_minibatch_end(self, run: Run) -> None:
        """After the optimizer step (or, while accumulating, after the backward pass) and the EMA update."""

    def on_epoch_end(self, run: Run) -> None:
        """After validation; ``run.evaluation`` is set."""

    def on_run_end(self, run: Run) -> None:
        """After the last epoch, also of a run that stops early; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""


def fit(run: Run, hooks: Sequence[Hook], save: Callable[[Run], None]) -> None:
    """Train from ``run.epoch``, ``run.step`` to the last epoch.

    ::

        for epoch:                              on_epoch_begin
            for batch:                          on_minibatch_begin
                outputs = network(inputs); loss = criterion(outputs, targets)
                                                before_backward_pass      -> may return a new loss
                backward
                if the accumulation group ends:
                    unscale, clip               before_parameter_optimization
                    optimizer step, EMA
                                                on_minibatch_end
            validate                            on_epoch_end
            save

    Hooks are called in their order. Every batch draws from a generator of its own, seeded by (seed, rank, epoch,
    step), so that a run that is interrupted and resumed makes the same draws as one that is not.

    Args:
        run: the state, which is advanced.
        hooks: what else happens.
        save: writes a checkpoint; called after every epoch, and once when the run is interrupted.

    Raises:
        UserError: the loss is no longer finite.
    """
    for hook in hooks:
        hook.on_run_begin(run)
    while run.epoch < run.epochs and not run.stop:
        run.model.train()
        for hook in hooks:
            hook.on_epoch_begin(run)
        for batch in run.batches(run.epoch, run.step):
            train_step(run, hooks, batch)
            run.step += 1
            if run.step % run.accumulate == 0 and distributed.any_rank(run.interrupted, run.device):
                run.interrupted = True
                gather_loss(run)
                save(run)
                return
        finish_epoch(run)
        for hook in hooks:
            hook.on_epoch_end(run)
        run.epoch, run.step, run.loss_sum, run.images_seen = run.epoch + 1, 0, 0.0, 0
        save(run)
        if distributed.any_rank(run.interrupted, run.device) and run.epoch < run.epochs and not run.stop:
            run.interrupted = True
            return
    run.interrupted = False
    for hook in hooks:
        hook.on_run_end(run)


def train_step(run: Run, hooks: Sequence[Hook], batch: Batch) -> None:
    """Process one batch; step the optimizer where it ends an accumulation group."""
    torch.manual_seed(mix_seed(run.seed, distributed.rank(), run.epoch, run.step))
    run.unreadable.update(batch.unreadable)
    images, labels = batch.images.to(run.device, non_blocking=True), batch.labels.to(run.device, non_blocking=True)
    run.inputs, run.targets = run.mix(normalise(images, run.spec), labels)
    for hook in hooks:
        hook.on_minibatch_begin(run)
    run.learning_rate.apply_(run.optimizer, run.epoch + (run.step + 1) / run.steps_per_epoch)
    delays_sync = not run.ends_group and hasattr(run.network, "no_sync")
    with run.network.no_sync() if delays_sync else nullcontext():  # type: ignore[attr-defined]
        with run.precision.autocast():
            run.outputs = run.network(run.inputs)
        run.loss = run.criterion(run.outputs.float(), run.targets)
        run.loss_parts = {"classification": run.loss.detach()}
        for hook in hooks:
            changed = hook.before_backward_pass(run)
            if changed is not None:
                run.loss = changed
        loss = run.loss.item()
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise UserError(
                f"the loss became {loss} in epoch {run.epoch + 1}, step {run.step + 1}; lower --lr0 "
                f"(now {run.learning_rate.lr0:g}), raise --warmup-epochs, or use --no-amp"
            )
        run.scaler.scale(run.loss / run.group_size).backward()
    run.loss_sum += loss * len(labels)
    run.images_seen += len(labels)
    if run.ends_group:
        run.scaler.unscale_(run.optimizer)
        trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, run.clip_norm)
        for hook in hooks:
            hook.before_parameter_optimization(run)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.update_(run.model)
    for hook in hooks:
        hook.on_minibatch_end(run)


def gather_loss(run: Run) -> None:
    """Add up the epoch's training loss over all ranks, into rank 0; the others start from nothing."""
    sums = torch.tensor([run.loss_sum, run.images_seen], dtype=torch.float64, device=run.device)
    loss_sum, images_seen = distributed.sum_(sums).tolist()
    run.loss_sum, run.images_seen = (loss_sum, round(images_seen)) if distributed.is_main() else (0.0, 0)


def finish_epoch(run: Run) -> None:
    """Gather the training loss of all ranks and validate the averaged network."""
    gather_loss(run)
    if run.ema:
        run.ema.synchronise_()
    run.evaluation = run.validate(run.averaged)


def classifier(network: nn.Module, spec: ModelSpec, precision: Precision) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images [B, S, S, C] to float32 logits [B, classes] on the network's device."""

    def classify(images: Tensor) -> Tensor:
        inputs = normalise(images.to(precision.device, non_blocking=True), spec)
        with precision.autocast():
            outputs = network(inputs)
        logits: Tensor = outputs.float()
        return logits

    return classify


@torch.inference_mode()
def evaluate(
    classify: Callable[[Tensor], Tensor],
    num_classes: int,
    batches: Iterable[Batch],
    device: torch.device,
    name_of: Callable[[int], str],
) -> Evaluation:
    """Measure a classifier on batches, which under torchrun are this rank's share; the result covers all ranks.

    Args:
        classify: uint8 images [B, S, S, C] -> logits [B, classes].
        num_classes: number of logits.
        batches: images and labels.
        device: where the classifier computes.
        name_of: the name of the image at a position, for the list of unreadable ones.

    Raises:
        UserError: no image could be read.
    """
    tally = Tally.empty(num_classes)
    seconds = {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0}
    images = 0
    unreadable: set[str] = set()
    for batch in batches:
        start = time.perf_counter()
        logits = classify(batch.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = time.perf_counter()
        tally.add(logits, batch.labels.to(logits.device))
        images += len(batch.labels)
        unreadable |= {name_of(position) for position in batch.unreadable}
        seconds["preprocess"] += batch.seconds
        seconds["inference"] += done - start
        seconds["postprocess"] += time.perf_counter() - done
    speed_ms = {stage: round(total / max(images, 1) * 1e3, 4) for stage, total in seconds.items()}
    return Evaluation.of(tally.over_all_ranks(device), speed_ms=speed_ms, unreadable=tuple(sorted(unreadable)))
