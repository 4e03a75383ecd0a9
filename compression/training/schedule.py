"""The schedule that the command line asks for: the file of --compress, and distillation by the --kd-* flags."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compression.distillation.losses import DistillationArguments, check
from compression.schedule.distillation_policy import KnowledgeDistillation
from compression.schedule.reading import Entry, Schedule, read_schedule, with_entry
from compression.schedule.windows import FOREVER, Window
from compression.training.arguments import TrainArguments
from models.quantized import weights_by_name
from utils.errors import UserError


def requested_schedule(arguments: TrainArguments, model: nn.Module, copy: Path | None = None) -> Schedule | None:
    """Return the schedule of a run; None where nothing is asked for.

    Args:
        arguments: the flags.
        model: whose parameters the schedule names.
        copy: what a run that goes on has kept of its schedule; where it is there, it goes before the file of --compress.

    Raises:
        UserError: the file or a flag does not fit.
    """
    check(arguments)
    schedule = None
    if arguments.compress:
        path = copy if copy and copy.is_file() else arguments.compress
        schedule = read_schedule(path, {name: parameter.ndim for name, parameter in weights_by_name(model).items()})
    if distils(arguments):
        if schedule and schedule.of("distiller"):
            raise UserError(f"{schedule.source} distils already; leave the --kd-* flags out, or its distiller")
        start = arguments.kd_start_epoch
        window = Window(range(start, FOREVER), FOREVER)
        entry = Entry("distiller", "distillation", "KnowledgeDistillation", KnowledgeDistillation.of_flags(arguments), window)
        schedule = with_entry(schedule or Schedule(), entry)
    return schedule


def distils(arguments: DistillationArguments) -> bool:
    """Whether the --kd-* flags name a teacher.

    Raises:
        UserError: they do not, and say something else of distillation.
    """
    if arguments.kd_teacher or arguments.kd_resume:
        return True
    for field in dataclasses.fields(DistillationArguments):
        if getattr(arguments, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} needs a teacher; give --kd-teacher or --kd-resume")
    return False


def with_absolute_paths(arguments: TrainArguments) -> TrainArguments:
    """Return arguments that name schedule and teacher wherever a run goes on."""
    files: dict[str, str] = {name: getattr(arguments, name) for name in ("compress", "kd_teacher", "kd_resume")}
    absolute: dict[str, Any] = {name: str(Path(file).absolute()) for name, file in files.items() if Path(file).is_file()}
    return replace(arguments, **absolute)
