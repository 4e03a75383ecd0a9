"""An export run: a classifier in; files out, each run in its runtime and measured beside the eager network."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.exporting.arguments import ExportArguments, check_arguments
from compression.exporting.formats import FORMATS
from compression.exporting.graphs import Source
from compression.exporting.learned import is_linear, learned_ranges
from compression.exporting.measuring import TOLERANCE, Row, choose, comparison_images, difference_of, make_row, measure_latencies
from compression.scoring.calibration import sample
from models.backends import Backend, TorchBackend, is_exported, open_backend, warm_up
from models.backends.metadata import RECORDED, Metadata
from models.loading import load_classifier
from models.quantized.preparing import is_quantized, plain_copy, rounded_copy
from models.validation import load_for, measure
from utils.data.splits import ImageData
from utils.errors import UserError

COMPARED = 16  # images
EVALUATION_BATCH = 128
ROUNDING_TOLERANCE = 0.1  # where the graph itself rounds, a last bit may fall to the other side
CPU = torch.device("cpu")


@dataclass
class Exported:
    """What a run made.

    Attributes:
        eager: precision, top-1 and latency of the network in torch.
        rows: the files.
        ship: format -> the file to use.
        notes: what the user should know, the reasons against int8 among it.
    """

    eager: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ship: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return {"formats": [row.to_dict() for row in self.rows], "eager": self.eager, "ship": self.ship}


@dataclass
class TracedClassifier:
    """What is exported, and what it is measured with.

    Attributes:
        reference: the network in torch.
        in_float: what fp32 files compute: the same, but without the rounding of linear grids, if it was trained for them.
        data: with train and validation splits; None without --data.
        compared: images whose outputs are compared, uint8 [B, S, S, C].
    """

    reference: TorchBackend
    in_float: TorchBackend
    source: Source
    data: ImageData | None
    compared: Tensor
    workers: int

    def top1(self, backend: Backend) -> float | None:
        """Return the accuracy on the validation images."""
        if self.data is None:
            return None
        return measure(backend, self.data, "val", EVALUATION_BATCH, self.workers, CPU).evaluation.top1


def load_traced(a: ExportArguments) -> TracedClassifier:
    """Check the flags, and load the classifier and the images; nothing is written.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit, or a library is missing.
    """
    check_arguments(a)
    for name in dict.fromkeys(a.include):
        FORMATS[name].check(a.int8)
    if is_exported(a.weights):
        raise UserError(f"{a.weights} has been exported already; give the checkpoint that it was made from")
    loaded = load_classifier(a.weights, a.model or None)
    reference = TorchBackend(loaded, CPU, imgsz=a.imgsz)
    warm_up(reference, 1, passes=1)
    data = load_for(reference, a.data, "val", None, None, a.download) if a.data else None
    spec = reference.spec
    calibration = sample(data.split("train"), spec, a.images, 32, a.seed) if data and a.int8 else None
    metadata = Metadata(
        spec,
        preprocessing=a.with_preprocess,
        softmax=a.with_preprocess,
        batch_size=None if a.dynamic else a.batch_size,
        named=reference.named or data is not None,
        record={name: reference.record[name] for name in RECORDED if name in reference.record},
    )
    compared = comparison_images((spec.imgsz, spec.imgsz, spec.channels), COMPARED, a.seed)
    if data and len(data.split("val")):
        compared = sample(data.split("val"), spec, COMPARED, COMPARED, a.seed).images
    # The reference is channels-last in memory, which would end up in the graph as transpositions.
    model = deepcopy(reference.model).to(memory_format=torch.contiguous_format)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    in_float, learned = reference, None
    if is_quantized(model):
        learned = learned_ranges(model) if a.int8 else None
        # Linear grids are for int8 files; other weights are rounded once and for all, activations as the network does.
        model = plain_copy(model).eval() if is_linear(model) else rounded_copy(model)
        in_float = TorchBackend(replace(loaded, model=deepcopy(model), notes=[]), CPU, imgsz=a.imgsz)
    return TracedClassifier(reference, in_float, Source(model, metadata, a.opset, calibration, learned), data, compared, a.workers)


def run_export(a: ExportArguments, classifier: TracedClassifier, folder: Path) -> Exported:
    """Write the files into a folder, run each, and choose.

    Raises:
        UserError: the network can't be exported, or a file does not compute what it should.
    """
    formats, stem = list(dict.fromkeys(a.include)), Path(a.weights).stem
    precisions = ["fp16" if a.half else "fp32", *(["int8"] if a.int8 else [])]
    paths = {}
    for name in formats:
        for precision in precisions:
            path = folder / f"{stem}{'' if precision == 'fp32' else f'_{precision}'}{FORMATS[name].suffix}"
            FORMATS[name].write(classifier.source, precision, path)
            paths[name, precision] = path
    backends = {key: open_backend(str(path), CPU) for key, path in paths.items()}
    rounded, plain = (backend.logits(classifier.compared) for backend in (classifier.reference, classifier.in_float))
    softmax = classifier.source.metadata.softmax
    quantized = is_quantized(classifier.reference.model)
    eager_ms, *latencies = measure_latencies([classifier.reference, *backends.values()], classifier.compared[:1])
    eager = {"precision": "quantized" if quantized else "fp32", "top1": classifier.top1(classifier.reference), "latency_ms": eager_ms}
    exported = Exported(eager, notes=list(classifier.reference.notes))
    if quantized and not is_quantized(classifier.source.model) and is_linear(classifier.reference.model):
        exported.notes.append("the network was trained quantized; fp32 files hold its weights and activations without that rounding")
    for ((name, precision), backend), latency in zip(backends.items(), latencies, strict=True):
        path, logits = paths[name, precision], rounded if precision == "int8" else plain
        # Also alone: a graph that is right for one number of images may be wrong for another.
        difference = max(difference_of(logits[:n], backend.logits(classifier.compared[:n]), softmax) for n in (1, len(logits)))
        audit = FORMATS[name].audit(classifier.source, path)
        tolerance = ROUNDING_TOLERANCE if is_quantized(classifier.source.model) else TOLERANCE
        row = make_row(name, precision, path, classifier.top1(backend), latency, difference, audit, tolerance)
        exported.rows.append(row)
        if precision == "fp16" and latency > eager_ms:
            exported.notes.append(f"{name}: fp16 is slower on this CPU than fp32 in torch ({latency:.2f} against {eager_ms:.2f} ms)")
    for name in formats:
        base, *rest = (row for row in exported.rows if row.format == name)
        chosen, reasons = choose(base, rest[0] if rest else None, a.max_drop)
        exported.ship[name] = chosen.path
        if reasons:
            exported.notes.append(f"{name}: int8 is not the one to use: {'; '.join(reasons)}")
    return exported
