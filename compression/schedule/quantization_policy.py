"""Quantization as a schedule's policy: the network is prepared in the window's first epoch, and stays quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from compression.quantizers.quantizer import Quantizer
from compression.schedule.thinning import ThinningPolicy
from compression.schedule.windows import Window
from compression.scoring.calibration import Calibration
from models.quantized.preparing import input_ranges, is_quantized, prepare_, prepare_alike_, recipe_of, refresh_
from utils import distributed
from utils.errors import UserError
from utils.loop.hooks import Hook, LoopState


def quantize_(run: LoopState, quantizer: Quantizer, inputs: Tensor, examples: Callable[[], Calibration]) -> None:
    """Quantize the network of a run and its moving average alike, in place.

    Args:
        run: its model, average and specification change.
        quantizer: how.
        inputs: a batch, normalised, on the network's device.
        examples: gives the calibration images, the same on every rank, where the quantizer needs them.

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


class QuantizationPolicy(Hook):
    """Quantizes the network before the first batch of its window, and its moving average alike.

    From then on the network trains quantized, also when the window has ended: what is saved is what was trained.
    Parameters stay the same objects and the schedule's names of them stay, so masks hold as before.
    """

    def __init__(
        self,
        name: str,
        quantizer: Quantizer,
        window: Window,
        run: LoopState,
        examples: Callable[[], Calibration],
        report: Callable[[str], None],
    ) -> None:
        self.name, self.quantizer, self.window, self.run = name, quantizer, window, run
        self.examples, self.report = examples, report
        self.prepared = False
        if not is_quantized(run.model):  # one that goes on is
            quantizer.check(run.model)
        # A group of learned clips is there from the start, so that rates and checkpoints know it.
        quantizer.mend_(run.optimizer, run.model)

    def reached(self, epochs: int) -> int:
        """Return the epoch from which on the network is quantized; -1 where it never is in a run of so many epochs."""
        return self.window.first if self.window.first < epochs else -1

    def check_start(self, run: LoopState) -> None:
        """Check that the network is not one that was quantized before this run.

        Raises:
            UserError: it is.
        """
        if not self.prepared and is_quantized(run.model):
            raise UserError(f"{self.name}: the network that the run began with is quantized already; begin with one that is not")

    def on_minibatch_begin(self, run: LoopState) -> None:
        if self.prepared:
            return
        quantize_(run, self.quantizer, run.inputs, self.examples)
        self.prepared = True
        self.report(f"{self.name}: {len(recipe_of(run.model))} modules quantized by {type(self.quantizer).__name__}")

    def refresh_(self, run: LoopState) -> None:
        """Bring the images of the weights up to date, of the network and of its average, once weights and masks are set.

        An average without float copies is not rounded itself, or it would never move; its forward pass rounds.
        """
        if self.prepared:
            refresh_(run.model)
            if run.ema and self.quantizer.train_with_fp_copy:
                refresh_(run.ema.model)

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": recipe_of(self.run.model) if self.prepared else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned; a network that is not quantized yet is, before its own state is loaded."""
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


def check_order(policies: Sequence[Any], epochs: int) -> None:
    """Check that a network is quantized once, and that nothing is removed from it afterwards.

    Raises:
        UserError: a second policy quantizes, or one thins too late.
    """
    if len([policy for policy in policies if isinstance(policy, QuantizationPolicy)]) > 1:
        raise UserError("two policies quantize; a network is quantized once, and stays so: leave one out")
    for quantizing in policies:
        for thinning in policies:
            if not isinstance(quantizing, QuantizationPolicy) or not isinstance(thinning, ThinningPolicy):
                continue
            last = thinning.window.last_within(epochs)
            if last is not None and last >= quantizing.window.first:
                raise UserError(
                    f"{thinning.name} removes channels in epoch {last}, but {quantizing.name} quantizes from epoch "
                    f"{quantizing.window.first} on: channels can only be removed before"
                )
