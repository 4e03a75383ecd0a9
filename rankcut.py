"""RankCut from Python: train a classifier, cut it, fine-tune it, ship it, use it.

>>> import rankcut
>>> dense = rankcut.load("best.pt")
>>> small = dense.prune("photos", macs=0.5).finetune("photos", epochs=10)
>>> print(dense.validate("photos").top1, small.validate("photos").top1)
>>> small.export("onnx", "shipped")
>>> small.predict("photo.jpg")

A ``Classifier`` is a file and the network in it; what a method makes is another one. The methods do what the scripts do,
and take their flags as arguments (``round_to=1`` for ``--round-to 1``). What you can mend raises ``UserError``.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from compression.exporting.arguments import ExportArguments
from compression.exporting.run import prepare_export, run_export
from compression.pruning.arguments import PruneArguments
from compression.pruning.frontier import prune_once
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from models.backends import RUNTIMES, WEIGHTS_SUFFIXES, Backend, TorchBackend, open_backend
from models.loading import default_size
from models.networks import build, resolve_model
from models.networks.own import register, unwrapped
from models.networks.plain_weights import fold_weights_
from models.prediction import Classes, likeliest, predict
from models.validation import load_for, measure
from utils import distributed
from utils.arguments import from_keywords
from utils.data.images import as_channels, as_pixels, preprocess
from utils.data.sources import open_source
from utils.errors import UserError, run_script
from utils.files.checkpoint import is_checkpoint, read_tensor_file, save_checkpoint
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec, image_size

__all__ = ["Classifier", "Classes", "UserError", "load", "wrap"]

Arguments = TypeVar("Arguments")
SCRIPTS = ("train", "prune", "val", "export", "predict")


def load(
    weights: str | Path,
    *,
    model: str = "",
    network: nn.Module | Callable[[], nn.Module] | None = None,
    num_classes: int = 1000,
    imgsz: int | Sequence[int] | None = None,
    device: str = "",
) -> Classifier:
    """Open a classifier's file, or build a network with fresh weights.

    Args:
        weights: a checkpoint, a state dict, a YOLOv5 ``*-cls.pt``, an exported file or folder; or a network's name, as
            ``--model`` takes it.
        model: the architecture of a state dict that does not tell.
        network: of a file that was saved from a network of your own code: its class, or what builds it.
        num_classes: outputs of a network that is built; ``finetune`` fits them to its data.
        imgsz: side of the input, or height and width; by default the file's own.
        device: "cpu", "mps", "cuda" or a CUDA device's number; by default CUDA if available.

    """
    if network is not None:
        register(network)
    name, size = str(weights), image_size(imgsz)
    if not Path(name).exists() and Path(name).suffix.lower() not in (*WEIGHTS_SUFFIXES, *RUNTIMES):
        name, definition = resolve_model(name)
        spec = ModelSpec(name, num_classes, size or default_size(name), definition=definition)
        return _stored(build(spec), spec, device, fresh=str(weights))
    flags = {"device": device, "model": model, **({} if size is None else {"imgsz": imgsz})}
    return Classifier(Path(name), open_backend(name, distributed.select_device(device), model_name=model or None, imgsz=size), flags)


def wrap(
    network: nn.Module,
    class_names: Sequence[str],
    *,
    imgsz: int | Sequence[int] = 224,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str = "",
) -> Classifier:
    """Take a network of your own code: it maps float32 [B, channels, H, W] to [B, classes].

    A copy is taken; what DataParallel, DDP and torch.compile put around it is left out, and weights that are computed
    (weight_norm, spectral_norm, weight standardisation) become plain. To open its files later, give ``load`` the class.

    Args:
        class_names: in the order of its outputs.
        imgsz: side of its input, or height and width.
        channels: 1 for grey, 3 for RGB.
        mean, std: per channel, for pixels in [0, 1]; by default ImageNet's.
    """
    own = deepcopy(unwrapped(network))
    fold_weights_(own)
    spec = ModelSpec(register(own), len(class_names), image_size(imgsz) or 224, channels, tuple(class_names))
    given = {name: tuple(values) for name, values in (("mean", mean), ("std", std)) if values is not None}
    return _stored(own, spec.with_(**given), device)


class _Home:
    """A temporary folder that goes with the object."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="rankcut-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass
