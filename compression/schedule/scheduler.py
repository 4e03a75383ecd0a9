"""The compression scheduler: a hook that calls a schedule's policies in their windows and keeps the masks in force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from compression.distillation.losses import DistillationLossWeights, load_teacher
from compression.schedule.distillation_policy import DistillationPolicy
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.policies import LearningRatePolicy, PruningPolicy, RegularizationPolicy
from compression.schedule.quantization_policy import QuantizationPolicy, check_order
from compression.schedule.reading import Entry, Schedule
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
    """Carries a schedule out.

    Policies act in the order of the file. A mask that was set stays in force after its policy's window, until another
    one takes its place, or until the window's end where it hid weights that go on training (``use_double_copies``
    without ``keep_mask``).

    Args:
        schedule: what to do and when.
        run: the loop's state; its model and optimizer are what the schedule acts on.
        calibration: gives images, for policies that measure the network, and for thinning.
        report: says what happens, a line at a time.

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
        self.policies = [self._checked(entry, run) for entry in schedule.entries]
        check_order(self.policies, run.epochs)
        self.ended: set[int] = set()
        # The filters that will be removed are masked with their biases and norms, so that the removal changes nothing.
        self.removes_filters = any(isinstance(entry.instance, FilterRemover) for entry in schedule.of("extension"))
        self.target_epoch = max((policy.reached(run.epochs) for policy in self.policies), default=-1)

    def _checked(self, entry: Entry, run: LoopState) -> Any:
        try:
            return self._make(entry, run)
        except UserError as error:
            raise UserError(
                f"{self.schedule.source}: {entry.name}: {error}" if self.schedule.source else f"{entry.name}: {error}"
            ) from None

    def _make(self, entry: Entry, run: LoopState) -> Any:
        if entry.kind == "pruner":
            policy = PruningPolicy(entry.name, entry.instance, entry.window, entry.options, self.masks, self.measurements)
            if not run.plan:  # of a network that was cut, a policy may have done its work before; it checks when it acts
                policy.check()
            return policy
        if entry.kind == "regularizer":
            return RegularizationPolicy(entry.name, entry.instance, entry.window, entry.options, self.masks)
        if entry.kind == "lr_scheduler":
            initial = [group.setdefault("initial_lr", group["lr"]) for group in run.optimizer.param_groups]
            return LearningRatePolicy(entry.name, entry.instance.of(initial, run.epochs), entry.window)
        if entry.kind == "extension":
            return ThinningPolicy(entry.name, entry.instance.role, entry.window, self.masks, self.measurements, self.report)
        if entry.kind == "quantizer":
            return QuantizationPolicy(entry.name, entry.instance, entry.window, run, lambda: self.measurements.examples, self.report)
        if entry.kind == "distiller":
            return self._teaching(entry, run)
        raise UserError(f"this version has no {entry.kind}")

    def _teaching(self, entry: Entry, run: LoopState) -> DistillationPolicy:
        if run.spec is None:
            raise UserError("to load a teacher, the student's specification must be known; pass it as spec")
        teacher = load_teacher(entry.instance.flags(), run.spec, next(run.model.parameters()).device)
        weights = DistillationLossWeights(entry.instance.distill_wt, entry.instance.student_wt, entry.instance.teacher_wt)
        return DistillationPolicy(entry.name, entry.window, run.model, teacher, entry.instance.temperature, weights)

    def active(self, run: LoopState) -> Sequence[Any]:
        """Return the policies whose window holds the current epoch."""
        return [policy for policy in self.policies if policy.window.applies(run.epoch)]

    def target_reached(self, run: LoopState) -> bool:
        """Whether all pruning and thinning of this run lies behind: only from then on can an epoch be the best."""
        return run.epoch >= self.target_epoch

    def describe(self) -> list[str]:
        """Return lines that say what acts when, which parameters each pattern matched, and what to beware of."""
        teachers = [policy for policy in self.policies if isinstance(policy, DistillationPolicy)]
        notes = [f"{policy.name}: {note}" for policy in teachers for note in policy.teacher.notes]
        return [*self.schedule.describe(), *notes, *warnings(self.schedule, self.epochs)]

    def on_epoch_begin(self, run: LoopState) -> None:
        for place, policy in enumerate(self.policies):
            if policy.window.end <= run.epoch and place not in self.ended:
                self.ended.add(place)
                if isinstance(policy, PruningPolicy):
                    policy.on_window_end(run)
        for policy in self._quantizing():
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
        for policy in self._quantizing():
            policy.refresh_(run)

    def on_epoch_end(self, run: LoopState) -> None:
        for policy in self.active(run):
            policy.on_epoch_end(run)
        for policy in self._quantizing():
            policy.refresh_(run)

    def _quantizing(self) -> list[QuantizationPolicy]:
        return [policy for policy in self.policies if isinstance(policy, QuantizationPolicy)]

    def _mask_followers(self, run: LoopState) -> None:
        """Mask the biases and norms of filters that are masked whole, where the schedule will remove them."""
        if not self.removes_filters or is_quantized(run.model):  # all removals lie behind
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
