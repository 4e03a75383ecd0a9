"""Time a network at many widths on the device that will run it, for prune.py --latency-table.

    prune.py ... --write-probes probes     # where RankCut is; copy the folder and this file to the device
    python device_probe.py probes --threads 4 --out table.json
    prune.py ... --latency-table table.json

This file needs onnxruntime and numpy alone. Each network runs by turns with the dense one, the first; of every turn the quickest pass
counts, and of all rounds the median ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROUNDS, TURN_MS, PASSES = 5, 40.0, 6


def open_session(path: Path, threads: int) -> Any:
    """Open a file with so many threads; 0 leaves them to onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def turn(session: Any, inputs: dict[str, Any], passes: int) -> float:
    """Return the milliseconds of the quickest of some passes; one before them does not count."""
    session.run(None, inputs)
    taken = []
    for _ in range(passes):
        start = time.perf_counter()
        session.run(None, inputs)
        taken.append((time.perf_counter() - start) * 1e3)
    return min(taken)


def machine() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """Return the table of a folder of probes."""
    content: dict[str, Any] = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
    dense, *others = content.pop("probes")
    session = open_session(folder / dense["file"], threads)
    about = session.get_inputs()[0]
    inputs = {about.name: np.zeros(about.shape, np.float32)}
    passes = int(np.clip(TURN_MS / turn(session, inputs, 1), 1, PASSES))
    ratios, whole = [], []
    for probe in others:
        narrow = open_session(folder / probe["file"], threads)
        pairs = np.array([(turn(session, inputs, passes), turn(narrow, inputs, passes)) for _ in range(ROUNDS)])
        whole.append(float(np.median(pairs[:, 0])))
        ratios.append(float(np.median(pairs[:, 1] / pairs[:, 0])))
        print(f"{probe['file']}  {ratios[-1]:.3f} of {whole[-1]:.3f} ms", flush=True)
    dense_ms = float(np.median(whole))
    rows = [(dense["widths"], 1.0), *((probe["widths"], ratio) for probe, ratio in zip(others, ratios, strict=True))]
    content["setting"] |= {"machine": machine(), "threads": threads, "release": onnxruntime.__version__}
    timed = [{"widths": widths, "ms": round(ratio * dense_ms, 6)} for widths, ratio in rows]
    return {**content, "measured": time.strftime("%Y-%m-%d"), "timed": timed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what prune.py --write-probes wrote")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("table.json"))
    options = parser.parse_args()
    options.out.write_text(json.dumps(measure(options.folder, options.threads), indent=1), encoding="utf-8")
    print(f"times in {options.out}")


if __name__ == "__main__":
    main()
