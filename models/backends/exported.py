"""Run an exported classifier in any runtime: uint8 images in, logits out."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backends.metadata import Metadata
from utils.data.transforms import normalisation_tables, normalise_by_table
from utils.errors import UserError
from utils.spec import ImageSize, ModelSpec

Shape = tuple[int | None, ...]
INSTALL = "pip install -r requirements-export.txt"
CPU = torch.device("cpu")
PROBED = 2  # images: a file that claims to take any number, but was made for one, fails here
SMALLEST = float(np.finfo(np.float32).tiny)  # probability whose logarithm is taken


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
        input_shape, input_type: what the file takes; () and "" if it does not tell, None for any size.
        metadata: the text that export.py wrote into the file, if it did.
        notes: what the user should know about how it runs.
    """

    input_shape: Shape
    input_type: str
    metadata: str | None
    notes: list[str]

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the outputs [B, classes]."""


class ExportedBackend:
    """Runs an exported file; what the file does not tell is assumed, and ``notes`` says so."""

    def __init__(self, runtime: Runtime, path: Path, imgsz: ImageSize | None = None) -> None:
        self.runtime, self.path, self.notes = runtime, path, list(runtime.notes)
        self.metadata = Metadata.from_json(runtime.metadata, path) if runtime.metadata else self._assume(imgsz)
        self.spec, self.named, self.record = self.metadata.spec, self.metadata.named, self.metadata.record
        if imgsz is not None and imgsz != self.spec.imgsz:
            raise UserError(f"{path} takes images of {self.spec.size_text}, not of {imgsz}; leave --imgsz out, or export it at that")
        self.tables = normalisation_tables(self.spec)
        if runtime.metadata:
            self._check_input()
            self._check_outputs()

    def logits(self, images: Tensor) -> Tensor:
        inputs = images.numpy() if self.metadata.preprocessing else normalise_by_table(images.numpy(), self.tables)
        outputs = finite(torch.from_numpy(np.array(self._run(inputs), dtype=np.float32)), str(self.path))
        # softmax(log(p)) = p: the softmax of these logits gives the file's own probabilities back.
        return outputs.clamp_min_(SMALLEST).log_() if self.metadata.softmax else outputs

    def _run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Run any number of images, in batches if the file's batch size is fixed; the last batch is filled with zeros."""
        inputs, size = inputs.astype(self.runtime.input_type or inputs.dtype, copy=False), self.metadata.batch_size
        if size is None or len(inputs) == size:
            return self._forward(inputs)
        parts = []
        for begin in range(0, len(inputs), size):
            part = inputs[begin : begin + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            parts.append(self._forward(filled)[: len(part)])
        return np.concatenate(parts)

    def _forward(self, inputs: NDArray[Any]) -> NDArray[Any]:
        try:
            return self.runtime.run(inputs)
        except Exception as error:  # each runtime raises its own
            what = f"{len(inputs)} image(s) of {self.metadata.spec.size_text}"
            raise UserError(f"{self.path} does not run on {what} ({one_line(error)})") from None

    def _probe(self, count: int) -> NDArray[Any]:
        """Run a batch of zeros."""
        shape = [count, *(size or 1 for size in self.metadata.input_shape[1:])]
        return self._forward(np.zeros(shape, self.runtime.input_type or self.metadata.input_type))

    def _takes_two(self, classes: int) -> bool:
        try:
            return self._probe(PROBED).shape == (PROBED, classes)
        except UserError:
            return False

    def _check_input(self) -> None:
        told, found = self.metadata.input_shape, self.runtime.input_shape
        if found and (len(found) != 4 or any(a != b and b is not None for a, b in zip(told, found, strict=True))):
            raise self._misfit(f"an input of {shown_shape(told)}", shown_shape(found))
        if self.runtime.input_type and self.runtime.input_type != self.metadata.input_type:
            raise self._misfit(f"{self.metadata.input_type} inputs", self.runtime.input_type)

    def _check_outputs(self) -> None:
        count = self.metadata.batch_size or PROBED
        outputs, expected = self._probe(count), (count, self.metadata.spec.num_classes)
        if outputs.shape != expected:
            raise self._misfit(f"outputs of {shown_shape(expected)}", shown_shape(outputs.shape))
        if self.metadata.softmax and not are_probabilities(outputs):
            raise self._misfit("probabilities", "outputs that do not sum to 1")

    def _misfit(self, told: str, found: str) -> UserError:
        return UserError(f"{self.path}: its metadata claims {told}, but it has {found}; export it again")

    def _assume(self, imgsz: ImageSize | None) -> Metadata:
        """Describe a file without metadata, by its input and by what it gives for zeros.

        Raises:
            UserError: it is no classifier of images, or the size of the images is not known.
        """
        batch, channels, side = self._foreign_input(imgsz)
        self.metadata = Metadata(ModelSpec(self.path.stem, 1, side, channels), batch_size=batch, named=False)
        outputs = self._probe(batch or 1)
        if outputs.ndim != 2 or len(outputs) != (batch or 1):
            found = f"{shown_shape(outputs.shape)} for {batch or 1} image(s)"
            raise UserError(f"{self.path} returns {found}; a classifier returns [batch, classes]")
        if batch is None and not self._takes_two(outputs.shape[1]):
            batch = 1
            self.notes.append(f"{self.path} claims to take any number of images, but takes one; it gets them one by one")
        softmax = are_probabilities(outputs)
        spec = ModelSpec(self.path.stem, outputs.shape[1], side, channels)
        means = ", ".join(f"{value:g}" for value in spec.mean)
        self.notes.append(
            f"{self.path} has no metadata of export.py; assumed: images of {spec.size_text}, {channels} channel(s), "
            f"ImageNet's mean ({means}) and std, outputs are {'probabilities' if softmax else 'logits'}"
        )
        return Metadata(spec, softmax=softmax, batch_size=batch, named=False)

    def _foreign_input(self, imgsz: ImageSize | None) -> tuple[int | None, int, ImageSize]:
        """Return batch size, channels and size of the images that a file without metadata takes."""
        shape = self.runtime.input_shape or (None, 3, None, None)
        if len(shape) != 4 or shape[1] not in (None, 1, 3) or self.runtime.input_type == "uint8":
            raise UserError(
                f"{self.path} has no metadata of export.py and takes {self.runtime.input_type} {shown_shape(shape)}; "
                "without metadata only floating-point [batch, 1 or 3, height, width] is understood"
            )
        batch, channels, height, width = shape
        if height and width:
            side: ImageSize | None = height if height == width else (height, width)
        else:
            side = height or width or imgsz
        if side is None:
            raise UserError(f"{self.path} does not tell the size of its images; give --imgsz")
        return batch, channels or 3, side


def finite(outputs: Tensor, what: str) -> Tensor:
    """Return a classifier's outputs.

    Raises:
        UserError: some are nan or infinite.
    """
    if not bool(outputs.isfinite().all()):
        raise UserError(f"{what} returns outputs that are not finite (nan or inf)")
    return outputs


def are_probabilities(outputs: NDArray[Any]) -> bool:
    """Whether outputs [B, classes] are probabilities."""
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-2))


def ignored_requests(path: Path, device: torch.device, half: bool) -> list[str]:
    """Say which requests a file ignores that runs on the CPU, in the precision that it was exported in."""
    notes = [] if device.type == "cpu" else [f"{path} runs on the CPU, not on {device}"]
    return [*notes, *([f"{path} computes in the precision that it was exported in; --half changes nothing"] if half else [])]


def shown_shape(shape: Shape) -> str:
    """Return a shape for a message."""
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
