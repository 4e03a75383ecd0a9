"""The training run: arguments in; model, data, optimizer and hooks put together; results and files out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from compression.arguments import TrainArguments
from compression.preparation import Prepared, freeze_, prepare
from compression.resuming import inference_state, open_run, restore_, training_state
from utils import distributed
from utils.arguments import to_record
from utils.caching import CachedImages
from utils.checkpoint import read_tensor_file, save_checkpoint
from utils.ema import EMA
from utils.engine import Hook, Run, classifier, evaluate, fit
from utils.errors import Interrupted, UserError
from utils.images import preprocess
from utils.loaders import (
    EvalOrder,
    SplitDataset,
    TrainOrder,
    choose_workers,
    class_weights,
    make_loader,
    sampling_probabilities,
)
from utils.logs import EarlyStopping, History, Progress
from utils.metrics import Evaluation
from utils.norms import FrozenNorms, NormWarmup
from utils.optim import LearningRate, make_optimizer
from utils.precision import Precision, zero_idle_gradients_
from utils.profile import Profile, example_input, profile
from utils.reports import FirstBatch, report_training
from utils.runs import RunDirectory
from utils.splits import ArrayImages
from utils.transforms import Mixing, TrainTransform
from utils.yaml_files import write_yaml


class ClassifierCompressor:
    """A training run, from its arguments to its files; what train.py runs, usable from a notebook.

    The constructor does everything that can fail on the user's input and writes nothing. Then::

        compressor = ClassifierCompressor(TrainArguments(data="photos", epochs=20))
        results = compressor.run_training_loop()

    Args:
        arguments: the flags of train.py.
        given: names of the arguments that were given explicitly; only these may differ from a resumed run's record.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit.
    """

    def __init__(self, arguments: TrainArguments, given: set[str] | None = None) -> None:
        self.device = distributed.select_device(arguments.device)
        distributed.join(self.device)
        arguments, self.directory, checkpoint = open_run(arguments, given or set())
        _check_counts(arguments)
        if arguments.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        torch.manual_seed(arguments.seed)
        prepared = prepare(arguments, checkpoint)
        self.arguments, self.data, self.spec, self.notes = prepared.arguments, prepared.data, prepared.spec, prepared.notes
        self.plan = prepared.plan
        self.precision = Precision.choose(self.device, arguments.amp)
        self.profile: Profile = profile(prepared.model, self.spec)
        self.model: nn.Module = prepared.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.precision.dtype == torch.bfloat16:
            zero_idle_gradients_(self.model, example_input(self.model, self.spec))
        self.history = History(None, self._keep_best)
        self.best_state: dict[str, Any] | None = None
        self._make_loaders(prepared)
        self.first_batch = FirstBatch(self.spec)
        self.training_hooks: list[Hook] = [
            *([NormWarmup(self.model)] if self.plan or not (arguments.weights or arguments.pretrained) else []),
            FrozenNorms(freeze_(self.model, arguments.freeze)),
        ]
        self.hooks: list[Hook] = [
            *self.training_hooks,
            self.first_batch,
            self.history,
            EarlyStopping(arguments.patience, self.history),
            Progress(self.history),
        ]
        self.run = self._make_run()
        if checkpoint:
            restore_(self.run, self.hooks, self.data, checkpoint)

    def _make_loaders(self, prepared: Prepared) -> None:
        arguments, data = self.arguments, self.data
        train, val = data.split("train"), data.split("val")
        world, rank = distributed.world_size(), distributed.rank()
        workers = choose_workers(arguments.workers, world)
        in_memory = isinstance(train.images, ArrayImages | CachedImages)
        if self.device.type == "cpu" and in_memory and not prepared.augmentation.is_heavy:
            workers = 0  # a batch takes a few percent of a step; workers would take the network's cores for more than that
        self.train_set = SplitDataset(train, self.spec, TrainTransform(prepared.augmentation, self.spec), substitute=True)
        self.val_set = SplitDataset(val, self.spec, lambda image, _: preprocess(image, self.spec), substitute=False)
        self.order = TrainOrder(len(train), arguments.batch_size // world, arguments.seed, rank, world)
        if arguments.balance == "sampler":
            self.order.weights = sampling_probabilities(train.labels, self.spec.num_classes)
        self.train_loader = make_loader(self.train_set, self.order, workers, self.device)
        val_order = EvalOrder(len(val), max(2 * arguments.batch_size // world, 1), rank, world)
        self.val_loader = make_loader(self.val_set, val_order, workers, self.device)

    def _make_run(self) -> Run:
        a = self.arguments
        network: Callable[[Tensor], Tensor] = self.model
        if distributed.world_size() > 1:
            if a.sync_bn:
                if self.device.type != "cuda":
                    raise UserError("--sync-bn needs CUDA: torch's synchronised batch norm does not run on the CPU")
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            network = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        if a.compile:
            network = torch.compile(network)
        weight = None
        if a.balance == "weights":
            weights = class_weights(self.data.split("train").labels, self.spec.num_classes)
            weight = torch.tensor(weights, dtype=torch.float32, device=self.device)
        if not 0 <= a.label_smoothing < 1:
            raise UserError(f"label-smoothing is {a.label_smoothing}; it must lie in [0, 1)")
        return Run(
            model=self.model,
            spec=self.spec,
            ema=EMA(self.model) if a.ema else None,
            optimizer=make_optimizer(self.model, a.optimizer, a.lr0, a.momentum, a.decay),
            learning_rate=LearningRate(a.lr0, a.lrf, a.epochs, a.warmup_epochs, a.cos_lr),
            precision=self.precision,
            batches=self._batches,
            steps_per_epoch=len(self.order),
            mix=Mixing(a.mixup, a.cutmix, self.spec.num_classes),
            criterion=nn.CrossEntropyLoss(weight=weight, label_smoothing=a.label_smoothing),
            validate=self.validate,
            epochs=a.epochs,
            network=network,
            accumulate=a.accumulate,
            seed=a.seed,
        )

    def _batches(self, epoch: int, step: int) -> Iterator[Any]:
        self.order.epoch, self.order.start = epoch, step
        return iter(self.train_loader)

    def validate(self, network: nn.Module | None = None) -> Evaluation:
        """Measure a network (the averaged one where none is given) on the validation split, in float32."""
        network = (network or self.run.averaged).eval()
        classify = classifier(network, self.spec, Precision(self.device))
        return evaluate(classify, self.spec.num_classes, self.val_loader, self.device, self.val_set.split.name)

    def summary(self) -> str:
        """Return what a person wants to know before the run: network, data, device, and what was mended."""
        a, splits = self.arguments, self.data.splits
        counts = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "val"))
        processes = f" x {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        lines = [
            f"model  {self.spec.name}: {self.profile.params:,} parameters, {self.profile.macs / 1e6:,.2f} M multiply-adds "
            f"at {self.spec.imgsz} px (counted by {self.profile.source})",
            f"data   {self.data.name}: {self.spec.num_classes} classes, {counts} images, augment {a.augment}",
            f"device {self.device}{processes}, {self.precision}, {a.optimizer} lr0 {a.lr0:g}",
            *(f"note   {note}" for note in self.notes),
        ]
        if self.directory:
            lines.append(f"resume {self.directory.path} at epoch {self.run.epoch + 1}, step {self.run.step}")
        return "\n".join([*([str(self.model)] if a.verbose else []), *lines])

    def run_training_loop(self) -> dict[str, Any]:
        """Train, and write the run's files.

        Returns:
            The content of results.json.

        Raises:
            UserError: the loss is no longer finite.
            Interrupted: SIGINT or SIGTERM; everything is saved.
            OSError: the disk is full.
        """
        fresh = self.directory is None
        directory = self.directory = self.directory or RunDirectory.create(
            self.arguments.project, self.arguments.name, self.arguments.exist_ok
        )
        self.first_batch.path = directory.path / "train_batch.jpg" if distributed.is_main() else None
        self.history.folder = directory.path if distributed.is_main() else None
        try:
            if fresh and distributed.is_main():
                write_yaml(directory.path / "opt.yaml", to_record(self.arguments))
                self._save_last(self.run)
            with _stopping_on_signals(self.run):
                fit(self.run, self.hooks, self._save_last)
        except (UserError, OSError):
            if fresh and not self.history.rows and distributed.is_main():
                directory.discard()
            raise
        finally:
            self.history.close()
        if self.run.interrupted:
            where = f"epoch {self.run.epoch + 1}, step {self.run.step}"
            raise Interrupted(f"stopped in {where}; saved. Go on with: python train.py --resume {directory.path}")
        if not distributed.is_main():
            return {}
        if self.arguments.nosave:
            save_checkpoint(directory.last, self._full_state())
            save_checkpoint(directory.best, self.best_state or {})
        best = deepcopy(self.run.averaged)
        best.load_state_dict(read_tensor_file(directory.best)["state_dict"])
        return report_training(directory, self.history, self.profile, self.spec, self.val_set, best, self._unreadable())

    def _unreadable(self) -> list[str]:
        seen = [f"{self.train_set.split.name(position)}: could not be decoded" for position in sorted(self.run.unreadable)]
        best = self.history.best
        return [*self.data.unreadable, *seen, *(f"{name}: could not be decoded" for name in (best.unreadable if best else ()))]

    def _full_state(self) -> dict[str, Any]:
        state = inference_state(self.run, self.arguments, self.profile, self.plan)
        return {**state, "training": training_state(self.run, self.hooks, self.data)}

    def _save_last(self, run: Run) -> None:
        """Write last.pt, and the periodic checkpoint where one is due."""
        if not distributed.is_main() or self.arguments.nosave:
            return
        assert self.directory is not None
        save_checkpoint(self.directory.last, self._full_state())
        period = self.arguments.save_period
        if period and run.step == 0 and run.epoch and run.epoch % period == 0:
            save_checkpoint(self.directory.weights / f"epoch{run.epoch}.pt", inference_state(run, self.arguments, self.profile, self.plan))

    def _keep_best(self, run: Run) -> None:
        if not distributed.is_main():
            return
        assert self.directory is not None
        state = inference_state(self.run, self.arguments, self.profile, self.plan)
        state["metrics"]["epoch"] = run.epoch + 1
        if self.arguments.nosave:
            self.best_state = state
        else:
            save_checkpoint(self.directory.best, state)


def _check_counts(arguments: TrainArguments) -> None:
    limits = (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("patience", 0), ("save_period", 0), ("seed", 0))
    for name, least in limits:
        if getattr(arguments, name) < least:
            raise UserError(f"{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.batch_size % distributed.world_size():
        raise UserError(f"batch-size {arguments.batch_size} must be a multiple of the {distributed.world_size()} processes")


@contextmanager
def _stopping_on_signals(run: Run) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the run after its current step, saved; a second one ends it at once."""

    def stop(number: int, _: Any) -> None:
        run.interrupted = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread (a notebook's, say): signals stay as they are
        previous.clear()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
