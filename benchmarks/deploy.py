"""What deployment gains: a classifier dense, pruned, and both in int8, in torch and in each runtime that is installed.

python -m benchmarks.deploy --model resnet50 --imgsz 224 --out FILE                      random weights, speed alone
python -m benchmarks.deploy --weights DENSE PRUNED --data FOLDER --append --out FILE     accuracy as well

All forms take turns, so that noise affects them alike. Latencies, from uint8 images to logits, are medians with quartiles;
speed-ups are relative to the first network in torch. Files have a fixed batch. Size is the file's; in torch, the tensors'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.exporting.formats import FORMATS
from compression.exporting.graphs import ExportSource
from compression.exporting.measuring import difference_of, noise_images, refuse_wrong_outputs, size_of, times_of
from compression.exporting.run import EVALUATION_BATCH
from compression.pruning.allocation import Budget, allocate
from compression.pruning.narrowing import spec_of
from compression.pruning.plan import entries_of, make_plan
from compression.pruning.surgery import shrink_
from compression.scoring.calibration import Calibration, sample
from compression.scoring.criteria import score
from compression.tracing.channels import trace
from compression.tracing.costs import macs_cost
from models.backends import Backend, TorchBackend, open_backend
from models.backends.exported import CPU
from models.backends.metadata import Metadata
from models.loading import LoadedClassifier, load_classifier
from models.networks import build
from models.networks.widths import group_counts
from models.validation import load_for, measure
from utils.data.splits import ImageData
from utils.errors import UserError, run_script
from utils.measures.profile import count_macs, example_input
from utils.spec import ModelSpec

SHARE = 0.5  # of the multiply-adds that pruning leaves
BATCHES = (1, 8)
KEYS = ("network", "step", "runtime", "precision")  # a new row replaces an old one with the same values of these
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # of the formats that have int8


@dataclass
class Form:
    """A network in one runtime and precision: a backend per batch size; ``layers`` is how many run in int8, of how many."""

    step: str
    runtime: str
    precision: str
    macs: int
    backends: Sequence[Backend]
    size: int  # bytes
    layers: str = "0"
    times: dict[int, list[float]] = field(default_factory=dict)


def random_networks(options: argparse.Namespace) -> list[tuple[str, LoadedClassifier]]:
    """Build a network with random weights, and cut a copy to half the multiply-adds, uniformly, by L1."""
    spec = ModelSpec(options.model, 1000 if options.imgsz >= 128 else 10, options.imgsz)
    torch.manual_seed(options.seed)
    dense = build(spec).eval()
    graph, total = trace(dense, example_input(dense, spec)), count_macs(dense, spec)
    budget = Budget(macs_cost(graph, total), SHARE, "macs")
    widths = allocate(graph, entries_of(graph, spec.name), budget, options.round_to, 1, None)
    orders = {name: found.order.tolist() for name, found in score("l1", dense, graph, None, options.seed, widths).groups.items()}
    narrow = deepcopy(dense)
    shrink_(narrow, graph, make_plan(graph, widths, orders).kept, next(noise(spec, 2, options.seed).batches())[0])
    return [
        ("dense", LoadedClassifier(dense, spec)),
        ("pruned", LoadedClassifier(narrow.eval(), spec_of(spec, group_counts(dense), narrow))),
    ]


def trained_networks(options: argparse.Namespace) -> list[tuple[str, LoadedClassifier]]:
    """Load checkpoints; one with a pruning plan is the pruned network."""
    found = [load_classifier(path, options.model or None) for path in options.weights]
    for path, loaded in zip(options.weights, found, strict=True):
        if loaded.spec.quantization:
            raise UserError(f"{path} is quantized already; give the float32 network, which is quantized here after training")
    return [("pruned" if loaded.checkpoint.get("plan") else "dense", loaded) for loaded in found]


def noise(spec: ModelSpec, count: int, seed: int) -> Calibration:
    """Return images of noise to calibrate on: speed does not depend on the ranges."""
    return Calibration(noise_images(spec, count, seed), torch.zeros(count, dtype=torch.long), spec, 32)


def forms_of(step: str, loaded: LoadedClassifier, calibration: Calibration, formats: Sequence[str], folder: Path) -> list[Form]:
    """Write a network in each format and precision, open the files, and refuse those with wrong outputs."""
    eager = TorchBackend(loaded, CPU)
    macs, size = count_macs(eager.model, eager.spec), sum(t.numel() * t.element_size() for t in eager.model.state_dict().values())
    forms = [Form(step, "torch", "fp32", macs, [eager] * len(BATCHES), size)]
    model = deepcopy(eager.model).to(memory_format=torch.contiguous_format).requires_grad_(False)
    sources = [ExportSource(model, Metadata(eager.spec, batch_size=batch, named=eager.named), calibration=calibration) for batch in BATCHES]
    images = calibration.images[: max(BATCHES)]
    for name in formats:
        for precision in ("fp32", "int8"):
            paths = [folder / f"{precision}_{batch}{FORMATS[name].suffix}" for batch in BATCHES]
            for source, path in zip(sources, paths, strict=True):
                FORMATS[name].write(source, precision, path)
            backends = [open_backend(str(path), CPU) for path in paths]
            difference = max(difference_of(eager.logits(images), backend.logits(images), False) for backend in backends)
            audit = FORMATS[name].audit(sources[0], paths[0])
            if precision == "fp32":
                refuse_wrong_outputs(paths[0], difference)
            label, layers = step + " + int8" * (precision == "int8"), f"{len(audit.int8)}/{len(audit.int8) + len(audit.others)}"
            forms.append(Form(label, RUNTIMES[name], precision, macs, backends, size_of(paths[0]), layers))
            print(f"{label}, {name} {precision}: outputs differ by {difference:.2g}, layers in int8: {layers}", flush=True)
    return forms


def rows_of(network: str, forms: Sequence[Form], data: ImageData | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the accuracy of each form; return a row for each, with its latencies."""
    rows = []
    for form in forms:
        row: dict[str, Any] = {"network": network, "step": form.step, "runtime": f"{form.runtime} {version(form.runtime)}"}
        row |= {"precision": form.precision, "int8_layers": form.layers, "macs": form.macs, "bytes": form.size}
        measured = measure(form.backends[-1], data, options.split, EVALUATION_BATCH, options.threads, CPU) if data else None
        row |= {"top1": measured.evaluation.top1 if measured else None, "split": options.split if data else None}
        for batch in BATCHES:
            low, median, high = statistics.quantiles(form.times[batch], n=4, method="inclusive")
            row |= {f"latency_ms_batch{batch}": median, f"quartiles_batch{batch}": [round(low, 3), round(high, 3)]}
            row[f"speed_up_batch{batch}"] = statistics.median(forms[0].times[batch]) / median
        rows.append({**row, "threads": torch.get_num_threads()})
    return rows


