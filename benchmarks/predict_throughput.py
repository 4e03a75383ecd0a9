"""Prediction images per second on a folder of photos, against one image at a time; and the time to the first answer.

python -m benchmarks.predict_throughput [--source FOLDER]

One at a time: read, decode, crop, resize and normalise an image, run the network, take the top 5; float32, NCHW. Images are
decoded once at full size, as a plain script does, and once at the reduced size that predict.py reads, which must give the
same top 5. Without --source, photo-sized JPEGs are made of smooth random shapes and texture.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from models.backends import open_backend, warm_up
from models.loading import load_classifier
from models.networks import build
from models.prediction import predict, share_cores_
from utils.data.images import READ_MARGIN, preprocess, read_image
from utils.data.sources import open_source
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
Answer = list[str]


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Write JPEGs with a photo's mix of smooth areas, edges and fine texture, at quality 90."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            centre = (int(generator.integers(width)), int(generator.integers(height)))
            colour = tuple(int(v) for v in generator.integers(0, 256, 3))
            cv2.circle(image, centre, int(generator.integers(20, height // 4)), colour, -1, cv2.LINE_AA)
        texture = cv2.resize(generator.normal(0, 14, (height // 2, width // 2, 3)).astype(np.float32), (width, height))
        image = np.clip(image + texture, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:04}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def one_at_a_time(network: nn.Module, spec: ModelSpec, paths: list[Path], min_side: int) -> list[Answer]:
    """Classify each image by itself, in this thread."""
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    answers = []
    with torch.no_grad():
        for path in paths:
            pixels = preprocess(read_image(path, spec.channels, min_side), spec)
            array = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]
            top = network(torch.from_numpy(np.ascontiguousarray(array))).softmax(1)[0].topk(5).indices
            answers.append([spec.class_names[i] for i in top.tolist()])
    return answers


def first_answer_ratio(weights: Path, image: Path, repeats: int) -> tuple[float, float]:
    """Return median seconds from process start to the first printed prediction, and of ``import torch, cv2``."""
    command = [sys.executable, str(ROOT / "predict.py"), "--weights", str(weights), "--source", str(image), "--nosave"]
    ours, imports = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("image 1/1"):
                raise SystemExit("predict.py printed no prediction")
            ours.append(time.perf_counter() - start)
            process.communicate()
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, cv2"], check=True)
        imports.append(time.perf_counter() - start)
    return statistics.median(ours), statistics.median(imports)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--source", default="", help="folder of photos; made if not given")
    parser.add_argument("--weights", default="", help="classifier; by default a YOLOv5n-cls with random weights")
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--height", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parse_options(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(options.source or folder / "photos")
        if not options.source:
            source.mkdir()
            make_photos(source, options.count, options.width, options.height)
        weights = Path(options.weights or folder / "random.pt")
        if not options.weights:
            torch.manual_seed(0)
            spec = ModelSpec("yolov5n-cls", 1000)
            save_checkpoint(weights, {"spec": spec.to_dict(), "state_dict": build(spec).state_dict()})
        backend = open_backend(str(weights), torch.device("cpu"), imgsz=options.imgsz)
        plain_network = load_classifier(weights).model.eval()
        opened = open_source(str(source))
        paths = [Path(item.path) for item in opened.items()]
        reduced = backend.spec.longest * READ_MARGIN
        ways: dict[str, Callable[[], list[Answer]]] = {
            "one at a time, full decode": lambda: one_at_a_time(plain_network, backend.spec, paths, 0),
            "one at a time, reduced decode": lambda: one_at_a_time(plain_network, backend.spec, paths, reduced),
            "predict.py": lambda: [[n for n, _ in p.topk] for p in predict(backend, opened, options.batch_size, 5)],
        }
        warm_up(backend, options.batch_size)
        one_at_a_time(plain_network, backend.spec, paths[:3], 0)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        answers: dict[str, list[Answer]] = {}
        for _ in range(options.rounds):
            for way, run in ways.items():
                torch.set_num_threads(options.threads)
                if way == "predict.py":
                    share_cores_(torch.device("cpu"), opened)
                start = time.perf_counter()
                answers[way] = run()
                speeds[way].append(len(paths) / (time.perf_counter() - start))
        ours, imports = first_answer_ratio(weights, paths[0], options.rounds)
    mine, speed = answers["predict.py"], statistics.median(speeds["predict.py"])
    rows = [
        {
            "way": way,
            "images_per_second": statistics.median(values),
            "predict_py_is_faster_by": speed / statistics.median(values),
            "same_top5": sum(a == b for a, b in zip(answers[way], mine, strict=True)) / len(paths),
        }
        for way, values in speeds.items()
    ]
    torch.set_num_threads(options.threads)
    report("predict_throughput", rows, options.out)
    print(f"first prediction after {ours:.2f} s, `import torch, cv2` takes {imports:.2f} s: ratio {ours / imports:.2f}")


if __name__ == "__main__":
    main()
