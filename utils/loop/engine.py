"""The training loop: ``fit`` trains, ``evaluate`` measures; everything else in a run is a hook."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils import distributed
from utils.data.loaders import Batch, mix_seed
from utils.data.transforms import normalise
from utils.errors import UserError
from utils.loop.hooks import Hook, LoopState, notify
from utils.loop.optim import LearningRate
from utils.loop.precision import Precision
from utils.measures.metrics import Evaluation, Tally
from utils.spec import ModelSpec


@dataclass(kw_only=True)
class Run(LoopState):
    """The whole state of a training run, passed to every hook.

    Attributes:
        network: what the forward pass calls: ``model``, or its DDP or compiled wrapper.
        learning_rate: sets the rate at every step; None if a hook sets it.
        batches: (epoch, first step) -> the rest of the epoch's batches.
        mix: mixes a batch's images and labels (mixup, cutmix).
        criterion: (outputs, targets) -> loss.
        validate: measures a network on the validation split.
        loss_sums: over the epoch's images so far, of the "loss" and of each of its named parts.
        stop: the reason to end the run after this epoch, set by a hook.
        interrupted: set from outside (by a signal) to end the run after this optimizer step.
    """

    spec: ModelSpec
    precision: Precision
    learning_rate: LearningRate | None
    batches: Callable[[int, int], Iterable[Batch]]
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    criterion: Callable[[Tensor, Tensor], Tensor]
    validate: Callable[[nn.Module], Evaluation]
    network: Callable[[Tensor], Tensor]
    accumulate: int = 1
    clip_norm: float = 10.0

    loss_sums: dict[str, float] = field(default_factory=dict)
    images_seen: int = 0
    unreadable: set[int] = field(default_factory=set)
    stop: str = ""
    interrupted: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = self.precision.scaler()

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.precision.device

    @property
    def group_size(self) -> int:
        """Batches in the current accumulation group; an epoch's last group may be shorter."""
        return min(self.accumulate, self.steps_per_epoch - self.step // self.accumulate * self.accumulate)

    def gradient_sync(self) -> AbstractContextManager[None]:
        """Return the context of a backward pass: processes exchange gradients only at the end of an accumulation group."""
        delays = not self.ends_group and hasattr(self.network, "no_sync")
        return self.network.no_sync() if delays else nullcontext()  # type: ignore[attr-defined]

    @property
    def ends_group(self) -> bool:
        """Whether the optimizer steps after the current batch."""
        return (self.step + 1) % self.accumulate == 0 or self.step + 1 == self.steps_per_epoch


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

    Hooks are called in their order. Each batch draws from its own generator, seeded by (seed, rank, epoch, step), so
    that a run that was interrupted and resumed makes the same draws as one that was not.

    Args:
        run: the state, which is advanced.
        hooks: what else happens.
        save: writes a checkpoint; called after every epoch, and once when the run is interrupted.

    Raises:
        UserError: the loss is no longer finite.
    """
    notify(hooks, "on_run_begin", run)
    while run.epoch < run.epochs and not run.stop:
        train_epoch(run, hooks)
        save(run)
        if run.interrupted:
            return
    notify(hooks, "on_run_end", run)


def train_epoch(run: Run, hooks: Sequence[Hook]) -> None:
    """Train from ``run.step`` to the end of the epoch and validate, or until the run is interrupted."""
    run.model.train()
    run.metrics = {}
    notify(hooks, "on_epoch_begin", run)
    for batch in run.batches(run.epoch, run.step):
        train_step(run, hooks, batch)
        run.step += 1
        if run.step % run.accumulate == 0 and distributed.any_rank(run.interrupted, run.device):
            run.interrupted = True
            gather_loss(run)
            return
    gather_loss(run)
    if run.ema:
        run.ema.synchronise_()
    run.evaluation = run.validate(run.averaged)
    notify(hooks, "on_epoch_end", run)
    run.epoch, run.step, run.loss_sums, run.images_seen = run.epoch + 1, 0, {}, 0
    continues = run.epoch < run.epochs and not run.stop
    run.interrupted = distributed.any_rank(run.interrupted, run.device) and continues


def train_step(run: Run, hooks: Sequence[Hook], batch: Batch) -> None:
    """Train on one batch; the optimizer takes a step at the end of an accumulation group."""
    torch.manual_seed(mix_seed(run.seed, distributed.rank(), run.epoch, run.step))
    load_batch(run, batch)
    notify(hooks, "on_minibatch_begin", run)
    if run.learning_rate:
        run.learning_rate.apply_(run.optimizer, run.epoch + (run.step + 1) / run.steps_per_epoch)
    with run.gradient_sync():
        compute_loss(run, hooks)
        check_finite(run)
        run.scaler.scale(run.loss / run.group_size).backward()
    record_loss(run)
    if run.ends_group:
        step_optimizer(run, hooks)
    notify(hooks, "on_minibatch_end", run)


def load_batch(run: Run, batch: Batch) -> None:
    """Move a batch to the device, normalise and mix it."""
    images, labels = batch.images.to(run.device, non_blocking=True), batch.labels.to(run.device, non_blocking=True)
    run.inputs, run.targets = run.mix(normalise(images, run.spec), labels)
    run.unreadable.update(batch.unreadable)


def compute_loss(run: Run, hooks: Sequence[Hook]) -> None:
    """Run the forward pass and compute the loss, which any hook may replace."""
    with run.precision.autocast():
        run.outputs = run.network(run.inputs)
    run.loss = run.criterion(run.outputs.float(), run.targets)
    run.loss_parts = {"classification": run.loss}
    for hook in hooks:
        replaced = hook.before_backward_pass(run)
        if replaced is not None:
            run.loss = replaced


def check_finite(run: Run) -> None:
    """Check that training has not diverged.

    Raises:
        UserError: the loss is infinite or not a number.
    """
    if not math.isfinite(loss := run.loss.item()):
        raise UserError(
            f"the loss became {loss} in epoch {run.epoch + 1}, step {run.step + 1}; lower --lr0 "
            f"(the rate is now {run.optimizer.param_groups[0]['lr']:g}), raise --warmup-epochs, or use --no-amp"
        )


def record_loss(run: Run) -> None:
    """Take the loss and its parts off the tape and add them to the epoch's sums."""
    run.loss, run.loss_parts = run.loss.detach(), {name: part.detach() for name, part in run.loss_parts.items()}
    for name, value in {"loss": run.loss, **run.loss_parts}.items():
        run.loss_sums[name] = run.loss_sums.get(name, 0.0) + float(value) * len(run.inputs)
    run.images_seen += len(run.inputs)


def step_optimizer(run: Run, hooks: Sequence[Hook]) -> None:
    """Clip the gradients, update the weights and their moving average, and clear the gradients."""
    run.scaler.unscale_(run.optimizer)
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, run.clip_norm)
    notify(hooks, "before_parameter_optimization", run)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update_(run.model)


