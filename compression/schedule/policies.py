"""The policies that prune, regularize and set the learning rate; those that thin, quantize or distil have their own files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compression.schedule.learning_rates import Plateau
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.policy import Policy
from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from compression.schedule.regularizers.grouped import GroupRegularizer
from compression.schedule.regularizers.regularizer import Regularizer
from compression.schedule.schedule import PolicyEntry
from models.quantized.preparing import weights_by_name
from utils import distributed
from utils.data.loaders import mix_seed
from utils.errors import UserError
from utils.loop.hooks import LoopState
from utils.options import boolean, by_parameter, integer, number, option, optional


@dataclass(frozen=True)
class PruningOptions:
    """The ``args`` of a pruner's policy, with Distiller's meaning.

    Attributes:
        levels: replace the pruner's own levels.
        keep_mask: what the window's last masks hide is pruned for good (otherwise, double copies come back).
        mini_batch_pruning_frequency: ask the pruner again after every so many batches.
        mask_on_forward_only: with double copies, weights are masked in the forward pass and trained in full. Without them
            it has no effect here: validation and checkpoints always use masked weights.
        mask_gradients: under a double mask, train only the kept weights.
        use_double_copies: keep the values behind the masks.
        discard_masks_at_minibatch_end: a mask lasts for one batch; then what it hid comes back. (In Distiller it was lost
            unless use_double_copies was set too.)
        skip_first_minibatch: in the window's first epoch, ask after the first batch and not before it.
        fold_batchnorm: show the pruner the weights with batch norm folded in: w * gamma / sqrt(var + eps).
    """

    levels: dict[str, float] | None = option(optional(by_parameter(number(least=0, below=1))), None)
    keep_mask: bool = option(boolean, False)
    mini_batch_pruning_frequency: int = option(integer(), 0)
    mask_on_forward_only: bool = option(boolean, False)
    mask_gradients: bool = option(boolean, False)
    use_double_copies: bool = option(boolean, False)
    discard_masks_at_minibatch_end: bool = option(boolean, False)
    skip_first_minibatch: bool = option(boolean, False)
    fold_batchnorm: bool = option(boolean, False)

    def __post_init__(self) -> None:
        if self.mask_gradients and not self.mask_on_forward_only:
            raise UserError("mask_gradients needs mask_on_forward_only: plain masks always mask the gradients")

    @property
    def double(self) -> bool:
        """Whether the values behind the masks are kept."""
        return self.use_double_copies or self.discard_masks_at_minibatch_end


@dataclass(frozen=True)
class RegularizingOptions:
    """The ``args`` of a regularizer's policy: with ``keep_mask``, what is below its threshold at the window's end stays zero."""

    keep_mask: bool = option(boolean, False)


class PruningPolicy(Policy):
    """Asks a pruner at the beginning of each of its epochs, or every so many batches."""

    def __init__(self, entry: PolicyEntry, masks: Masks, measurements: Measurements) -> None:
        super().__init__(entry)
        self.pruner: Pruner = entry.instance
        self.options: PruningOptions = entry.options
        self.masks, self.measurements = masks, measurements

    def check(self) -> None:
        """Raise a UserError if the pruner can't prune the network as it is now."""
        self.pruner.check({name: parameter.detach() for name, parameter in weights_by_name(self.measurements.model).items()})

    def target_epoch(self, epochs: int) -> int:
        return -1 if self.options.discard_masks_at_minibatch_end else self.window.last_within(epochs)

    def on_epoch_begin(self, run: LoopState) -> None:
        skips = self.options.skip_first_minibatch and run.epoch == self.window.first and run.steps_per_epoch > 1
        if run.step == 0 and not skips:
            self._ask(run)

    def on_minibatch_begin(self, run: LoopState) -> None:
        every = self.options.mini_batch_pruning_frequency
        due = every and run.step > 0 and run.steps % every == 0
        late = self.options.skip_first_minibatch and run.epoch == self.window.first and run.step == 1
        if due or late:
            self._ask(run)

    def on_minibatch_end(self, run: LoopState) -> None:
        if self.options.discard_masks_at_minibatch_end:
            self.masks.release_(run, self.pruner.parameters(), double_only=False)

    def on_epoch_end(self, run: LoopState) -> None:
        if self.options.keep_mask and run.epoch == self.window.last_within(run.epochs):
            self.masks.keep_(run, self.pruner.parameters())

    def end_window(self, run: LoopState) -> None:
        if self.options.use_double_copies and not self.options.keep_mask:
            self.masks.release_(run, self.pruner.parameters())

    def _ask(self, run: LoopState) -> None:
        """Let the pruner decide, and apply its decision."""
        weights = {name: self.masks.full(name, parameter) for name, parameter in weights_by_name(run.model).items()}
        if self.options.fold_batchnorm:
            weights |= fold_batchnorm(run.model, weights, self.pruner.parameters())
        generator = torch.Generator().manual_seed(mix_seed(run.seed, zlib.crc32(self.name.encode()), run.epoch, run.step))
        task = PruningTask(
            moment=self.window.moment(run.epoch),
            weights=weights,
            masks=self.masks.values,
            generator=generator,
            filter_scores=self.measurements.filter_scores,
            gradients=self.measurements.gradients,
            model=run.model,
            images=self.measurements.images,
        )
        with torch.no_grad():
            decision = agreed(self.pruner.decide(task))
        scaled = any(not bool(((mask == 0) | (mask == 1)).all()) for mask in decision.masks.values())
        if scaled and not self.options.double:
            raise UserError(f"{type(self.pruner).__name__} compensates for the filters that it drops, which needs use_double_copies: true")
        self.masks.rewrite_(run, decision.weights)
        self.masks.set_(run, decision.masks, self.options.double, self.options.mask_gradients)

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state)


