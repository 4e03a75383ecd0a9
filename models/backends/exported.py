"""Run an exported classifier: uint8 images in, logits out, whatever runtime the file is for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backends.metadata import Metadata
from utils.data.transforms import normalisation_tables, normalise_by_table
from utils.errors import UserError
from utils.spec import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, ModelSpec

Shape = tuple[int | None, ...]
INSTALL = "pip install -r requirements-export.txt"
PROBED = 2  # images, where a file takes any number: one that was made for one shows here
SMALLEST = float(np.finfo(np.float32).tiny)  # of a probability, whose logarithm is taken


def optional_module(name: str, what: str) -> Any:
    """Import a library that only exported files need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs {name.partition('.')[0]}, which can't be imported ({error}); {INSTALL}") from None


class Runtime(Protocol):
    """A file in its runtime.

    Attributes:
        input_shape, input_type: what the file takes, () where it does not tell; None in a shape is any size.
        metadata: the text that export.py wrote into the file, if it did.
        notes: what the user should know of how it runs.
    """

    input_shape: Shape
    input_type: str
    metadata: str | None
    notes: list[str]

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the outputs [B, classes]."""


Start = Callable[[Path, torch.device, bool], Runtime]  # (file, device, whether half precision is welcome)


class ExportedBackend:
    """Runs an exported file; what the file does not tell is assumed, and said in ``notes``."""

    def __init__(self, runtime: Runtime, path: Path, imgsz: int | None = None) -> None:
        self.runtime, self.path, self.notes = runtime, path, list(runtime.notes)
        self.known = Metadata.from_json(runtime.metadata, path) if runtime.metadata else self._assume(imgsz)
        self.spec, self.named, self.record = self.known.spec, self.known.named, self.known.record
        if imgsz is not None and imgsz != self.spec.imgsz:
            raise UserError(f"{path} takes images of {self.spec.imgsz} px, not of {imgsz}; leave --imgsz out, or export it at {imgsz}")
        self.tables = normalisation_tables(self.spec)
        if runtime.metadata:
            self._check_input()
            self._check_outputs()

    def logits(self, images: Tensor) -> Tensor:
        inputs = images.numpy() if self.known.preprocessing else normalise_by_table(images.numpy(), self.tables)
        outputs = finite(torch.from_numpy(np.array(self._run(inputs), dtype=np.float32)), str(self.path))
        # softmax(log(p)) = p, so that whoever takes logits gets the file's own probabilities back.
        return outputs.clamp_min_(SMALLEST).log_() if self.known.softmax else outputs

    def _run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Run any number of images; a file of a fixed batch gets its batches, the last one filled with zeros."""
        inputs, size = inputs.astype(self.runtime.input_type or inputs.dtype, copy=False), self.known.batch_size
        if size is None or len(inputs) == size:
            return self._pass(inputs)
        parts = []
        for begin in range(0, len(inputs), size):
            part = inputs[begin : begin + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            parts.append(self._pass(filled)[: len(part)])
        return np.concatenate(parts)

    def _pass(self, inputs: NDArray[Any]) -> NDArray[Any]:
        try:
            return self.runtime.run(inputs)
        except Exception as error:  # each runtime raises its own
            raise UserError(f"{self.path} does not run on {len(inputs)} image(s) of {self.spec.imgsz} px ({one_line(error)})") from None

    def _probe(self, count: int) -> NDArray[Any]:
        """Run a batch of zeros."""
        shape = [count, *(size or 1 for size in self.known.input_shape[1:])]
        return self._pass(np.zeros(shape, self.runtime.input_type or self.known.input_type))

    def _takes_two(self, classes: int) -> bool:
        try:
            return self._probe(PROBED).shape == (PROBED, classes)
        except UserError:
            return False

    def _check_input(self) -> None:
        told, found = self.known.input_shape, self.runtime.input_shape
        if found and (len(found) != 4 or any(a != b and b is not None for a, b in zip(told, found, strict=True))):
            raise self._misfit(f"an input of {shown_shape(told)}", shown_shape(found))
        if self.runtime.input_type and self.runtime.input_type != self.known.input_type:
            raise self._misfit(f"{self.known.input_type} inputs", self.runtime.input_type)

    def _check_outputs(self) -> None:
        count = self.known.batch_size or PROBED
        outputs, expected = self._probe(count), (count, self.known.spec.num_classes)
        if outputs.shape != expected:
            raise self._misfit(f"outputs of {shown_shape(expected)}", shown_shape(outputs.shape))
        if self.known.softmax and not are_probabilities(outputs):
            raise self._misfit("probabilities", "outputs that do not sum to 1")

    def _misfit(self, told: str, found: str) -> UserError:
        return UserError(f"{self.path}: its metadata tells {told}, but it has {found}; the metadata is not this file's: export it again")

    def _assume(self, imgsz: int | None) -> Metadata:
        """Describe a file that tells nothing of itself.

        Raises:
            UserError: its input is no batch of images, or the size of the images is not known.
        """
        shape = self.runtime.input_shape or (None, 3, None, None)
        if len(shape) != 4 or shape[1] not in (None, 1, 3) or self.runtime.input_type == "uint8":
            raise UserError(
                f"{self.path} has no metadata of export.py and takes {self.runtime.input_type} {shown_shape(shape)}; "
                "without metadata only floating-point [batch, 1 or 3, height, width] is understood"
            )
        batch, channels, height, width = shape
        if height != width and None not in (height, width):
            raise UserError(f"{self.path} takes images of {height} x {width} px; only square ones are understood")
        side = height or width or imgsz
        if side is None:
            raise UserError(f"{self.path} does not tell the size of its images; give --imgsz")
        if not MIN_IMAGE_SIZE <= side <= MAX_IMAGE_SIZE:
            raise UserError(f"image size is {side}; it must lie in {MIN_IMAGE_SIZE}..{MAX_IMAGE_SIZE}")
        self.spec = ModelSpec(self.path.stem, 1, side, channels or 3)
        self.known = Metadata(self.spec, batch_size=batch, named=False)
        outputs = self._probe(batch or 1)
        if outputs.ndim != 2 or len(outputs) != (batch or 1):
            raise UserError(
                f"{self.path} gives {shown_shape(outputs.shape)} for {batch or 1} image(s); a classifier gives [batch, classes]"
            )
        if batch is None and not self._takes_two(outputs.shape[1]):
            batch = 1
            self.notes.append(f"{self.path} says that it takes any number of images, but it takes one; it gets them one by one")
        softmax = are_probabilities(outputs)
        spec = ModelSpec(self.path.stem, outputs.shape[1], side, channels or 3)
        means = ", ".join(f"{value:g}" for value in spec.mean)
        self.notes.append(
            f"{self.path} has no metadata of export.py; assumed: images of {side} px, {spec.channels} channel(s), "
            f"ImageNet's mean ({means}) and std, outputs are {'probabilities' if softmax else 'logits'}"
        )
        return Metadata(spec, softmax=softmax, batch_size=batch, named=False)


def finite(outputs: Tensor, what: str) -> Tensor:
    """Return a classifier's outputs.

    Raises:
        UserError: some are no numbers, so that no class could be told from them.
    """
    if not bool(outputs.isfinite().all()):
        raise UserError(f"{what} gives outputs that are no numbers (nan or inf)")
    return outputs


def are_probabilities(outputs: NDArray[Any]) -> bool:
    """Whether outputs [B, classes] are probabilities."""
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-2))


def name_outputs_(backend: Any, class_names: tuple[str, ...], data: str) -> None:
    """Give a classifier without class names those of a data set, in place, in the data set's order.

    Raises:
        UserError: the numbers differ.
    """
    if backend.named:
        return
    if len(class_names) != backend.spec.num_classes:
        raise UserError(f"data '{data}' has {len(class_names)} classes, the weights have {backend.spec.num_classes} outputs and no names")
    backend.spec = backend.spec.with_(class_names=class_names)
    backend.notes.append("the weights carry no class names; their outputs are taken in the order of the data's classes")


def shown_shape(shape: Shape) -> str:
    """Return a shape for a message."""
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
