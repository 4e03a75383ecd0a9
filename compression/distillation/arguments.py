"""The flags of distillation, under Distiller's names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from utils.arguments import add_flags, flag


@dataclass(frozen=True)
class DistillationArguments:
    """Flags of distillation, with Distiller's defaults."""

    kd_teacher: str = flag("", "distil from this teacher: an architecture or a checkpoint", metavar="NAME|PATH", group="distillation")
    kd_pretrained: bool = flag(False, "start a torchvision or timm teacher from its ImageNet weights", group="distillation")
    kd_resume: str = flag("", "checkpoint with the teacher's weights", metavar="PATH", group="distillation")
    kd_temperature: float = flag(1.0, "divides the logits before the softmax", "--kd-temp", metavar="T", group="distillation")
    kd_distill_wt: float = flag(0.5, "weight of the distillation loss", "--kd-dw", metavar="WEIGHT", group="distillation")
    kd_student_wt: float = flag(0.5, "weight of the classification loss", "--kd-sw", metavar="WEIGHT", group="distillation")
    kd_teacher_wt: float = flag(0.0, "weight of the teacher's loss, only for the log", "--kd-tw", metavar="WEIGHT", group="distillation")
    kd_start_epoch: int = flag(0, "first epoch with distillation", metavar="EPOCH", group="distillation")


def add_distillation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``DistillationArguments``, with their defaults, to any parser."""
    add_flags(parser, DistillationArguments)