def installed() -> list[str]:
    """Return the formats whose libraries are installed, including those for int8."""
    found = []
    for name in RUNTIMES:
        try:
            FORMATS[name].check(True)
            found.append(name)
        except UserError as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default="", help="architecture, with random weights if no --weights are given")
    parser.add_argument("--imgsz", type=int, default=224, help="with random weights")
    parser.add_argument("--round-to", type=int, default=16, help="with random weights: keep channels in multiples of this")
    parser.add_argument("--weights", nargs="*", default=[], help="checkpoints of one classifier, the dense one first")
    parser.add_argument("--data", default="", help="for the accuracy and for calibration")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--images", type=int, default=256, help="for calibration")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--passes", type=int, default=5, help="per round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="keep the other rows of --out")
    options = parse_options(parser)
    if not options.weights and (options.data or not options.model):
        parser.error("give --weights (with --data), or --model for random ones, which have no accuracy")
    networks = trained_networks(options) if options.weights else random_networks(options)
    first = TorchBackend(networks[0][1], CPU)
    data = load_for(first, options.data, "val", None, None) if options.data else None
    spec = first.spec
    images = sample(data.split("train"), spec, options.images, 32, options.seed) if data else noise(spec, options.images, options.seed)
    formats, forms = installed(), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (step, loaded) in enumerate(networks):
            (Path(folder) / str(i)).mkdir()
            forms += forms_of(step, loaded, images, formats, Path(folder) / str(i))
        for position, batch in enumerate(BATCHES):
            backends = [form.backends[position] for form in forms]
            for form, taken in zip(forms, times_of(backends, images.images[:batch], options.rounds, options.passes), strict=True):
                form.times[batch] = taken
        rows = rows_of(spec.name, forms, data, options)
    kept = json.loads(Path(options.out).read_text())["rows"] if options.append and Path(options.out).exists() else []
    report("deploy", list({tuple(row[name] for name in KEYS): row for row in [*kept, *rows]}.values()), options.out)


if __name__ == "__main__":
    run_script(main)
