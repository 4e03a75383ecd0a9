"""Measure a classifier: python val.py --weights best.pt --data FOLDER --split val"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.backends import open_backend
from models.validation import Measurement, load_for, measure
from utils.arguments import flag, parse
from utils.distributed import select_device
from utils.errors import UserError, run_script
from utils.files.runs import RunDirectory
from utils.measures.metrics import per_class
from utils.output.reports import report_evaluation

SHOWN_CLASSES = 100  # more are printed with --verbose only


@dataclass(frozen=True)
class ValArguments:
    """Flags of val.py."""

    weights: str = flag(
        "weights/digits.pt",
        "classifier: .pt (ours, a plain state dict, or an official YOLOv5 *-cls.pt), .onnx, .torchscript, or an OpenVINO folder",
    )
    model: str = flag("", "architecture, for a plain state dict that does not tell")
    data: str = flag("digits", "built-in data set, folder, or YAML")
    split: str = flag("val", "val, test or train; without a val folder, val is the part that training held out")
    val_fraction: float | None = flag(None, "share of train that is held out; the checkpoint's own where not given")
    seed: int | None = flag(None, "seed of the part that is held out; the checkpoint's own where not given")
    download: bool = flag(False, "fetch a built-in data set that is not in data/")
    batch_size: int = flag(128, "images per forward pass", "--batch")
    imgsz: int | None = flag(None, "side of the input, pixels; the weights' own where not given", "--img", "--img-size")
    device: str = flag("", "cpu, cuda, a CUDA device's number, mps; the first CUDA device or the CPU where not given")
    workers: int = flag(8, "processes that load images, at most; never more than the cores")
    half: bool = flag(False, "half precision: bf16 where the device has it, else fp16 on CUDA")
    verbose: bool = flag(False, "print every class, also of data sets with many")
    project: str = flag("runs/val", "folder of the runs")
    name: str = flag("exp", "name of the run; a number is added where it is taken")
    exist_ok: bool = flag(False, "write into the folder of that name, whatever it holds")


def main() -> None:
    a, given = parse(ValArguments, "Measure a classifier.")
    if a.batch_size < 1:
        raise UserError(f"batch-size is {a.batch_size}; it must be at least 1")
    device = select_device(a.device)
    weights = a.weights if "weights" in given else str(Path(__file__).resolve().parent / a.weights)
    backend = open_backend(weights, device, a.half, a.model or None, a.imgsz)
    data = load_for(backend, a.data, a.split, a.val_fraction, a.seed, a.download)
    result = measure(backend, data, a.split, a.batch_size, a.workers, device)
    directory = RunDirectory.create(a.project, a.name, a.exist_ok)
    report_evaluation(result.evaluation, result.spec, directory.path, result.unreadable)
    print(text(result, a), f"\nresults in {directory.path}", sep="")


def text(result: Measurement, arguments: ValArguments) -> str:
    """Return the console report: per class, then the whole."""
    evaluation, classes = result.evaluation, len(result.spec.class_names)
    table = per_class(evaluation, result.spec.class_names)
    shown = table if arguments.verbose or classes <= SHOWN_CLASSES else table.head(0)
    speed = ", ".join(f"{value:.2f} ms {stage}" for stage, value in evaluation.speed_ms.items())
    lines = [
        *(f"note   {note}" for note in result.notes),
        *([shown.to_string(index=False, float_format=lambda value: f"{value:.3f}")] if len(shown) else []),
        f"{arguments.weights} on {arguments.data}, split {arguments.split}, {evaluation.images} images"
        + (f" ({len(result.unreadable)} unreadable)" if result.unreadable else ""),
        f"top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, loss {evaluation.loss:.4f}",
        f"per image: {speed} (pre-process includes reading and decoding)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
