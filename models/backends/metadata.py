"""The metadata of an exported file, one JSON text: how to prepare its inputs, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.spec import ModelSpec

FORMAT, VERSION = "rankcut-export", 1
KEY = "rankcut"  # the entry of an ONNX file's metadata and of an OpenVINO model's rt_info
TORCHSCRIPT_FILE = "rankcut.json"  # inside the archive
PRECISIONS = ("fp32", "fp16", "int8")
MAX_BATCH = 1 << 16
# What is kept of the training run's record (how validation images were held out), and which values are valid.
RECORDED: dict[str, Callable[[Any], bool]] = {
    "val_fraction": lambda value: isinstance(value, float) and 0 < value < 1,
    "seed": lambda value: type(value) is int and value >= 0,
}


@dataclass(frozen=True)
class Metadata:
    """An exported file's description.

    Attributes:
        spec: classes, input size, channels, mean and std; only building the network would need the rest.
        precision: of the weights.
        preprocessing: whether the file takes uint8 [B, S, S, C]; else it takes normalised float32 [B, C, S, S].
        softmax: whether the outputs are probabilities; else they are logits.
        batch_size: images per pass; None for any number.
        named: whether the class names are known; else they are placeholders.
        record: how the training run held out validation images.
    """

    spec: ModelSpec
    precision: str = "fp32"
    preprocessing: bool = False
    softmax: bool = False
    batch_size: int | None = None
    named: bool = True
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Of the file's input; None is any size."""
        size, channels = self.spec.size, self.spec.channels
        return (self.batch_size, *size, channels) if self.preprocessing else (self.batch_size, channels, *size)

    @property
    def input_type(self) -> str:
        """Of the numbers that the file takes."""
        return "uint8" if self.preprocessing else "float32"

    def to_json(self) -> str:
        """Return the JSON text."""
        spec = {key: value for key, value in self.spec.to_dict().items() if key not in ("definition", "dropout", "norm_eps", "groups")}
        content = {name: getattr(self, name) for name in ("precision", "preprocessing", "softmax", "batch_size", "named", "record")}
        return json.dumps({"format": FORMAT, "version": VERSION, "spec": spec, **content})

    @classmethod
    def from_json(cls, text: str, path: Path) -> Metadata:
        """Read a file's description.

        Raises:
            UserError: it is incomplete, of a newer version, or holds invalid values.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: its metadata is not JSON; export the file again") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UserError(f"{path}: its metadata is not of the format '{FORMAT}'; export the file again")
        version = content.pop("version", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise UserError(f"{path} has export version {version}; this code reads up to {VERSION}: update RankCut")
        kinds = {"precision": str, "preprocessing": bool, "softmax": bool, "batch_size": int | None, "named": bool, "record": dict}
        for name, kind in {"spec": dict, **kinds}.items():
            if name not in content or not isinstance(content[name], kind):
                raise UserError(f"{path}: its metadata's '{name}' is {content.get(name)!r}; export the file again")
        if content["precision"] not in PRECISIONS:
            raise UserError(f"{path}: its metadata's precision is '{content['precision']}'; valid: {', '.join(PRECISIONS)}")
        size = content["batch_size"]
        if size is not None and not 1 <= size <= MAX_BATCH:
            raise UserError(f"{path}: its metadata's batch_size is {size}; it must lie in 1..{MAX_BATCH}")
        content["record"] = {name: value for name, value in content["record"].items() if name in RECORDED and RECORDED[name](value)}
        try:
            return cls(ModelSpec.from_dict(content["spec"]), **{name: content[name] for name in kinds})
        except (UserError, TypeError) as error:
            raise UserError(f"{path}: its metadata is damaged: {error}") from None
