"""The flags that val.py and predict.py share: which classifier runs, where, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models.backends import Backend, open_backend
from utils.arguments import architecture_flag, device_flag, exist_ok_flag, flag, half_flag, imgsz_flag, name_flag

ROOT = Path(__file__).resolve().parents[2]  # what default paths are relative to, wherever a script is started


@dataclass(frozen=True)
class BackendArguments:
    """Flags of a script that runs a trained classifier."""

    weights: str = flag(
        "weights/digits.pt",
        "classifier: .pt (RankCut's own, a plain state dict, or an official YOLOv5 *-cls.pt), .onnx, .torchscript, or an OpenVINO folder",
        metavar="PATH",
        group="network",
    )
    model: str = architecture_flag()
    imgsz: int | None = imgsz_flag()
    device: str = device_flag()
    half: bool = half_flag()
    name: str = name_flag()
    exist_ok: bool = exist_ok_flag()

    def open_backend(self, given: set[str], device: torch.device) -> Backend:
        """Load the classifier into its runtime; ``given`` are the names of the flags on the command line."""
        weights = self.weights if "weights" in given else str(ROOT / self.weights)
        return open_backend(weights, device, self.half, self.model or None, self.imgsz)