def agreed(decision: Decision) -> Decision:
    """Return rank 0's decision on every rank, since the last bits of a score may differ between machines."""
    if distributed.world_size() == 1:
        return decision
    masks = {name: mask.clone() for name, mask in decision.masks.items()}
    weights = {name: values.clone() for name, values in decision.weights.items()}
    distributed.broadcast_([*masks.values(), *weights.values()])
    return replace(decision, masks=masks, weights=weights)


def fold_batchnorm(model: nn.Module, weights: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the weights of the named convolutions with the batch norm that follows each folded in (arXiv:1806.08342).

    A batch norm follows a convolution if it is the next module in the network's order and has as many channels.
    """
    modules = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    folded = {}
    for (name, module), (_, norm) in pairwise(modules):
        is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None
        if f"{name}.weight" in names and isinstance(module, nn.Conv2d) and is_norm and norm.num_features == module.out_channels:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.detach()
            folded[f"{name}.weight"] = weights[f"{name}.weight"] * scale.view(-1, 1, 1, 1)
    return folded


class RegularizationPolicy(Policy):
    """Adds a regularizer's term to the loss, and zeroes what is below its threshold after every step.

    The moving average is zeroed too: what is validated and saved is as sparse as what is trained.
    """

    def __init__(self, entry: PolicyEntry, masks: Masks, report: Callable[[str], None]) -> None:
        super().__init__(entry)
        self.regularizer: Regularizer = entry.instance
        self.options: RegularizingOptions = entry.options
        self.masks, self.report = masks, report

    def target_epoch(self, epochs: int) -> int:
        keeps = self.options.keep_mask and self.regularizer.threshold_criteria is not None
        return self.window.last_within(epochs) if keeps else -1

    def before_backward_pass(self, run: LoopState) -> Tensor:
        term = self.regularizer.loss(weights_by_name(run.model))
        run.loss_parts[self.name] = term
        return run.loss + term

    def on_minibatch_end(self, run: LoopState) -> None:
        if self.regularizer.threshold_criteria is None:
            return
        parameters = weights_by_name(run.model)
        masks = self.regularizer.masks({name: parameter.detach() for name, parameter in parameters.items()})
        if self.options.keep_mask and run.epoch == self.window.last_within(run.epochs) and run.step == run.steps_per_epoch - 1:
            self.masks.set_(run, agreed(Decision(masks)).masks)
            return
        averages = weights_by_name(run.averaged)
        with torch.no_grad():
            for name, mask in masks.items():
                for tensor in (parameters[name], averages[name]):
                    tensor.mul_(mask)

    def on_epoch_end(self, run: LoopState) -> None:
        if isinstance(self.regularizer, GroupRegularizer) and run.epoch == self.window.last_within(run.epochs):
            self.report(f"{self.name}: {self.regularizer.distance(weights_by_name(run.model))}")


class LearningRatePolicy(Policy):
    """Sets the rates of the next epoch at the end of each of its epochs.

    Args:
        entry: of the schedule.
        rates: rate of each parameter group by epoch; or a ``Plateau``, which watches the validation.
    """

    def __init__(self, entry: PolicyEntry, rates: list[list[float]] | Plateau) -> None:
        super().__init__(entry)
        self.rates = rates

    def on_epoch_begin(self, run: LoopState) -> None:
        if run.epoch == 0 and run.step == 0 and not isinstance(self.rates, Plateau):  # LinearLR, OneCycleLR begin elsewhere
            self._apply_(run, self.rates[0])

    def on_epoch_end(self, run: LoopState) -> None:
        if isinstance(self.rates, Plateau):
            if run.evaluation is None:
                raise UserError("ReduceLROnPlateau needs the validation's figures: pass them to on_epoch_end")
            metric = run.evaluation.loss if self.rates.mode == "min" else run.evaluation.top1
            rates = self.rates.step(metric)
        else:
            rates = self.rates[min(run.epoch + 1, len(self.rates) - 1)]
        self._apply_(run, rates)

    def _apply_(self, run: LoopState, rates: list[float]) -> None:
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return self.rates.state_dict() if isinstance(self.rates, Plateau) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.rates, Plateau):
            self.rates.load_state_dict(state)
