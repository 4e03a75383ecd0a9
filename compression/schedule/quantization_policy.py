"""Quantization as a policy of a schedule: the network is quantized in the window's first epoch and remains so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from compression.quantizers.quantizer import Quantizer
from compression.schedule.policy import Policy
from compression.schedule.schedule import PolicyEntry
from compression.schedule.thinning import ThinningPolicy
from compression.scoring.calibration import Calibration
from models.quantized.preparing import input_ranges, is_quantized, prepare_, prepare_alike_, recipe_of, refresh_
from utils import distributed
from utils.errors import UserError
from utils.loop.hooks import LoopState


def quantize_(run: LoopState, quantizer: Quantizer, inputs: Tensor, examples: Callable[[], Calibration]) -> None:
    """Quantize the network of a run and its moving average, in place.

    Args:
        run: its model, average and specification are changed.
        quantizer: prepares the model.
        inputs: a batch, normalised, on the network's device.
        examples: returns the calibration images, the same on every rank; called if the quantizer needs them.

    Raises:
        UserError: see ``Quantizer.prepare_model``.
    """
    batches = (images for images, _ in examples().batches()) if quantizer.calibrates else None
    quantizer.prepare_model(run.model, inputs, run.optimizer, batches)
    distributed.broadcast_([tensor for pair in input_ranges(run.model).values() for tensor in pair])
    if run.ema:
        prepare_alike_(run.ema.model, run.model)
    if run.spec:
        run.spec = run.spec.with_(quantization=recipe_of(run.model))
    run.restructured()


class QuantizationPolicy(Policy):
    """Quantizes the network and its moving average before the first batch of its window.

    From then on the network trains quantized, even after the window: what is saved is what was trained. Parameters remain
    the same objects under the same names in the schedule, so masks apply as before.
    """

    def __init__(self, entry: PolicyEntry, run: LoopState, examples: Callable[[], Calibration], report: Callable[[str], None]) -> None:
        super().__init__(entry)
        self.quantizer: Quantizer = entry.instance
        self.run, self.examples, self.report = run, examples, report
        self.prepared = False
        if not is_quantized(run.model):  # in a resumed run it may be
            self.quantizer.check(run.model)
        # The group of learned clips exists from the start, so that learning rates and checkpoints include it.
        self.quantizer.mend_(run.optimizer, run.model)

    def target_epoch(self, epochs: int) -> int:
        return self.window.first if self.window.first < epochs else -1

    def check_start(self, run: LoopState) -> None:
        if not self.prepared and is_quantized(run.model):
            raise UserError(f"{self.name}: the network that the run began with is quantized already; begin with one that is not")

    def on_minibatch_begin(self, run: LoopState) -> None:
        if self.prepared:
            return
        quantize_(run, self.quantizer, run.inputs, self.examples)
        self.prepared = True
        self.report(f"{self.name}: {len(recipe_of(run.model))} modules quantized by {type(self.quantizer).__name__}")

    def after_masks(self, run: LoopState) -> None:
        """Update the quantized images of the weights, in the network and in its average.

        An average without float copies is not rounded itself, or it would never move; its forward pass rounds it.
        """
        if self.prepared:
            refresh_(run.model)
            if run.ema and self.quantizer.train_with_fp_copy:
                refresh_(run.ema.model)

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": recipe_of(self.run.model) if self.prepared else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, and quantize the network if it is not yet, before its own state is loaded."""
        if not state["recipe"]:
            return
        run = self.run
        if not is_quantized(run.model):
            prepare_(run.model, state["recipe"])
            if run.ema:
                prepare_alike_(run.ema.model, run.model)
            run.restructured()
        self.quantizer.mend_(run.optimizer, run.model)
        self.prepared, self.quantizer.model = True, run.model
        if run.spec:
            run.spec = run.spec.with_(quantization=recipe_of(run.model))


def check_order(policies: Sequence[Policy], epochs: int) -> None:
    """Check that a network is quantized only once, and that no channels are removed afterwards.

    Raises:
        UserError: two policies quantize, or one removes channels too late.
    """
    quantizing = [policy for policy in policies if isinstance(policy, QuantizationPolicy)]
    if not quantizing:
        return
    if len(quantizing) > 1:
        raise UserError("two policies quantize; a network is quantized once, and stays so: leave one out")
    first = quantizing[0].window.first
    for thinning in policies:
        last = thinning.window.last_within(epochs)
        if isinstance(thinning, ThinningPolicy) and last >= first:
            raise UserError(
                f"{thinning.name} removes channels in epoch {last}, but {quantizing[0].name} quantizes from epoch {first} on: "
                "channels can only be removed before"
            )
