"""Ranks of all feature maps, beside the plain method on the same images.

python -m benchmarks.ranks --data FOLDER --weights RESNET56.pt [--yolo-weights YOLO.pt] [--out FILE]

The plain method, as in HRank's scripts: for every layer one run of the network over all images with a forward hook on the
layer, and for every map one call of torch.linalg.matrix_rank and ``.item()``. It is timed on some of the images
(``--plain-images``) and scaled in proportion; the methods take turns. Ours: one pass over all images, which also yields the
effective rank and nuclear norm; without and with the early stop, for which it must be known how many channels will be kept
(ResNet-56 as published for HRank+, YOLOv5 without 0.3 of each group, about half of the multiply-adds). "identical" is the
share of single maps with the same rank, "same kept" the share of kept channels that the ranks of all images keep, too.

Without --yolo-weights: YOLOv5s-cls at 64 px with random weights and batch norms that have seen the images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.pruning.plan import entries_of, widths_of_rates
from compression.scoring.calibration import Calibration, sample
from compression.scoring.criteria import score
from compression.scoring.feature_maps import PASS, find_taps, measure_images, show_maps
from compression.scoring.scores import NetworkScores
from compression.scoring.singular_values import spectrum_scores
from compression.tracing.channels import trace
from compression.tracing.graph import ChannelGraph
from compression.tracing.tracer import evaluating
from models.loading import load_classifier
from models.networks import build
from utils.data.datasets import load_data
from utils.spec import ModelSpec

RATES = {"resnet56": "[0.]+[0.15]*2+[0.4]*27"}
OTHER_RATE = "0.3"
Place = tuple[str, int]  # a module and which of its calls in a forward pass


def find_places(model: nn.Module, graph: ChannelGraph, inputs: Tensor) -> dict[str, Place]:
    """Find the module, and which of its calls, that returns each convolution's maps: there the plain method hooks."""
    shown: dict[str, Tensor] = {}
    show_maps(model, inputs, [tap for tap in find_taps(graph) if tap.spatial], lambda tap, maps: shown.update({tap.name: maps.clone()}))
    calls: dict[str, int] = {}
    places: dict[str, Place] = {}

    def look(name: str, output: Any) -> None:
        calls[name] = calls.get(name, -1) + 1
        for tap, maps in shown.items():
            if tap not in places and isinstance(output, Tensor) and torch.equal(output, maps):
                places[tap] = (name, calls[name])

    handles = [m.register_forward_hook(lambda _, __, output, name=name: look(name, output)) for name, m in model.named_modules()]
    model(inputs)
    for handle in handles:
        handle.remove()
    if missing := set(shown) - set(places):
        raise SystemExit(f"no module returns the maps of {sorted(missing)}")
    return {tap: places[tap] for tap in shown}


