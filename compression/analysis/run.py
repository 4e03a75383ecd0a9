"""What train.py can do instead of training: print a timeline or a summary, analyse sensitivity, thin or quantize a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from compression.analysis.post_training import requested_quantizer
from compression.analysis.sensitivity import KINDS, analyse, parse_range, write_results
from compression.analysis.sensitivity_schedule import TOLERANCE, write_schedule
from compression.exporting.learned import fits_int8
from compression.quantizers.input_statistics import write_input_statistics
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
from utils.output.commands import command


def chosen_analysis(arguments: TrainArguments) -> Callable[[ClassifierCompressor], str] | None:
    """Return what the arguments ask for instead of training, or None.

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
        given.remove("evaluate")  # Distiller's users give both
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
            raise UserError(f"--{name.replace('_', '-')} needs a trained network; give --weights FILE or --resume-from RUN")
    return asked[given[0]] if given else None


def show_timeline(compressor: ClassifierCompressor) -> str:
    """Return the schedule's timeline."""
    arguments, scheduler = compressor.arguments, compressor.scheduler
    assert scheduler is not None
    rate = compressor.run.learning_rate
    rates = [rate.at(epoch + 1 / compressor.run.steps_per_epoch) for epoch in range(arguments.epochs)] if rate else None
    return timeline(scheduler.schedule, arguments.epochs, compressor.recipe.lr0, rates)


def show_summary(compressor: ClassifierCompressor) -> str:
    """Return a summary of the network."""
    return summary(compressor.arguments.summary, deepcopy(compressor.model).cpu(), compressor.spec)


def analyse_sensitivity(compressor: ClassifierCompressor) -> str:
    """Prune every layer alone to several sparsities and measure each on the validation images; write a table, a plot and a schedule.

    If no layer tolerates any pruning there is no schedule, but still the table and the plot.
    """
    arguments, model = compressor.arguments, compressor.run.averaged
    kind, sparsities = arguments.sense, parse_range(arguments.sense_range)
    graph = None if kind == "element" else Measurements(model, compressor.feed.calibration).graph
    table = analyse(model, graph, kind, sparsities, compressor.validate, progress=_progress)
    with _new_directory(arguments) as directory:
        if not distributed.is_main():
            return ""
        write_results(table, directory.path)
        path = directory.path / "schedule.yaml"
        try:
            write_schedule(table, kind, graph, TOLERANCE, path)
        except UserError as error:
            return f"table and plot: {directory.path}\n{error}"
    source = {"weights": arguments.weights} if arguments.weights else {"model": arguments.model}
    pretrained = "" if arguments.weights else " --pretrained"
    following = command("train", **source, data=arguments.data, compress=path)
    return f"table, plot and schedule: {directory.path}\nnext: {following}{pretrained}"


@contextmanager
def _new_directory(arguments: TrainArguments) -> Iterator[RunDirectory]:
    """Make a run's folder, and delete it again if writing to it fails."""
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
    before, run = compressor.profile, compressor.run
    measurements = Measurements(compressor.model, compressor.feed.calibration)
    thinned = thin_(run, Masks(), measurements, FilterRemover())
    if not thinned.groups:
        return str(thinned)
    after, run.evaluation = compressor.profile, compressor.validate()
    with _new_directory(compressor.arguments) as directory:
        path = _save(compressor, directory, "thinned.pt")
    costs = f"multiply-adds {before.macs:,} -> {after.macs:,}, parameters {before.params:,} -> {after.params:,}"
    return f"{thinned}\n{costs}\n{measured(run.evaluation)}\ncheckpoint {path}"


def _save(compressor: ClassifierCompressor, directory: RunDirectory, name: str) -> Path:
    path = directory.weights / name
    if distributed.is_main():
        save_checkpoint(path, inference_state(compressor.run, compressor.arguments, compressor.profile))
    return path


def quantize(compressor: ClassifierCompressor) -> str:
    """Quantize the network after training, measure it before and after, and save it with what was calibrated."""
    arguments, run = compressor.arguments, compressor.run
    quantizer = requested_quantizer(arguments)
    assert quantizer is not None
    before = compressor.validate()
    measurements = Measurements(run.model, compressor.feed.calibration)
    quantize_(run, quantizer, measurements.inputs(), lambda: measurements.examples)
    run.evaluation = compressor.validate()
    with _new_directory(arguments) as directory:
        path = _save(compressor, directory, "quantized.pt")
        if distributed.is_main():
            write_input_statistics(directory.path / "calibration.yaml", quantizer.input_statistics)
    stored = getattr(quantizer, "model_activation_stats", None)
    ranges = f"ranges by {stored}" if stored else f"ranges of {len(measurements.examples)} training images"
    command = f"export.py --weights {path} --int8" if fits_int8(run.model) else f"val.py --weights {path}"
    return (
        f"{len(run.spec.quantization)} layers quantized, {ranges}\n"
        f"before: {measured(before)}\nafter:  {measured(run.evaluation)}\n"
        f"checkpoint {path}\nnext: python {command} --data {arguments.data}"
    )


def measure(compressor: ClassifierCompressor) -> str:
    """Measure the network on the validation images."""
    evaluation = compressor.validate()
    confusion = f"\n{confusion_text(evaluation, compressor.spec.class_names)}" if compressor.arguments.confusion else ""
    return measured(evaluation) + confusion


def measured(evaluation: Evaluation) -> str:
    """Return an evaluation in a line."""
    return f"{evaluation.text} on {evaluation.images} validation images"


def confusion_text(evaluation: Evaluation, class_names: tuple[str, ...]) -> str:
    """Return the confusion matrix as text: a row per true class, a column per prediction."""
    import pandas as pd

    names = [name[:12] for name in class_names]
    table = pd.DataFrame(evaluation.confusion.numpy(), index=pd.Index(names, name="true \\ predicted"), columns=names)
    return f"confusion matrix\n{table.to_string()}"
