"""What all benchmarks share: flags, and a report as a table and as JSON with the machine and the versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def benchmark_parser(description: str | None, threads: int = 2) -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads, help="of torch")
    parser.add_argument("--out", default="", help="JSON file to write")
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and give torch its threads."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def machine() -> dict[str, Any]:
    """Return processor, cores, threads and versions."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": capabilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(name: str, rows: Sequence[dict[str, Any]], out: str) -> None:
    """Print rows as a table; write them, with the machine, to ``out`` unless that is empty."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if out:
        Path(out).write_text(json.dumps({"benchmark": name, "machine": about, "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
