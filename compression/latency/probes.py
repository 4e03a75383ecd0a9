"""Networks at drawn widths as files, to be timed on another device by benchmarks/device_probe.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from compression.latency.runtimes import Candidates
from compression.latency.table import FORMAT, VERSION, Setting, width_vector
from compression.tracing.graph import Keep
from models.backends.exported import optional_module
from utils.errors import UserError
from utils.files.checkpoint import write_text

COUNT = 48


def write_probes(candidates: Candidates, setting: Setting, draws: Callable[[int], Keep], folder: Path) -> int:
    """Write the files, the dense network first, and probes.json, which says what they are.

    Returns:
        How many there are.

    Raises:
        UserError: the folder can't be written, or the runtime runs no ONNX files.
    """
    if candidates.model is None:
        raise UserError("--write-probes is for --runtime onnxruntime, whose files another device can run")
    onnx = optional_module("onnx", "--write-probes")
    rows = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(COUNT):
            keep = draws(i) if i else {}
            file = f"{i:03}.onnx"
            rows.append({"file": file, "widths": [int(width) for width in width_vector(candidates.graph, keep)]})
            onnx.save(candidates.model.at(keep), str(folder / file))
        about = {"format": FORMAT, "version": VERSION, "setting": asdict(setting)}
        groups = [group.name for group in candidates.graph.groups]
        write_text(folder / "probes.json", json.dumps({**about, "groups": groups, "probes": rows}, indent=1))
    except OSError as error:
        raise UserError(f"{folder} can't be written ({error.strerror})") from None
    return len(rows)
