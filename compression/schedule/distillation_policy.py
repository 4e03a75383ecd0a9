"""Distillation as a policy of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

from compression.distillation.arguments import DistillationArguments
from compression.distillation.losses import DistillationLossWeights, KnowledgeDistillationPolicy, load_teacher
from compression.schedule.policy import Policy
from compression.schedule.schedule import PolicyEntry
from utils.errors import UserError
from utils.loop.hooks import LoopState
from utils.options import boolean, number, option, text


@dataclass(frozen=True)
class KnowledgeDistillation:
    """The arguments of a distiller in a schedule; meanings and defaults are those of the --kd-* flags.

    Attributes:
        teacher: an architecture or a checkpoint.
        pretrained: whether the architecture takes its ImageNet weights.
        resume: a checkpoint with the teacher's weights.
        temperature: the logits are divided by it.
        distill_wt, student_wt, teacher_wt: weights of the loss's terms.
    """

    teacher: str = option(text, "")
    pretrained: bool = option(boolean, False)
    resume: str = option(text, "")
    temperature: float = option(number(above=0), 1.0)
    distill_wt: float = option(number(least=0), 0.5)
    student_wt: float = option(number(least=0), 0.5)
    teacher_wt: float = option(number(least=0), 0.0)

    def flags(self) -> DistillationArguments:
        """Return the same arguments as --kd-* flags."""
        return DistillationArguments(**{f"kd_{name}": value for name, value in vars(self).items()})


class DistillationPolicy(KnowledgeDistillationPolicy, Policy):
    """Distils from the teacher of the entry's ``DistillationArguments``.

    Raises:
        UserError: the student's specification is unknown, or the teacher can't be loaded.
    """

    def __init__(self, entry: PolicyEntry, run: LoopState) -> None:
        flags: DistillationArguments = entry.instance
        if run.spec is None:
            raise UserError("to load a teacher, the student's specification must be known; pass it as spec")
        teacher = load_teacher(flags, run.spec, next(run.model.parameters()).device)
        weights = DistillationLossWeights(flags.kd_distill_wt, flags.kd_student_wt, flags.kd_teacher_wt)
        KnowledgeDistillationPolicy.__init__(self, run.model, teacher, flags.kd_temperature, weights)
        Policy.__init__(self, entry)