class Classifier:
    """A classifier's file, and the network in it, ready to run.

    Attributes:
        path: the file. What a method makes lies in a temporary folder, which goes when the last classifier made from it
            does; ``save`` keeps it.
        backend: runs it: uint8 [B, H, W, C] in, logits out; its ``spec`` says what the classifier is.
        flags: of every run on it: where it runs, and what the file does not tell.
        results: what the run that made it would write to results.json.
        fresh: the name of the network, where the weights are not trained yet.
        homes: the temporary folders that it needs.
    """

    path: Path
    backend: Backend
    flags: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict, repr=False)
    fresh: str = ""
    homes: tuple[_Home, ...] = field(default=(), repr=False)

    @property
    def spec(self) -> ModelSpec:
        """Architecture, classes, input and pre-processing."""
        return self.backend.spec

    @property
    def network(self) -> nn.Module:
        """The network in torch.

        Raises:
            UserError: the file was exported, and runs in another runtime.
        """
        if not isinstance(self.backend, TorchBackend):
            raise UserError(f"{self.path} is an exported file; take the checkpoint that it was made from")
        return self.backend.model

    def predict(self, images: Any, topk: int = 5, batch_size: int = 16) -> Classes | list[Classes]:
        """Classify images.

        Args:
            images: a path (image, folder, glob, .txt list, video), an RGB or grey image as an array, a tensor (both uint8,
                [H, W] or [H, W, C]) or Pillow's, a batch [N, H, W, C], or a list of any of these.
            topk: classes per image.
            batch_size: images per forward pass.

        Returns:
            Of one image (class name, probability) pairs, the likeliest first; of several a list of those.
        """
        if isinstance(images, list | tuple):
            found = [self.predict(image, topk, batch_size) for image in images]
            return [classes for one in found for classes in (one if isinstance(one, list) else [one])]
        if isinstance(images, str | Path):
            return self._predict_source(str(images), topk, batch_size)
        array = as_pixels(images)
        batch = array if array.ndim == 4 else array[None]
        pixels = np.stack([preprocess(as_channels(image, self.spec.channels), self.spec) for image in batch])
        parts = torch.from_numpy(pixels).split(batch_size)
        classes = [found for part in parts for found in likeliest(self.backend.logits(part), self.spec, topk)]
        return classes if array.ndim == 4 else classes[0]

    def _predict_source(self, source: str, topk: int, batch_size: int) -> Classes | list[Classes]:
        found = list(predict(self.backend, open_source(source), batch_size, topk))
        for prediction in found:
            if prediction.error:
                raise UserError(f"{prediction.item.path} can't be read: {prediction.error}")
        is_one = len(found) == 1 and found[0].item.path == source and not found[0].item.frame
        return found[0].topk if is_one else [prediction.topk for prediction in found]

    def validate(self, data: str | Path, split: str = "val", *, batch_size: int = 128, workers: int = 8) -> Evaluation:
        """Measure accuracy and loss on a split of a data set; its classes are matched by name."""
        found = load_for(self.backend, str(data), split, None, None)
        return measure(self.backend, found, split, batch_size, workers, distributed.select_device(self.flags["device"])).evaluation

    def prune(self, data: str | Path, *, macs: float | None = None, **options: Any) -> Classifier:
        """Cut channels; the cut is proved, then what stays is refitted to the dense network's outputs, without labels.

        Args:
            data: images to score and refit on, and to measure the accuracy on.
            macs: share of the multiply-adds that stays.
            options: flags of prune.py, such as ``params=0.5``, ``latency=0.5``, ``max_drop=0.01``, ``compress_rate="0.3"``.

        Raises:
            NotProved: the cut network is not the masked one.
        """
        outcome = prune_once(self._arguments(PruneArguments, {"data": data, "macs": macs, **options}))
        home = _Home()
        path = home.path / "pruned.pt"
        save_checkpoint(path, outcome.checkpoint)
        return self._successor(path, outcome.results, home)

    def finetune(self, data: str | Path, epochs: int = 10, *, project: str | Path = "", **options: Any) -> Classifier:
        """Train on; a pruned network is distilled from its dense one. A network that was built fresh is trained from zero.

        Args:
            data: training and validation images.
            epochs: of one run with its own learning rate schedule.
            project: folder for the run's files; by default they go with the classifier.
            options: flags of train.py, such as ``batch_size=128``, ``compress="schedule.yaml"``.

        Returns:
            The network of the epoch that was best on the validation images.
        """
        home = _Home()
        start = {"weights": "", "model": self.fresh, "imgsz": self.spec.size} if self.fresh else {}
        options = {"data": data, "epochs": epochs, "project": project or home.path, **start, **options}
        arguments = self._arguments(TrainArguments, options)
        results = ClassifierCompressor(arguments).run_training_loop()
        return self._successor(Path(results["checkpoint"]), results, home)

    def export(self, format: str = "onnx", folder: str | Path = ".", **options: Any) -> Path:
        """Write a file that runs without RankCut; it is run in its own runtime and compared with the network.

        Args:
            format: "onnx", "openvino", "torchscript"; what export.py writes.
            folder: where to.
            options: flags of export.py, such as ``int8=True, data="photos"``.

        Returns:
            The file to use: that of int8 where it was asked for and is good enough.
        """
        arguments = self._arguments(ExportArguments, {"include": format, **options})
        Path(folder).mkdir(parents=True, exist_ok=True)
        exported = run_export(arguments, prepare_export(arguments), Path(folder))
        return Path(exported.ship[format])

    def save(self, path: str | Path) -> Path:
        """Keep the file under another name; where it names a dense network in a temporary folder, that is left out."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = read_tensor_file(self.path) if isinstance(self.backend, TorchBackend) else None
        if not isinstance(content, dict) or not is_checkpoint(content):
            (shutil.copytree if self.path.is_dir() else shutil.copyfile)(self.path, path)
            return path
        dense = content.get("dense")
        if dense and any(Path(dense["path"]).is_relative_to(home.path) for home in self.homes):
            del content["dense"]
        save_checkpoint(path, content)
        return path

    def _arguments(self, kind: type[Arguments], options: dict[str, Any]) -> Arguments:
        known = {name: value for name, value in self.flags.items() if hasattr(kind, name)}
        return from_keywords(kind, {"weights": self.path, **known, **options})

    def _successor(self, path: Path, results: dict[str, Any], home: _Home) -> Classifier:
        flags = {"device": self.flags["device"]}
        return Classifier(
            path, open_backend(str(path), distributed.select_device(flags["device"])), flags, results, homes=(*self.homes, home)
        )


def _stored(network: nn.Module, spec: ModelSpec, device: str, fresh: str = "") -> Classifier:
    """Write a network to a file in a temporary folder, and open it."""
    home = _Home()
    path = home.path / f"{spec.name.rpartition('/')[2]}.pt"
    state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    save_checkpoint(path, {"spec": spec.to_dict(), "state_dict": state, "plan": None, "metrics": {}, "arguments": {}})
    return Classifier(path, open_backend(str(path), distributed.select_device(device)), {"device": device}, fresh=fresh, homes=(home,))


def main() -> None:
    """Run one of the scripts: ``rankcut train --data photos`` is ``python train.py --data photos``."""
    script, *rest = sys.argv[1:] or [""]
    if script not in SCRIPTS:
        raise SystemExit(f"rankcut {{{','.join(SCRIPTS)}}} ...; rankcut train --help lists the flags of one")
    sys.argv = [f"rankcut {script}", *rest]
    try:
        run_script(importlib.import_module(f"{__package__}.{script}" if __package__ else script).main)
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
