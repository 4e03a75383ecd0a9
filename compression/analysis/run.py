"""What train.py does instead of training: print a timeline or a summary, analyse sensitivity, thin or quantize a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

from compression.analysis.post_training import requested_quantizer
from compression.analysis.sensitivity import KINDS, TOLERANCE, analyse, parse_range, write_results, write_schedule
from compression.exporting.learned import fits_int8
from compression.quantizers.calibrating import write_spreads
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.quantization_policy import quantize_
from compression.schedule.thinning import FilterRemover, thin_
from compression.schedule.timeline import timeline
from compression.statistics.summaries import SUMMARIES, summary
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from compression.training.resuming import inference_state
from utils import distributed
from utils.errors import UserError, unknown
from utils.files.checkpoint import save_checkpoint
from utils.files.runs import RunDirectory
from utils.measures.metrics import Evaluation


def chosen_analysis(arguments: TrainArguments) -> Callable[[ClassifierCompressor], str] | None:
    """Return what to do instead of training, if the arguments say so.

    Raises:
        UserError: a name is unknown, or two are asked for.
    """
    asked = {
        "dry_run": show_timeline,
        "summary": show_summary,
        "sense": analyse_sensitivity,
        "thinnify": thin,
        "quantize_eval": quantize,
        "evaluate": measure,
    }
    given = [name for name in asked if getattr(arguments, name)]
    if requested_quantizer(arguments) and "evaluate" in given:
        given.remove("evaluate")  # Distiller wants both
    if len(given) > 1:
        raise UserError(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
    if arguments.sense and arguments.sense not in KINDS:
        raise unknown("sensitivity analysis", arguments.sense, KINDS)
    if arguments.summary and arguments.summary not in SUMMARIES:
        raise unknown("summary", arguments.summary, SUMMARIES)
    if arguments.dry_run and not arguments.compress:
        raise UserError("--dry-run shows a schedule; give --compress FILE")
    trained = arguments.weights or arguments.resume or arguments.pretrained
    for name in ("thinnify", "sense", "quantize_eval", "evaluate"):
        if getattr(arguments, name) and not trained:
            raise UserError(f"--{name.replace('_', '-')} looks at a trained network; give --weights FILE or --resume-from RUN")
    return asked[given[0]] if given else None


def show_timeline(compressor: ClassifierCompressor) -> str:
    """Return the schedule's timeline."""
    a, scheduler = compressor.arguments, compressor.scheduler
    assert scheduler is not None
    rate = compressor.run.learning_rate
    rates = [rate.at(epoch + 1 / compressor.run.steps_per_epoch) for epoch in range(a.epochs)] if rate else None
    return timeline(scheduler.schedule, a.epochs, a.lr0, rates)


def show_summary(compressor: ClassifierCompressor) -> str:
    """Return a summary of the network."""
    return summary(compressor.arguments.summary, deepcopy(compressor.model).cpu(), compressor.spec)


def analyse_sensitivity(compressor: ClassifierCompressor) -> str:
    """Prune every layer alone at several sparsities, measure on the validation images; write table, plot and a schedule.

    Where no schedule comes of it, since nothing tolerates any pruning, table and plot still stand.
    """
    a = compressor.arguments
    sparsities = parse_range(a.sense_range)
    model = compressor.run.averaged
    graph = None if a.sense == "element" else Measurements(model, compressor.feed.calibration).graph
    table = analyse(model, graph, a.sense, sparsities, compressor.validate, progress=_progress)
    with _new_directory(a) as directory:
        if not distributed.is_main():
            return ""
        write_results(table, directory.path)
        path = directory.path / "schedule.yaml"
        try:
            write_schedule(table, a.sense, graph, TOLERANCE, path)
        except UserError as error:
            return f"table and plot: {directory.path}\n{error}"
    source = f"--weights {a.weights}" if a.weights else f"--model {a.model} --pretrained"
    return f"table, plot and schedule: {directory.path}\nnext: python train.py {source} --data {a.data} --compress {path}"


@contextmanager
def _new_directory(arguments: TrainArguments) -> Iterator[RunDirectory]:
    """Make a run's folder, which goes again if writing into it fails."""
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    try:
        yield directory
    except BaseException:
        directory.discard()
        raise


def _progress(name: str, done: int, of: int) -> None:
    if distributed.is_main():
        print(f"{done:>4}/{of}  {name}", flush=True)


def thin(compressor: ClassifierCompressor) -> str:
    """Remove the filters that are zero, and save the thinned network."""
    before = compressor.profile
    measurements = Measurements(compressor.model, compressor.feed.calibration)
    thinned = thin_(compressor.run, Masks(), measurements, FilterRemover.role)
    if not thinned.groups:
        return str(thinned)
    a, after = compressor.arguments, compressor.profile
    compressor.run.evaluation = compressor.validate()
    with _new_directory(a) as directory:
        path = directory.weights / "thinned.pt"
        if distributed.is_main():
            save_checkpoint(path, inference_state(compressor.run, a, after))
    return "\n".join(
        [
            str(thinned),
            f"multiply-adds {before.macs:,} -> {after.macs:,}, parameters {before.params:,} -> {after.params:,}",
            measured(compressor.run.evaluation),
            f"checkpoint {path}",
        ]
    )


def quantize(compressor: ClassifierCompressor) -> str:
    """Quantize the network after training, measure it before and after, and save it with what was calibrated."""
    a, run = compressor.arguments, compressor.run
    quantizer = requested_quantizer(a)
    assert quantizer is not None
    before = compressor.validate()
    measurements = Measurements(run.model, compressor.feed.calibration)
    quantize_(run, quantizer, measurements.inputs(), lambda: measurements.examples)
    run.evaluation = compressor.validate()
    with _new_directory(a) as directory:
        path = directory.weights / "quantized.pt"
        if distributed.is_main():
            write_spreads(directory.path / "calibration.yaml", quantizer.spreads)
            save_checkpoint(path, inference_state(run, a, compressor.profile))
    return "\n".join(
        [
            f"{len(run.spec.quantization)} layers quantized, ranges of {len(measurements.examples)} training images",
            f"before: {measured(before)}",
            f"after:  {measured(run.evaluation)}",
            f"checkpoint {path}",
            f"next: python export.py --weights {path} --int8 --data {a.data}"
            if fits_int8(run.model)
            else f"next: python val.py --weights {path} --data {a.data}",
        ]
    )


def measure(compressor: ClassifierCompressor) -> str:
    """Measure the network on the validation images."""
    evaluation = compressor.validate()
    lines = [measured(evaluation)]
    if compressor.arguments.confusion:
        lines.append(confusion_text(evaluation, compressor.spec.class_names))
    return "\n".join(lines)


def measured(evaluation: Evaluation) -> str:
    """Return an evaluation in a line."""
    return f"top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, loss {evaluation.loss:.4f} on {evaluation.images} validation images"


def confusion_text(evaluation: Evaluation, class_names: tuple[str, ...]) -> str:
    """Return the confusion matrix as text: a row per true class, a column per prediction."""
    import pandas as pd

    names = [name[:12] for name in class_names]
    table = pd.DataFrame(evaluation.confusion.numpy(), index=pd.Index(names, name="true \\ predicted"), columns=names)
    return f"confusion matrix\n{table.to_string()}"
