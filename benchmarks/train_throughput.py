"""Training images per second, beside a plain recipe on the same images, network and augmentation.

python -m benchmarks.train_throughput --data FOLDER

The plain recipe: torchvision's ImageFolder and Pillow transforms, torch's DataLoader with 2 workers, float32, NCHW, no
moving average. Ours: train.py's run with --cache ram. Both: YOLOv5n-cls at 64 px, batch 64, Adam, random resized crop,
flip, colour jitter with probability 0.5. The epochs of the two take turns, so that noise affects both alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from models.networks import build
from utils.loop.engine import Run, classifier, evaluate, train_step
from utils.loop.optim import LearningRate
from utils.loop.precision import Precision

IMGSZ, BATCH, LR0, SMOOTHING = 64, 64, 1e-3, 0.1


def plain_epochs(data: str, compressor: ClassifierCompressor, epochs: int) -> Iterator[tuple[nn.Module, float]]:
    """Yield the network and images per second after each epoch of the plain recipe."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMGSZ),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4)], 0.5),
            transforms.ToTensor(),
            transforms.Normalize(compressor.spec.mean, compressor.spec.std),
        ]
    )
    train = compressor.feed.train_set.split
    folder = datasets.ImageFolder(f"{data}/train", transform)
    kept = {train.name(position) for position in range(len(train))}
    subset = torch.utils.data.Subset(folder, [i for i, (path, _) in enumerate(folder.samples) if path in kept])
    if len(subset) != len(train):
        raise SystemExit(f"the plain recipe sees {len(subset)} training images, ours {len(train)}")
    loader: Any = torch.utils.data.DataLoader(subset, BATCH, shuffle=True, num_workers=2, drop_last=True)
    torch.manual_seed(0)
    model = build(compressor.spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR0)
    schedule = LearningRate(LR0, 0.01, epochs, 0, False)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    for epoch in range(epochs):
        model.train()
        start = time.perf_counter()
        for step, (images, labels) in enumerate(loader):
            schedule.apply_(optimizer, epoch + (step + 1) / len(loader))
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
        yield model.eval(), len(loader) * BATCH / (time.perf_counter() - start)


def our_epochs(compressor: ClassifierCompressor, epochs: int) -> Iterator[tuple[nn.Module, float]]:
    """Yield the averaged network and images per second after each epoch of our run."""
    run: Run = compressor.run
    for epoch in range(epochs):
        run.epoch, run.step, run.images_seen = epoch, 0, 0
        run.model.train()
        start = time.perf_counter()
        for batch in run.batches(epoch, 0):
            train_step(run, compressor.training_hooks, batch)
            run.step += 1
        yield run.averaged, run.images_seen / (time.perf_counter() - start)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/, of which some images are held out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8, help="ours; the plain recipe has 2")
    options = parse_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainArguments(
            data=options.data, model="yolov5n-cls", imgsz=(IMGSZ,), batch_size=BATCH, recipe="yolov5", lr0=LR0, label_smoothing=SMOOTHING,
            epochs=options.epochs, cache="ram", workers=options.workers, project=folder,
        )  # fmt: skip
        start = time.perf_counter()
        compressor = ClassifierCompressor(arguments)
        print(f"ours: set up, every image decoded once, in {time.perf_counter() - start:.1f} s; {compressor.notes}", flush=True)
        ours, plain = our_epochs(compressor, options.epochs), plain_epochs(options.data, compressor, options.epochs)
        speeds: dict[str, list[float]] = {"plain": [], "ours": []}
        networks: dict[str, nn.Module] = {}
        for epoch in range(options.epochs):
            for name, epochs in (("plain", plain), ("ours", ours)):
                networks[name], speed = next(epochs)
                speeds[name].append(speed)
                print(f"epoch {epoch + 1} {name}: {speed:.0f} images/s", flush=True)
        rows = []
        for name, network in networks.items():
            classify = classifier(network.eval(), compressor.spec, Precision(torch.device("cpu")))
            result = evaluate(classify, compressor.spec.num_classes, compressor.feed.val_loader, torch.device("cpu"), str)
            rows.append(
                {"recipe": name, "images_per_second": statistics.median(speeds[name]), "val_top1": result.top1, "epochs": options.epochs}
            )
    for row in rows:
        row["speed_up"] = row["images_per_second"] / rows[0]["images_per_second"]
    report("train_throughput", rows, options.out)


if __name__ == "__main__":
    main()
