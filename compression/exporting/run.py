"""An export run: write a classifier's files, run each in its own runtime, and compare it with the network in torch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.exporting.arguments import ExportArguments, check_arguments
from compression.exporting.formats import FORMATS
from compression.exporting.graphs import ExportSource
from compression.exporting.learned import LearnedRanges, is_linear, learned_ranges
from compression.exporting.measuring import (
    TOLERANCE,
    FileResult,
    choose,
    difference_of,
    measure_latencies,
    noise_images,
    refuse_wrong_outputs,
    size_of,
)
from compression.scoring.calibration import sample
from models.backends import Backend, TorchBackend, is_exported, open_backend, warm_up
from models.backends.exported import CPU
from models.backends.metadata import RECORDED, Metadata
from models.loading import load_classifier
from models.quantized.preparing import is_quantized, plain_copy, rounded_copy
from models.validation import load_for, measure
from utils.data.splits import ImageData
from utils.errors import UserError
from utils.measures.metrics import Evaluation
from utils.measures.significance import PairedDifference
from utils.spec import image_size

COMPARED = 16  # images
EVALUATION_BATCH = 128
ROUNDING_TOLERANCE = 0.1  # for graphs that round: a difference in the last bit may round to another level


@dataclass
class ExportJob:
    """A classifier that is to be exported, and what its files are compared with.

    Attributes:
        reference: the network in torch.
        in_float: what files in floating point compute: the reference, but without the rounding to linear grids.
        source: what the files are written from.
        data: with train and validation splits; None without --data.
        compared: images for comparing outputs, uint8 [B, S, S, C].
    """

    reference: TorchBackend
    in_float: TorchBackend
    source: ExportSource
    data: ImageData | None
    compared: Tensor
    workers: int

    def evaluate(self, backend: Backend) -> Evaluation | None:
        """Measure a classifier on the validation images."""
        return None if self.data is None else measure(backend, self.data, "val", EVALUATION_BATCH, self.workers, CPU).evaluation


@dataclass
class ExportResults:
    """What a run has made.

    Attributes:
        eager: precision, top-1 and latency of the network in torch.
        files: a result for each file.
        ship: format -> path of the file to use.
        notes: what the user should know, such as why not to use an int8 file.
    """

    eager: dict[str, Any]
    files: list[FileResult] = field(default_factory=list)
    ship: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return {"formats": [asdict(file) for file in self.files], "eager": self.eager, "ship": self.ship}


def prepare_export(arguments: ExportArguments) -> ExportJob:
    """Check the arguments and load the classifier and the images; nothing is written.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit, or a library is missing.
    """
    check_arguments(arguments)
    for name in dict.fromkeys(arguments.include):
        FORMATS[name].check(arguments.int8)
    if is_exported(arguments.weights):
        raise UserError(f"{arguments.weights} has been exported already; give the checkpoint that it was made from")
    loaded = load_classifier(arguments.weights, arguments.model or None, size_known=arguments.imgsz is not None)
    reference = TorchBackend(loaded, CPU, imgsz=image_size(arguments.imgsz))
    warm_up(reference, 1, passes=1)
    data = load_for(reference, arguments.data, "val", None, None, arguments.download, arguments.max_pixels) if arguments.data else None
    spec, seed = reference.spec, arguments.seed
    calibration = sample(data.split("train"), spec, arguments.images, 32, seed) if data and arguments.int8 else None
    if data and len(data.split("val")):
        compared = sample(data.split("val"), spec, COMPARED, COMPARED, seed).images
    else:
        compared = noise_images(spec, COMPARED, seed)
    metadata = Metadata(
        spec,
        preprocessing=arguments.with_preprocess,
        softmax=arguments.with_preprocess,
        batch_size=None if arguments.dynamic else arguments.batch_size,
        named=reference.named or data is not None,
        record={name: reference.record[name] for name in RECORDED if name in reference.record},
    )
    model, learned = _model_for_export(reference.model, arguments.int8)
    in_float = reference
    if is_quantized(reference.model):
        in_float = TorchBackend(replace(loaded, model=deepcopy(model), notes=[]), CPU, imgsz=image_size(arguments.imgsz))
    source = ExportSource(model, metadata, arguments.opset, calibration, learned)
    return ExportJob(reference, in_float, source, data, compared, arguments.workers)


def _model_for_export(network: nn.Module, int8: bool) -> tuple[nn.Module, LearnedRanges | None]:
    """Return the float32 model that is exported, and its learned ranges if it was trained for int8 and shall be written so."""
    # The network is channels-last in memory, which would become transpositions in the graph.
    model = deepcopy(network).to(memory_format=torch.contiguous_format).requires_grad_(False)
    if not is_quantized(model):
        return model, None
    learned = learned_ranges(model) if int8 else None
    # Linear grids belong in int8 files; other weights are written as they are rounded, and activations are rounded in the graph.
    return (plain_copy(model).eval() if is_linear(model) else rounded_copy(model)), learned


def run_export(arguments: ExportArguments, job: ExportJob, folder: Path) -> ExportResults:
    """Write the files into a folder, measure each, and choose one per format.

    Raises:
        UserError: the network can't be exported, or a file does not compute what it should.
    """
    formats, stem = list(dict.fromkeys(arguments.include)), Path(arguments.weights).stem
    precisions = ["fp16" if arguments.half else "fp32", *(["int8"] if arguments.int8 else [])]
    paths = {}
    for name in formats:
        for precision in precisions:
            path = folder / f"{stem}{'' if precision == 'fp32' else f'_{precision}'}{FORMATS[name].suffix}"
            FORMATS[name].write(job.source, precision, path)
            paths[name, precision] = path
    backends = {key: open_backend(str(path), CPU) for key, path in paths.items()}
    eager_ms, *latencies = measure_latencies([job.reference, *backends.values()], job.compared[:1])
    quantized, still_quantized = is_quantized(job.reference.model), is_quantized(job.source.model)
    whole = job.evaluate(job.reference)
    eager = {"precision": "quantized" if quantized else "fp32", "top1": whole.top1 if whole else None, "latency_ms": eager_ms}
    results = ExportResults(eager, notes=list(job.reference.notes))
    if quantized and not still_quantized and is_linear(job.reference.model):
        results.notes.append("the network was trained quantized; fp32 files hold its weights and activations without that rounding")
    rounded, in_float = (backend.logits(job.compared) for backend in (job.reference, job.in_float))
    for ((name, precision), backend), latency in zip(backends.items(), latencies, strict=True):
        path, logits = paths[name, precision], rounded if precision == "int8" else in_float
        # A graph that is right for one number of images may be wrong for another.
        differences = [
            difference_of(logits[:count], backend.logits(job.compared[:count]), job.source.metadata.softmax) for count in (1, len(logits))
        ]
        if precision == "fp32":
            refuse_wrong_outputs(path, max(differences), ROUNDING_TOLERANCE if still_quantized else TOLERANCE)
        audit, found = FORMATS[name].audit(job.source, path), job.evaluate(backend)
        top1, error = (found.top1, _error(whole, found)) if found else (None, None)
        results.files.append(
            FileResult(name, precision, str(path), size_of(path), top1, error, latency, max(differences), audit.int8, audit.others)
        )
        if precision == "fp16" and latency > eager_ms:
            results.notes.append(f"{name}: fp16 is slower on this CPU than fp32 in torch ({latency:.2f} against {eager_ms:.2f} ms)")
    for name in formats:
        base, *rest = (file for file in results.files if file.format == name)
        chosen, reasons = choose(base, rest[0] if rest else None, arguments.max_drop)
        results.ship[name] = chosen.path
        if reasons:
            results.notes.append(f"{name}: int8 is not the one to use: {'; '.join(reasons)}")
        elif rest and chosen is rest[0] and base.top1 is not None and base.top1 - (chosen.top1 or 0.0) > arguments.max_drop + 1e-9:
            lost = f"{base.top1 - (chosen.top1 or 0.0):.2%} ± {chosen.top1_error or 0.0:.2%}"
            results.notes.append(f"{name}: int8 loses {lost} of top-1, which may be chance on so few images")
    return results


def _error(whole: Evaluation | None, found: Evaluation) -> float | None:
    if whole is None or whole.correct is None or found.correct is None:
        return None
    return PairedDifference.of(whole.correct, found.correct).standard_error
