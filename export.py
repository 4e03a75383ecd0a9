"""Export a classifier to files that run without RankCut: python export.py --weights best.pt --include onnx openvino

Each file is run in its own runtime and compared with the network in torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compression.exporting.arguments import ExportArguments
from compression.exporting.measuring import FileResult
from compression.exporting.run import ExportResults, prepare_export, run_export
from utils.arguments import parse, to_record
from utils.errors import run_script
from utils.files.runs import RunDirectory, check_place, write_json
from utils.files.yaml_files import write_yaml
from utils.output.commands import command

LISTED_LAYERS = 5


def main() -> None:
    arguments, given = parse(ExportArguments, __doc__)
    if "weights" not in given:
        arguments = replace(arguments, weights=str(Path(__file__).resolve().parent / arguments.weights))
    check_place(arguments.project, arguments.name)
    classifier = prepare_export(arguments)
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    try:
        (directory.path / "results.json").unlink(missing_ok=True)  # of an earlier run, whose files are about to be replaced
        write_yaml(directory.path / "opt.yaml", to_record(arguments))
        exported = run_export(arguments, classifier, directory.path)
        write_json(directory.path / "results.json", exported.to_dict())
    except BaseException:  # leave no file behind that was not measured
        directory.discard()
        raise
    print(report(exported))
    print(f"results in {directory.path}")
    print(f"next: {command('predict', weights=next(iter(exported.ship.values())), source='IMAGES')}")


def report(exported: ExportResults) -> str:
    """Return the console report: a line per file, how much of each runs in int8, and which file to use."""
    eager = exported.eager
    lines = [f"note   {note}" for note in exported.notes]
    lines.append(f"{'format':<12}{'precision':<10}{'bytes':>12}{'top-1':>9}{'ms, batch 1':>13}{'max difference':>16}")
    lines.append(f"{'eager':<12}{eager['precision']:<10}{'':>12}{_percent(eager['top1']):>9}{eager['latency_ms']:>13.3f}")
    lines += [
        f"{row.format:<12}{row.precision:<10}{row.bytes:>12,}{_percent(row.top1):>9}{row.latency_ms:>13.3f}{row.max_difference:>16.1e}"
        for row in exported.files
    ]
    lines += [audit_line(row) for row in exported.files if row.precision == "int8"]
    lines += [f"{name}: use {path}" for name, path in exported.ship.items()]
    return "\n".join(lines)


def audit_line(row: FileResult) -> str:
    """Return how much of a file runs in int8, and which layers stay in float."""
    done, rest = len(row.int8_layers), row.fp32_layers
    more = f", ... ({len(rest)} in all)" if len(rest) > LISTED_LAYERS else ""
    names = f"; in float: {', '.join(rest[:LISTED_LAYERS])}{more}" if rest else ""
    return f"{row.format}: {done} of {done + len(rest)} convolutions and linear layers run in int8{names}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


if __name__ == "__main__":
    run_script(main)
