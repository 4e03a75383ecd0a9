"""Distillation as a schedule or the command line describes it: which teacher, how warm, how strong."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from compression.distillation.losses import DistillationArguments, DistillationLossWeights, KnowledgeDistillationPolicy
from compression.distillation.teacher import Teacher
from compression.schedule.windows import Window
from utils.options import boolean, number, option, text


@dataclass(frozen=True)
class KnowledgeDistillation:
    """The arguments of a distiller in a schedule; their meaning and defaults are those of the --kd-* flags.

    Attributes:
        teacher: an architecture, or a checkpoint.
        pretrained: whether the architecture takes its ImageNet weights.
        resume: a checkpoint with the teacher's weights.
        temperature: that the logits are divided by.
        distill_wt, student_wt, teacher_wt: weights of the loss's parts.
    """

    teacher: str = option(text, "")
    pretrained: bool = option(boolean, False)
    resume: str = option(text, "")
    temperature: float = option(number(above=0), 1.0)
    distill_wt: float = option(number(least=0), 0.5)
    student_wt: float = option(number(least=0), 0.5)
    teacher_wt: float = option(number(least=0), 0.0)

    @classmethod
    def of_flags(cls, flags: DistillationArguments) -> KnowledgeDistillation:
        """Return what the --kd-* flags say."""
        names = ("teacher", "pretrained", "resume", "temperature", "distill_wt", "student_wt", "teacher_wt")
        return cls(**{name: getattr(flags, f"kd_{name}") for name in names})

    def flags(self) -> DistillationArguments:
        """Return the same as the --kd-* flags would say it."""
        return DistillationArguments(**{f"kd_{name}": value for name, value in vars(self).items()})


class DistillationPolicy(KnowledgeDistillationPolicy):
    """Distillation as one of a schedule's policies."""

    def __init__(
        self, name: str, window: Window, student: nn.Module, teacher: Teacher, temperature: float, weights: DistillationLossWeights
    ) -> None:
        super().__init__(student, teacher, temperature, weights)
        self.name, self.window = name, window

    def reached(self, epochs: int) -> int:
        """It has no sparsity to reach."""
        return -1
