"""The schedule that the command line asks for: the file of --compress, and distillation by the --kd-* flags."""

from __future__ import annotations

from torch import nn

from compression.arguments import TrainArguments
from compression.distillation import check
from compression.schedule.reading import Entry, Schedule, read_schedule, with_entry
from compression.schedule.teaching import KnowledgeDistillation
from compression.schedule.windows import FOREVER, Window
from models.quantized import weights_by_name


def requested_schedule(arguments: TrainArguments, model: nn.Module) -> Schedule | None:
    """Return the schedule of a run; None where nothing is asked for.

    Raises:
        UserError: the file or a flag does not fit.
    """
    check(arguments)
    schedule = None
    if arguments.compress:
        schedule = read_schedule(arguments.compress, {name: parameter.ndim for name, parameter in weights_by_name(model).items()})
    if arguments.kd_teacher or arguments.kd_resume:
        start = arguments.kd_start_epoch
        window = Window(range(start, FOREVER), FOREVER)
        entry = Entry("distiller", "distillation", "KnowledgeDistillation", KnowledgeDistillation.of_flags(arguments), window)
        schedule = with_entry(schedule or Schedule(), entry)
    return schedule