@contextmanager
def hooked(model: nn.Module, place: Place, show: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the output of one call of one module."""
    calls = 0

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        nonlocal calls
        if calls == place[1]:
            show(output)
        calls += 1

    def restart(module: nn.Module, arguments: Any) -> None:
        nonlocal calls
        calls = 0

    handles = [model.get_submodule(place[0]).register_forward_hook(hook), model.register_forward_pre_hook(restart)]
    yield
    for handle in handles:
        handle.remove()


def plain_ranks(model: nn.Module, places: dict[str, Place], calibration: Calibration) -> dict[str, Tensor]:
    """Return each map's rank [images, C], with one run per layer and one call per map."""
    found: dict[str, Tensor] = {}
    for tap, place in places.items():
        rows: list[list[float]] = []

        def count(output: Tensor, rows: list[list[float]] = rows) -> None:
            rows.extend([torch.linalg.matrix_rank(output[i, j]).item() for j in range(output.shape[1])] for i in range(output.shape[0]))

        with hooked(model, place, count):
            for inputs, _ in calibration.batches():
                model(inputs)
        found[tap] = torch.tensor(rows)
    return found


def identical_share(model: nn.Module, graph: ChannelGraph, calibration: Calibration, plain: dict[str, Tensor]) -> float:
    """Return the share of single maps to which both methods give the same rank."""
    ours = measure_images(
        model, [tap for tap in find_taps(graph) if tap.name in plain], calibration, spectrum_scores, range(len(calibration))
    )
    equal = sum(int((ours[tap].values[0] == ranks).sum()) for tap, ranks in plain.items())
    return equal / sum(ranks.numel() for ranks in plain.values())


def same_kept(whole: NetworkScores, early: NetworkScores, widths: dict[str, int]) -> float:
    """Return the share of the kept units of all cut groups that both keep."""
    common = total = 0
    for name, width in widths.items():
        if width < len(whole.groups[name].order):
            common += len(set(whole.groups[name].order[-width:].tolist()) & set(early.groups[name].order[-width:].tolist()))
            total += width
    return common / total


def compare(name: str, model: nn.Module, calibration: Calibration, plain_images: int, rounds: int) -> list[dict[str, Any]]:
    """Measure both methods by turns on one network; return a row for each way of measuring."""
    size, images = calibration.spec.longest, len(calibration)
    graph = trace(model, torch.zeros(1, calibration.spec.channels, size, size))
    widths = widths_of_rates(entries_of(graph, calibration.spec.name), RATES.get(calibration.spec.name, OTHER_RATE))
    part = calibration.head(plain_images)
    with evaluating(model), torch.no_grad():
        places = find_places(model, graph, next(calibration.head(2).batches())[0])
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain_ranks(model, places, part),
            "ours": lambda: score("rank", model, graph, calibration, 0),
            "ours, half of the images": lambda: score("rank", model, graph, calibration.head(images // 2), 0),
            "ours, a quarter of the images": lambda: score("rank", model, graph, calibration.head(images // 4), 0),
            "ours, early stop": lambda: score("rank", model, graph, calibration, 0, widths),
        }
        score("rank", model, graph, calibration.head(PASS), 0)  # warm up
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        results: dict[str, Any] = {}
        for _ in range(rounds):
            for way, function in ways.items():
                begin, used = time.perf_counter(), time.process_time()
                results[way] = function()
                scale = images / plain_images if way == "plain" else 1
                seconds[way].append(((time.perf_counter() - begin) * scale, (time.process_time() - used) * scale))
                print(f"{name}: {way} {seconds[way][-1][0]:.2f} s, of one core {seconds[way][-1][1]:.2f} s", flush=True)
        identical = identical_share(model, graph, part, results["plain"])
    wall = {way: statistics.median(taken for taken, _ in both) for way, both in seconds.items()}
    cpu = {way: statistics.median(taken for _, taken in both) for way, both in seconds.items()}
    rows = []
    for way, scored in results.items():
        row = {"network": name, "method": way, "layers": len(places), "seconds": wall[way], "speed_up": wall["plain"] / wall[way]}
        row |= {"core_seconds": cpu[way], "core_speed_up": cpu["plain"] / cpu[way]}
        row["images"] = images if way == "plain" else statistics.mean(tap.images for tap in scored.maps.taps.values())
        row["identical"] = 1.0 if way == "plain" else identical
        row["same_kept"] = 1.0 if way == "plain" else same_kept(results["ours"], scored, widths)
        rows.append(row)
    return rows


@torch.no_grad()
def random_yolo(images: Calibration) -> nn.Module:
    """Return YOLOv5s-cls with random weights and batch norms that have seen the images."""
    torch.manual_seed(0)
    model = build(images.spec)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain mean over the batches
    for inputs, _ in images.head(256).batches():
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def main() -> None:
    parser = benchmark_parser(__doc__, threads=1)
    parser.add_argument("--data", required=True, help="folder with train/")
    parser.add_argument("--weights", required=True, help="a ResNet-56 for 32 px")
    parser.add_argument("--yolo-weights", default="", help="a YOLOv5 classifier; without it, YOLOv5s-cls at 64 px with random weights")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--plain-images", type=int, default=32, help="how many of these the plain method is timed on")
    parser.add_argument("--rounds", type=int, default=1)
    options = parse_options(parser)
    data, rows = load_data(options.data), []
    for weights in (options.weights, options.yolo_weights):
        if weights:
            loaded = load_classifier(weights)
            model, spec = loaded.model, loaded.spec
        else:
            spec = ModelSpec("yolov5s-cls", len(data.class_names), imgsz=64)
        calibration = sample(data.split("train"), spec, options.images, 64, seed=0)
        if not weights:
            model = random_yolo(calibration)
        rows += compare(f"{spec.name} {spec.imgsz} px", model, calibration, options.plain_images, options.rounds)
    report("ranks", rows, options.out)


if __name__ == "__main__":
    main()