def gather_loss(run: Run) -> None:
    """Sum the epoch's training losses of all ranks on rank 0, and clear them on the others."""
    names = distributed.broadcast(sorted(run.loss_sums))
    values = [*(run.loss_sums.get(name, 0.0) for name in names), run.images_seen]
    *sums, images_seen = distributed.sum_(torch.tensor(values, dtype=torch.float64, device=run.device)).tolist()
    main = distributed.is_main()
    run.loss_sums, run.images_seen = (dict(zip(names, sums, strict=True)), round(images_seen)) if main else ({}, 0)


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
    """Measure a classifier; under torchrun each rank passes its share of the batches, and the result covers them all.

    Args:
        classify: uint8 images [B, S, S, C] -> logits [B, classes], computed on ``device``.
        name_of: position -> name of an image, for the list of unreadable ones.

    Raises:
        UserError: no image could be read.
    """
    tally = Tally.empty(num_classes)
    seconds = {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0}
    images = 0
    unreadable: set[str] = set()
    hits: list[Tensor] = []
    for batch in batches:
        start = time.perf_counter()
        logits = classify(batch.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = time.perf_counter()
        tally.add(logits, batch.labels.to(logits.device))
        readable = batch.labels >= 0
        hits.append(logits.argmax(1).cpu()[readable] == batch.labels[readable])
        images += len(batch.labels)
        unreadable |= {name_of(position) for position in batch.unreadable}
        seconds["preprocess"] += batch.seconds
        seconds["inference"] += done - start
        seconds["postprocess"] += time.perf_counter() - done
    speed_ms = {stage: round(total / max(images, 1) * 1e3, 4) for stage, total in seconds.items()}
    correct = torch.cat(hits) if hits and distributed.world_size() == 1 else None
    return Evaluation.of(tally.over_all_ranks(device), speed_ms=speed_ms, unreadable=tuple(sorted(unreadable)), correct=correct)
