"""The compression scheduler: a hook that calls a schedule's policies in their windows and applies the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compression.schedule.distillation_policy import DistillationPolicy
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.policies import LearningRatePolicy, PruningPolicy, RegularizationPolicy
from compression.schedule.policy import Policy
from compression.schedule.quantization_policy import QuantizationPolicy, check_order
from compression.schedule.schedule import PolicyEntry, Schedule
from compression.schedule.thinning import FilterRemover, ThinningPolicy
from compression.schedule.timeline import warnings
from compression.scoring.calibration import Calibration
from compression.tracing.dead_units import dead_units, follower_masks
from models.quantized.preparing import is_quantized, weights_by_name
from utils import distributed
from utils.errors import UserError
from utils.loop.hooks import Hook, LoopState


def report_on_main(line: str) -> None:
    """Print a line on rank 0."""
    if distributed.is_main():
        print(line, flush=True)


class CompressionScheduler(Hook):
    """Applies a schedule to a training run.

    Policies act in the order of the file. A mask remains in force after its policy's window until another mask replaces
    it; a mask over weights that keep training (``use_double_copies`` without ``keep_mask``) ends with the window.

    Args:
        schedule: what to do and when.
        run: the loop's state; the schedule acts on its model and optimizer.
        calibration: returns images, for policies that measure the network, and for thinning.
        report: receives one line per event.

    Raises:
        UserError: a policy does not fit the network, the optimizer or the length of the run.
    """

    def __init__(
        self,
        schedule: Schedule,
        run: LoopState,
        calibration: Callable[[], Calibration],
        report: Callable[[str], None] = report_on_main,
    ) -> None:
        self.schedule, self.report, self.epochs = schedule, report, run.epochs
        self.masks = Masks()
        self.measurements = Measurements(run.model, calibration, run.seed)
        self.policies = [self._policy(entry, run) for entry in schedule.entries]
        check_order(self.policies, run.epochs)
        self.ended: set[int] = set()
        # Filters that will be removed are masked together with their biases and norms, so that removal changes nothing.
        self.removes_filters = any(entry.instance.role == FilterRemover.role for entry in schedule.of("extension"))
        self.target_epoch = max((policy.target_epoch(run.epochs) for policy in self.policies), default=-1)

    def _policy(self, entry: PolicyEntry, run: LoopState) -> Policy:
        """Make a policy; an error names the file and the policy."""
        try:
            match entry.kind:
                case "pruner":
                    policy = PruningPolicy(entry, self.masks, self.measurements)
                    if not run.plan:  # if the network was cut, the policy may be over; it checks the network when it acts
                        policy.check()
                    return policy
                case "regularizer":
                    return RegularizationPolicy(entry, self.masks, self.report)
                case "lr_scheduler":
                    initial = [group.setdefault("initial_lr", group["lr"]) for group in run.optimizer.param_groups]
                    return LearningRatePolicy(entry, entry.instance.of(initial, run.epochs))
                case "extension":
                    return ThinningPolicy(entry, self.masks, self.measurements, self.report)
                case "quantizer":
                    return QuantizationPolicy(entry, run, lambda: self.measurements.examples, self.report)
                case _:
                    return DistillationPolicy(entry, run)
        except UserError as error:
            source = f"{self.schedule.source}: " if self.schedule.source else ""
            raise UserError(f"{source}{entry.name}: {error}") from None

    def active(self, run: LoopState) -> list[Policy]:
        """Return the policies whose window contains the current epoch."""
        return [policy for policy in self.policies if policy.window.applies(run.epoch)]

    def target_reached(self, run: LoopState) -> bool:
        """Whether pruning, thinning and quantization are complete; only from then on can an epoch be the best."""
        return run.epoch >= self.target_epoch

    def describe(self) -> list[str]:
        """Return lines that say what acts when, which parameters each pattern matched, and any warnings."""
        teachers = [policy for policy in self.policies if isinstance(policy, DistillationPolicy)]
        notes = [f"{policy.name}: {note}" for policy in teachers for note in policy.teacher.notes]
        return [*self.schedule.describe(), *notes, *warnings(self.schedule, self.epochs)]

    def on_epoch_begin(self, run: LoopState) -> None:
        for place, policy in enumerate(self.policies):
            if policy.window.end <= run.epoch and place not in self.ended:
                self.ended.add(place)
                policy.end_window(run)
        for policy in self.policies:
            policy.check_start(run)
        for policy in self.active(run):
            policy.on_epoch_begin(run)
        if run.step == 0:
            self._mask_followers(run)

    def on_minibatch_begin(self, run: LoopState) -> None:
        for policy in self.active(run):
            policy.on_minibatch_begin(run)

    def before_backward_pass(self, run: LoopState) -> Tensor:
        for policy in self.active(run):
            changed = policy.before_backward_pass(run)
            if changed is not None:
                run.loss = changed
        return run.loss

    def before_parameter_optimization(self, run: LoopState) -> None:
        self.masks.before_step_(run)
        for policy in self.active(run):
            policy.before_parameter_optimization(run)

    def on_minibatch_end(self, run: LoopState) -> None:
        for policy in self.active(run):
            policy.on_minibatch_end(run)
        self.masks.after_step_(run)
        for policy in self.policies:
            policy.after_masks(run)

    def on_epoch_end(self, run: LoopState) -> None:
        for policy in self.active(run):
            policy.on_epoch_end(run)
        for policy in self.policies:
            policy.after_masks(run)

    def _mask_followers(self, run: LoopState) -> None:
        """Mask the biases and norms of entirely masked filters, if the schedule will remove these filters."""
        if not self.removes_filters or is_quantized(run.model):  # nothing is removed after quantization
            return
        plain = {name: mask for name, mask in self.masks.values.items() if name not in self.masks.double and mask.ndim > 1}
        if not plain or all(bool(mask.all()) for mask in plain.values()):
            return
        parameters = weights_by_name(run.model)
        alive = {name: plain.get(name, tensor.new_ones(())).expand_as(tensor) != 0 for name, tensor in run.model.state_dict().items()}
        masks = follower_masks(self.measurements.graph, dead_units(self.measurements.graph, alive, "producer"), parameters)
        self.masks.set_(run, {name: mask * self.masks.values.get(name, mask) for name, mask in masks.items()})

    def state_dict(self) -> dict[str, Any]:
        return {
            "masks": self.masks.state_dict(),
            "policies": [policy.state_dict() for policy in self.policies],
            "names": [policy.name for policy in self.policies],
            "ended": sorted(self.ended),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [policy.name for policy in self.policies]
        if state["names"] != names:
            raise UserError(f"the run's schedule has the policies {', '.join(state['names'])}, the file now has {', '.join(names)}")
        self.measurements.forget_graph()
        self.masks.load_state_dict(state["masks"], self.measurements.model)
        for policy, values in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(values)
        self.ended = set(state["ended"])
