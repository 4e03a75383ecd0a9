"""The flags of export.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from utils.arguments import flag
from utils.errors import UserError, unknown

OPSETS = (18, 21)  # first and last: what torch writes, and what onnxruntime 1.18 reads


@dataclass(frozen=True)
class ExportArguments:
    """Flags of export.py."""

    # what and into what
    weights: str = flag("weights/digits.pt", "classifier: ours (also pruned), a plain state dict, or an official YOLOv5 *-cls.pt")
    model: str = flag("", "architecture, for a plain state dict that does not tell")
    include: tuple[str, ...] = flag(("onnx",), "formats: onnx, openvino, torchscript", many=True)
    int8: bool = flag(False, "also quantize to int8 after training, on training images of --data (onnx, openvino)")
    half: bool = flag(False, "fp16 weights instead of fp32")
    dynamic: bool = flag(False, "any number of images per forward pass")
    batch_size: int = flag(1, "images per forward pass, without --dynamic; fewer are filled up", "--batch")
    imgsz: int | None = flag(None, "side of the input, pixels; the weights' own where not given", "--img", "--img-size")
    opset: int = flag(18, f"version of ONNX's operators, {OPSETS[0]}..{OPSETS[1]}")
    with_preprocess: bool = flag(False, "uint8 images in, probabilities out: normalisation and softmax go into the file")
    # calibration and measures
    data: str = flag("", "built-in data set, folder, or YAML: train gives the images to calibrate on, val the accuracy")
    download: bool = flag(False, "fetch a built-in data set that is not in data/")
    images: int = flag(256, "training images to calibrate on")
    max_drop: float = flag(0.01, "top-1 that int8 may lose; where it loses more, the other file is the one to use")
    seed: int = flag(0, "same seed, same calibration images")
    workers: int = flag(8, "processes that load images, at most; never more than the cores")
    # the run
    project: str = flag("runs/export", "folder of the runs")
    name: str = flag("exp", "name of the run; a number is added where it is taken")
    exist_ok: bool = flag(False, "write into the folder of that name, whatever it holds")


def check_arguments(a: ExportArguments, formats: Iterable[str], quantizable: Iterable[str]) -> None:
    """Refuse what can't be done before anything is loaded.

    Args:
        a: the flags.
        formats: those there are.
        quantizable: those of them that int8 can be written in.

    Raises:
        UserError: a value is unknown or out of range, or flags do not go together.
    """
    formats, quantizable = list(formats), list(quantizable)
    for name in a.include:
        if name not in formats:
            raise unknown("format", name, formats)
    for flag_name in ("batch_size", "images"):
        if getattr(a, flag_name) < 1:
            raise UserError(f"{flag_name.replace('_', '-')} is {getattr(a, flag_name)}; it must be at least 1")
    if a.dynamic and a.batch_size != 1:
        raise UserError(f"--dynamic takes any number of images, so --batch-size {a.batch_size} does not go with it")
    if not OPSETS[0] <= a.opset <= OPSETS[1]:
        raise UserError(f"opset is {a.opset}; it must lie in {OPSETS[0]}..{OPSETS[1]}")
    if not 0 <= a.max_drop <= 1:
        raise UserError(f"max-drop is {a.max_drop}; it is a share of the images, in [0, 1]")
    if a.seed < 0:
        raise UserError(f"seed is {a.seed}; it must be at least 0")
    if a.int8 and not a.data:
        raise UserError("--int8 needs images to calibrate on: give --data, best the data that the classifier was trained on")
    if a.int8 and (unfit := [name for name in a.include if name not in quantizable]):
        raise UserError(f"--int8 can't be written as {unfit[0]}; valid: {', '.join(quantizable)}")
