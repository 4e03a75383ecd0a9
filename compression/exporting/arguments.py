"""The flags of export.py, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

from compression.exporting.formats import FORMATS, QUANTIZABLE
from utils.arguments import check_at_least, flag, shared
from utils.errors import UserError, unknown

OPSETS = (18, 21)  # first and last: what torch writes, and what onnxruntime 1.18 reads


@dataclass(frozen=True)
class ExportArguments:
    """Flags of export.py."""

    weights: str = flag(
        "weights/digits.pt", "RankCut's checkpoint, a plain state dict, or an official YOLOv5 *-cls.pt", metavar="PATH", group="network"
    )
    model: str = shared.model()
    include: tuple[str, ...] = flag(("onnx",), "formats to write", choices=FORMATS, many=True, group="output")
    int8: bool = flag(False, f"also quantize to int8 ({', '.join(QUANTIZABLE)}), calibrated on --data", group="quantization")
    half: bool = flag(False, "fp16 weights instead of fp32", group="output")
    dynamic: bool = flag(False, "accept any number of images per forward pass", group="output")
    batch_size: int = flag(1, "images per forward pass without --dynamic; smaller batches are padded", "--batch", group="output")
    imgsz: tuple[int, ...] | None = shared.imgsz()
    opset: int = flag(18, f"version of ONNX's operators, {OPSETS[0]}..{OPSETS[1]}", metavar="VERSION", group="output")
    with_preprocess: bool = flag(False, "put normalisation and softmax into the file: uint8 images in, probabilities out", group="output")
    data: str = shared.data("", "training images for calibration, validation images for the accuracy")
    download: bool = shared.download()
    max_pixels: int = shared.max_pixels()
    images: int = flag(256, "training images used for calibration", group="quantization")
    max_drop: float = flag(0.01, "top-1 that int8 may lose; if more, the other file is recommended", metavar="SHARE", group="quantization")
    seed: int = flag(0, "equal seeds give equal calibration images", group="quantization")
    workers: int = shared.workers()
    project: str = shared.project("runs/export")
    name: str = shared.name()
    exist_ok: bool = shared.exist_ok()


def check_arguments(arguments: ExportArguments) -> None:
    """Refuse what can't be done before anything is loaded.

    Raises:
        UserError: a value is unknown or out of range, or flags contradict each other.
    """
    for name in arguments.include:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    check_at_least(arguments, batch_size=1, images=1, seed=0)
    if arguments.dynamic and arguments.batch_size != 1:
        raise UserError(f"--dynamic takes any number of images, so it excludes --batch-size {arguments.batch_size}")
    if not OPSETS[0] <= arguments.opset <= OPSETS[1]:
        raise UserError(f"opset is {arguments.opset}; it must lie in {OPSETS[0]}..{OPSETS[1]}")
    if not 0 <= arguments.max_drop <= 1:
        raise UserError(f"max-drop is {arguments.max_drop}; it is a share of the images, in [0, 1]")
    if arguments.int8 and not arguments.data:
        raise UserError("--int8 needs images to calibrate on: give --data, preferably what the classifier was trained on")
    if arguments.int8 and (unfit := [name for name in arguments.include if name not in QUANTIZABLE]):
        raise UserError(f"--int8 can't be written as {unfit[0]}; valid: {', '.join(QUANTIZABLE)}")
