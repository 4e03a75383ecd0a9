"""Classify images: python predict.py --weights best.pt --source IMAGES

IMAGES is an image, a folder, a glob, a .txt list, a video, a webcam's number, or a stream's URL.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2

from models.backends import name_outputs_, warm_up
from models.backends.arguments import ROOT, BackendArguments
from models.prediction import Prediction, predict, share_cores_
from models.writers import PredictionWriter
from utils.arguments import check_at_least, flag, parse, shared
from utils.data.datasets import load_data
from utils.data.sources import open_source
from utils.distributed import select_device
from utils.errors import UserError, run_script
from utils.files.runs import RunDirectory, check_place
from utils.output.plots import annotate


@dataclass(frozen=True)
class PredictArguments(BackendArguments):
    """Flags of predict.py."""

    source: str = flag("data/images", "image, folder, glob, .txt list, video, webcam number, or stream URL", metavar="IMAGES", group="data")
    data: str = shared.data("", "data set whose class names to use if the weights have none")
    topk: int = flag(5, "classes per image", group="output")
    batch_size: int = flag(16, "images per forward pass", "--batch", group="run")
    view_img: bool = flag(False, "show each image in a window", group="output")
    save_txt: bool = flag(False, "save labels/NAME.txt, one class per line", group="output")
    save_csv: bool = flag(False, "save predictions.csv", group="output")
    save_json: bool = flag(False, "save predictions.json", group="output")
    nosave: bool = flag(False, "do not save annotated images and videos", group="output")
    max_pixels: int = shared.max_pixels()
    vid_stride: int = flag(1, "take every N-th frame of videos and streams", group="data")
    project: str = shared.project("runs/predict")


def main() -> None:
    arguments, given = parse(PredictArguments, __doc__)
    check_at_least(arguments, topk=1, batch_size=1)
    check_place(arguments.project, arguments.name)
    source = open_source(
        arguments.source if "source" in given else str(ROOT / arguments.source), arguments.vid_stride, arguments.max_pixels
    )
    device = select_device(arguments.device)
    share_cores_(device, source)  # before a runtime takes its threads
    backend = arguments.open_backend(given, device)
    if arguments.data:
        name_outputs_(backend, load_data(arguments.data).class_names, arguments.data)
    for note in (*backend.notes, *source.notes):
        print(f"note   {note}")
    warm_up(backend, min(arguments.batch_size, source.files) or 1)
    predictions = predict(backend, source, arguments.batch_size, arguments.topk)
    files = (not arguments.nosave, arguments.save_txt, arguments.save_csv, arguments.save_json)
    if not any(files):
        report(arguments, predictions, backend.spec.size, None)
        return
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    with PredictionWriter(directory.path, *files) as writer:
        report(arguments, predictions, backend.spec.size, writer)
    print(f"results in {directory.path}")


def report(arguments: PredictArguments, predictions: Iterable[Prediction], size: tuple[int, int], writer: PredictionWriter | None) -> None:
    """Print, save and show predictions as they come, and print their mean times at the end."""
    totals: dict[str, float] = {}
    count = skipped = 0
    for prediction in predictions:
        print(console_line(prediction, size), flush=count == 0)
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


def console_line(prediction: Prediction, size: tuple[int, int]) -> str:
    """Return a line like YOLOv5's: the image, the input size, the classes, the time in the network."""
    if prediction.error:
        return f"{prediction.item.label}: skipped, {prediction.error}"
    classes = ", ".join(f"{name} {probability:.2f}" for name, probability in prediction.topk)
    return f"{prediction.item.label}: {size[0]}x{size[1]} {classes}, {prediction.speed_ms['inference']:.1f}ms"


def show(prediction: Prediction) -> None:
    """Show an annotated image; pictures stay until a key is pressed, video frames do not."""
    image = annotate(prediction.item.read(3, 0), [f"{p:.2f} {name}" for name, p in prediction.topk])
    try:
        cv2.imshow(prediction.item.path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        cv2.waitKey(1 if prediction.item.frame else 0)
    except cv2.error:
        raise UserError("--view-img needs a screen, and there is none") from None


if __name__ == "__main__":
    run_script(main)
