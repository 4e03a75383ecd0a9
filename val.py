"""Measure a classifier: python val.py --weights best.pt --data FOLDER --split val"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.backends.arguments import BackendArguments
from models.validation import Measurement, load_for, measure
from utils.arguments import check_at_least, flag, parse, shared
from utils.data.datasets import SPLIT_FOLDERS
from utils.distributed import select_device
from utils.errors import run_script
from utils.files.runs import RunDirectory, check_place
from utils.measures.metrics import per_class
from utils.output.reports import report_evaluation

MANY_CLASSES = 100  # above this, the classes are printed with --verbose only


@dataclass(frozen=True)
class ValArguments(BackendArguments):
    """Flags of val.py."""

    data: str = shared.data("digits", "built-in data set, folder, or YAML; without it, what the weights were trained on if they tell")
    split: str = flag(
        "val", "images to measure on; without a val folder, val is the part held out in training", choices=SPLIT_FOLDERS, group="data"
    )
    val_fraction: float | None = flag(None, "share of train to hold out; default: the checkpoint's own", metavar="SHARE", group="data")
    seed: int | None = flag(None, "seed of the held-out part; default: the checkpoint's own", group="data")
    download: bool = shared.download()
    max_pixels: int = shared.max_pixels()
    batch_size: int = flag(128, "images per forward pass", "--batch", group="run")
    workers: int = shared.workers()
    verbose: bool = flag(False, f"print all classes, even if there are more than {MANY_CLASSES}", group="output")
    project: str = shared.project("runs/val")


def main() -> None:
    arguments, given = parse(ValArguments, __doc__)
    check_at_least(arguments, batch_size=1)
    check_place(arguments.project, arguments.name)
    device = select_device(arguments.device)
    backend = arguments.open_backend(given, device)
    if "data" not in given:  # what it was trained on, where the file tells
        arguments = replace(arguments, data=backend.record.get("data") or arguments.data)
    data = load_for(
        backend, arguments.data, arguments.split, arguments.val_fraction, arguments.seed, arguments.download, arguments.max_pixels
    )
    result = measure(backend, data, arguments.split, arguments.batch_size, arguments.workers, device)
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    report_evaluation(result.evaluation, result.spec, directory.path, result.unreadable)
    print(report(result, arguments), f"\nresults in {directory.path}", sep="")


def report(result: Measurement, arguments: ValArguments) -> str:
    """Return the console report: per class, then overall."""
    evaluation, classes = result.evaluation, len(result.spec.class_names)
    table = per_class(evaluation, result.spec.class_names)
    shown = table if arguments.verbose or classes <= MANY_CLASSES else table.head(0)
    speed = ", ".join(f"{value:.2f} ms {stage}" for stage, value in evaluation.speed_ms.items())
    lines = [
        *(f"note   {note}" for note in result.notes),
        *([shown.to_string(index=False, float_format=lambda value: f"{value:.3f}")] if len(shown) else []),
        f"{arguments.weights} on {arguments.data}, split {arguments.split}, {evaluation.images} images"
        + (f" ({len(result.unreadable)} unreadable)" if result.unreadable else ""),
        evaluation.text,
        f"per image: {speed} (pre-process includes reading and decoding)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
