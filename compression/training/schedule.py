"""The schedule of a run: the file of --compress, and the distillation of the --kd-* flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compression.distillation.arguments import DistillationArguments
from compression.distillation.losses import check
from compression.schedule.reading import read_schedule
from compression.schedule.schedule import PolicyEntry, Schedule
from compression.schedule.windows import FOREVER, Window
from compression.training.arguments import TrainArguments
from compression.training.dense_teacher import with_dense_teacher
from models.quantized.preparing import weights_by_name
from utils.errors import UserError


def schedule_of_run(
    arguments: TrainArguments, model: nn.Module, copy: Path | None, dense: Mapping[str, Any] | None
) -> tuple[TrainArguments, Schedule | None, list[str]]:
    """Return the arguments, the schedule that they ask for, and what to tell the user.

    A pruned network without a teacher gets the dense network that it was cut from, which the arguments then name.

    Args:
        arguments, model, copy: see ``requested_schedule``.
        dense: the dense network's file, see ``with_dense_teacher``.
    """
    schedule = requested_schedule(arguments, model, copy)
    if not dense or not arguments.distill or arguments.looks_only or (schedule and schedule.of("distiller")):
        return arguments, schedule, []
    arguments, note = with_dense_teacher(arguments, dense)
    return arguments, requested_schedule(arguments, model, copy), [note]


def requested_schedule(arguments: TrainArguments, model: nn.Module, copy: Path | None = None) -> Schedule | None:
    """Return the schedule of a run, or None if the flags ask for none.

    Args:
        arguments: the flags.
        model: its parameters are what the schedule names.
        copy: the schedule in the folder of a run that is resumed; if it is there, it is read instead of the file of --compress.

    Raises:
        UserError: the file or a flag does not fit.
    """
    check(arguments)
    schedule = None
    if arguments.compress:
        path = copy if copy and copy.is_file() else arguments.compress
        schedule = read_schedule(path, {name: parameter.ndim for name, parameter in weights_by_name(model).items()})
    if _distils(arguments):
        if schedule and schedule.of("distiller"):
            raise UserError(f"{schedule.source} has a distiller already; leave out either that or the --kd-* flags")
        window = Window(range(arguments.kd_start_epoch, FOREVER), FOREVER)
        entry = PolicyEntry("distiller", "distillation", "KnowledgeDistillation", arguments, window)
        schedule = (schedule or Schedule()).with_entry(entry)
    return schedule


def _distils(arguments: DistillationArguments) -> bool:
    """Whether the --kd-* flags name a teacher; without one, none of the others may be given."""
    if arguments.kd_teacher or arguments.kd_resume:
        return True
    for field in dataclasses.fields(DistillationArguments):
        if getattr(arguments, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} needs a teacher; give --kd-teacher or --kd-resume")
    return False
