"""Classify images: python predict.py --weights best.pt --source IMAGE | FOLDER | GLOB | LIST.txt | VIDEO | 0 | URL"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2

from models.backends import open_backend, warm_up
from models.backends.exported import name_outputs_
from models.prediction import Prediction, predict, share_cores_
from models.writers import PredictionWriter
from utils.arguments import flag, parse
from utils.data.datasets import load_data
from utils.data.sources import open_source
from utils.distributed import select_device
from utils.errors import UserError, run_script
from utils.files.runs import RunDirectory
from utils.output.plots import annotate

ROOT = Path(__file__).resolve().parent  # what the defaults of --weights and --source are relative to


@dataclass(frozen=True)
class PredictArguments:
    """Flags of predict.py."""

    weights: str = flag(
        "weights/digits.pt",
        "classifier: .pt (ours, a plain state dict, or an official YOLOv5 *-cls.pt), .onnx, .torchscript, or an OpenVINO folder",
    )
    model: str = flag("", "architecture, for a plain state dict that does not tell")
    source: str = flag("data/images", "image, folder (recursive), glob, .txt list, video, webcam number, or stream URL")
    data: str = flag("", "data whose class names to use, where the weights carry none")
    topk: int = flag(5, "classes per image")
    batch_size: int = flag(16, "images per forward pass", "--batch")
    imgsz: int | None = flag(None, "side of the input, pixels; the weights' own where not given", "--img", "--img-size")
    device: str = flag("", "cpu, cuda, a CUDA device's number, mps; the first CUDA device or the CPU where not given")
    half: bool = flag(False, "half precision: bf16 where the device has it, else fp16 on CUDA")
    view_img: bool = flag(False, "show each image in a window")
    save_txt: bool = flag(False, "save labels/NAME.txt, a line per class")
    save_csv: bool = flag(False, "save predictions.csv")
    save_json: bool = flag(False, "save predictions.json")
    nosave: bool = flag(False, "do not save annotated images and videos")
    vid_stride: int = flag(1, "of videos and streams, take every so many frames")
    project: str = flag("runs/predict", "folder of the runs")
    name: str = flag("exp", "name of the run; a number is added where it is taken")
    exist_ok: bool = flag(False, "write into the folder of that name, whatever it holds")


def main() -> None:
    a, given = parse(PredictArguments, "Classify images.")
    for name in ("topk", "batch_size"):
        if getattr(a, name) < 1:
            raise UserError(f"{name.replace('_', '-')} is {getattr(a, name)}; it must be at least 1")
    source = open_source(a.source if "source" in given else str(ROOT / a.source), a.vid_stride)
    device = select_device(a.device)
    share_cores_(device, source)  # before a runtime takes its threads
    backend = open_backend(a.weights if "weights" in given else str(ROOT / a.weights), device, a.half, a.model or None, a.imgsz)
    if a.data:
        name_outputs_(backend, load_data(a.data).class_names, a.data)
    for note in backend.notes:
        print(f"note   {note}")
    warm_up(backend, min(a.batch_size, source.files) or 1)
    saves = not a.nosave or a.save_txt or a.save_csv or a.save_json
    directory = RunDirectory.create(a.project, a.name, a.exist_ok) if saves else None
    if directory:
        with PredictionWriter(directory.path, not a.nosave, a.save_txt, a.save_csv, a.save_json) as writer:
            run(a, predict(backend, source, a.batch_size, a.topk), backend.spec.imgsz, writer)
        print(f"results in {directory.path}")
    else:
        run(a, predict(backend, source, a.batch_size, a.topk), backend.spec.imgsz, None)


def run(arguments: PredictArguments, predictions, imgsz: int, writer: PredictionWriter | None) -> None:  # type: ignore[no-untyped-def]
    """Print, save and show predictions as they come, and their mean times at the end."""
    totals: dict[str, float] = {}
    count = skipped = 0
    for prediction in predictions:
        print(console_line(prediction, imgsz), flush=count == 0)
        if prediction.error:
            skipped += 1
            continue
        count += 1
        for stage, milliseconds in prediction.speed_ms.items():
            totals[stage] = totals.get(stage, 0.0) + milliseconds
        if writer:
            writer.save(prediction)
        if arguments.view_img:
            show(prediction)
    if not count:
        raise UserError(f"none of the {skipped} images of {arguments.source} could be read")
    shares = ", ".join(f"{total / count:.1f}ms {stage}" for stage, total in totals.items())
    print(f"{count} images{f', {skipped} unreadable' if skipped else ''}; per image {shares} (pre-process includes decoding)")


def console_line(prediction: Prediction, imgsz: int) -> str:
    """Return YOLOv5's line: what it is, the input's size, the classes, the time in the network."""
    if prediction.error:
        return f"{prediction.item.label}: skipped, {prediction.error}"
    classes = ", ".join(f"{name} {probability:.2f}" for name, probability in prediction.topk)
    return f"{prediction.item.label}: {imgsz}x{imgsz} {classes}, {prediction.speed_ms['inference']:.1f}ms"


def show(prediction: Prediction) -> None:
    """Show an annotated image; pictures wait for a key, frames do not."""
    image = annotate(prediction.item.read(3, 0), [f"{p:.2f} {name}" for name, p in prediction.topk])
    try:
        cv2.imshow(prediction.item.path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.waitKey(1 if prediction.item.frame else 0)
    except cv2.error:
        raise UserError("--view-img needs a screen, and there is none") from None


if __name__ == "__main__":
    run_script(main)
