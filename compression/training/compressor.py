"""The training run: arguments in; model, data, optimizer and hooks put together; results and files out."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.schedule.schedule import Schedule
from compression.schedule.scheduler import CompressionScheduler
from compression.training.arguments import TrainArguments
from compression.training.data_feed import DataFeed, Loaders
from compression.training.reporting import reports_of
from compression.training.resuming import inference_state, open_run, restore_, training_state
from compression.training.schedule import schedule_of_run
from compression.training.setup import Network, freeze_, make_repeatable, set_up
from utils import distributed
from utils.arguments import to_record
from utils.data.loaders import class_weights
from utils.data.transforms import Mixing
from utils.errors import Interrupted, UserError
from utils.files.checkpoint import read_tensor_file, save_checkpoint
from utils.files.runs import RunDirectory
from utils.files.yaml_files import write_yaml
from utils.loop.ema import EMA
from utils.loop.engine import Run, classifier, evaluate, fit, train_epoch
from utils.loop.hooks import Hook
from utils.loop.memory_format import channels_last
from utils.loop.norms import FrozenNorms, NormWarmup, batch_norms
from utils.loop.optim import LearningRate, make_optimizer
from utils.loop.precision import Precision, zero_idle_gradients_
from utils.loop.signals import calling_on_signals
from utils.measures.metrics import Evaluation
from utils.measures.profile import example_input, profile
from utils.output.commands import command
from utils.output.logs import EarlyStopping, History, Progress, StepLog
from utils.output.reports import FirstBatch, report_training
from utils.spec import ModelSpec

SCHEDULE = "schedule.yaml"  # the schedule's copy in the run's folder: what a run that goes on reads


class ClassifierCompressor:
    """A training run, from its arguments to its files: what train.py runs, to be used from Python too.

    The constructor does everything that can fail on the user's input, and writes nothing. Then::

        compressor = ClassifierCompressor(TrainArguments(data="photos", epochs=20))
        results = compressor.run_training_loop()

    Args:
        arguments: the flags of train.py.
        script_directory: the parent of ``runs/``; the working directory by default.
        given: names of the arguments that were given explicitly; for a run that is resumed, few may be.

    Raises:
        UserError: something in the arguments, the data or the weights does not fit.
    """

    def __init__(self, arguments: TrainArguments, script_directory: str | Path | None = None, given: set[str] | None = None) -> None:
        self.device = distributed.select_device(arguments.device)
        distributed.join(self.device)
        if script_directory is not None:
            arguments = replace(arguments, project=str(Path(script_directory) / arguments.project))
        arguments, self.directory, checkpoint = open_run(arguments, given or set())
        arguments.check_counts(distributed.world_size())
        make_repeatable(arguments.seed, arguments.deterministic)

        setup = set_up(arguments, checkpoint)
        self.arguments, self.recipe, self.data, self.notes = setup.arguments, setup.recipe, setup.data, setup.network.notes
        self.precision = Precision.choose(self.device, arguments.amp)
        self.profile = profile(setup.network.model, setup.network.spec)
        self.model = self._on_device(setup.network.model)
        frozen = FrozenNorms(freeze_(self.model, arguments.freeze))  # before the optimizer and DDP look at what trains
        if self.arguments.freeze_norms:
            frozen.norms += batch_norms(self.model)
        self.findings = setup.findings
        self.feed = DataFeed(self.arguments, self.data, setup.network.spec, setup.augmentation, self.device)

        copy = self.directory.path / SCHEDULE if self.directory else None
        self.arguments, schedule, notes = schedule_of_run(self.arguments, self.model, copy, setup.network.dense)
        self.notes += notes
        if schedule and schedule.of("lr_scheduler") and not checkpoint and (arguments.cos_lr or arguments.warmup_epochs):
            self.notes.append("the schedule sets the learning rate: --cos-lr and --warmup-epochs have no effect")
        self.run = self._make_run(setup.network, schedule)
        self.scheduler = CompressionScheduler(schedule, self.run, self.feed.calibration) if schedule else None
        self.history = History(None, self._keep_best, self.scheduler.target_reached if self.scheduler else lambda _: True)
        self.best_state: dict[str, Any] | None = None  # what best.pt will hold, while there is no folder to write it to
        warmup: list[Hook] = [NormWarmup(self.model)] if setup.network.fresh_norms else []
        self.training_hooks: list[Hook] = [*warmup, frozen, *([self.scheduler] if self.scheduler else [])]
        self.hooks = [*self._reporting_hooks(), *self.training_hooks]  # the history notes a learning rate before the next one is set
        if checkpoint:
            restore_(self.run, self.hooks, self.data, checkpoint)

    @property
    def spec(self) -> ModelSpec:
        """What the network is."""
        return self.run.spec

    def _on_device(self, model: nn.Module) -> nn.Module:
        model = channels_last(model.to(self.device))
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if distributed.world_size() > 1 and self.arguments.sync_bn else model

    def _make_run(self, network: Network, schedule: Schedule | None) -> Run:
        arguments, recipe = self.arguments, self.recipe
        rate: LearningRate | None = LearningRate(recipe.lr0, recipe.lrf, arguments.epochs, recipe.warmup_epochs, recipe.cos_lr)
        if schedule and schedule.of("lr_scheduler"):
            rate = None
        run = Run(
            model=self.model,
            spec=network.spec,
            plan=network.plan,
            ema=EMA(self.model) if arguments.ema else None,
            optimizer=make_optimizer(self.model, recipe.optimizer, recipe.lr0, recipe.momentum, recipe.decay),
            learning_rate=rate,
            precision=self.precision,
            batches=self.feed.batches,
            steps_per_epoch=len(self.feed.order),
            mix=Mixing(arguments.mixup, arguments.cutmix, network.spec.num_classes),
            criterion=self._criterion(network.spec.num_classes),
            validate=self.validate,
            epochs=arguments.epochs,
            network=self.model,
            accumulate=arguments.accumulate,
            seed=arguments.seed,
            restructured=self._restructured,
        )
        self._wrap(run)
        return run

    def _criterion(self, num_classes: int) -> nn.Module:
        smoothing, weight = self.recipe.label_smoothing, None
        if not 0 <= smoothing < 1:
            raise UserError(f"label-smoothing is {smoothing}; it must lie in [0, 1)")
        if self.arguments.balance == "weights":
            weights = class_weights(self.data.split("train").labels, num_classes)
            weight = torch.tensor(weights, dtype=torch.float32, device=self.device)
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)

    def _wrap(self, run: Run) -> None:
        """Wrap the network in what its forward pass needs on this device and with these processes."""
        if self.precision.dtype == torch.bfloat16:
            zero_idle_gradients_(run.model, example_input(run.model, run.spec))
        network: Callable[[Tensor], Tensor] = run.model
        if distributed.world_size() > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(run.model, device_ids=device_ids)
        run.network = torch.compile(network) if self.arguments.compile else network

    def _restructured(self) -> None:
        """Follow a cut that a schedule has made: the parameters are new, and the network is smaller."""
        self.run.network = self.run.model  # frees the old wrapper, whose hooks would reduce the gradients a second time
        gc.collect()
        self._wrap(self.run)
        self.profile = profile(deepcopy(self.run.model).cpu().eval(), self.run.spec)

    def _reporting_hooks(self) -> list[Hook]:
        """Return the hooks that watch the training, and the one that stops it early."""
        return [
            FirstBatch(self.spec, self.history),
            *reports_of(self.arguments, self.history, self.scheduler, self.feed),
            self.history,
            EarlyStopping(self.arguments.patience, self.history),
            Progress(self.history),
            StepLog(self.arguments.print_freq),
        ]

    def validate(self, network: nn.Module | None = None) -> Evaluation:
        """Measure a network (the averaged one where none is given) on the validation split, in float32."""
        return self._measure(network or self.run.averaged, "val")

    def test(self, network: nn.Module | None = None) -> Evaluation:
        """Measure a network (the averaged one where none is given) on the test split, in float32.

        Raises:
            UserError: the data has no test split.
        """
        return self._measure(network or self.run.averaged, "test")

    def load_datasets(self) -> Loaders:
        """Return the loaders of the training, validation and test images, as the run uses them."""
        return self.feed.loaders()

    def train_one_epoch(self) -> Evaluation:
        """Train one epoch with all hooks, and validate; for your own loop around it. Writes no file."""
        if not self.history.started:
            for hook in self.hooks:
                hook.on_run_begin(self.run)
        train_epoch(self.run, self.hooks)
        assert self.run.evaluation is not None
        return self.run.evaluation

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the run's whole state to a file, as the run itself does to last.pt."""
        save_checkpoint(Path(path), self._full_state())

    def _stop(self) -> None:
        self.run.interrupted = True

    def _measure(self, network: nn.Module, split: str) -> Evaluation:
        dataset, loader = (self.feed.val_set, self.feed.val_loader) if split == "val" else self.feed.evaluation(split)
        classify = classifier(network.eval(), self.spec, Precision(self.device))
        return evaluate(classify, self.spec.num_classes, loader, self.device, dataset.split.name)

    def summary(self) -> str:
        """Return what a person wants to know before the run: network, data, device, and what was mended."""
        arguments, splits = self.arguments, self.data.splits
        counts = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "val"))
        processes = f" x {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        lines = [
            f"model  {self.spec.name}: {self.profile.params:,} parameters, {self.profile.macs / 1e6:,.2f} M multiply-adds "
            f"at {self.spec.size_text} (counted by {self.profile.source})",
            f"data   {self.data.name}: {self.spec.num_classes} classes, {counts} images, augment {self.recipe.augment}",
            f"device {self.device}{processes}, {self.precision}, {self.recipe.optimizer} lr0 {self.recipe.lr0:g}",
            *(f"note   {note}" for note in self.notes),
            *(f"schedule {line}" for line in (self.scheduler.describe() if self.scheduler else [])),
        ]
        if self.directory:
            lines.append(f"resume {self.directory.path} at epoch {self.run.epoch + 1}, step {self.run.step}")
        return "\n".join([*([str(self.model)] if arguments.verbose else []), *lines])

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
        self.history.folder = directory.path if distributed.is_main() else None
        try:
            if fresh and distributed.is_main():
                write_yaml(directory.path / "opt.yaml", to_record(self.arguments))
                if Path(self.arguments.compress).is_file():  # which a pipe is not
                    shutil.copyfile(self.arguments.compress, directory.path / SCHEDULE)
                if self.best_state:  # of epochs that train_one_epoch has trained
                    save_checkpoint(directory.best, self.best_state)
                self._save_last(self.run)
            with calling_on_signals(self._stop):
                fit(self.run, self.hooks, self._save_last)
        except (UserError, OSError):
            if fresh and not self.history.rows and distributed.is_main():
                directory.discard()
            raise
        finally:
            self.history.close()
        if self.run.interrupted:
            where = f"epoch {self.run.epoch + 1}, step {self.run.step}"
            raise Interrupted(f"stopped in {where}; saved. Go on with: {command('train', resume=directory.path)}")
        if not distributed.is_main():
            return {}
        if self.arguments.nosave:
            save_checkpoint(directory.last, self._full_state())
            save_checkpoint(directory.best, self.best_state or {})
        best = deepcopy(self.run.averaged)
        best.load_state_dict(read_tensor_file(directory.best)["state_dict"])
        return report_training(directory, self.history, self.profile, self.spec, self.feed.val_set, best, self._unreadable(), self.findings)

    def _unreadable(self) -> list[str]:
        seen = [f"{self.feed.train_set.split.name(position)}: could not be decoded" for position in sorted(self.run.unreadable)]
        best = self.history.best
        return [*self.data.unreadable, *seen, *(f"{name}: could not be decoded" for name in (best.unreadable if best else ()))]

    def _full_state(self) -> dict[str, Any]:
        state = inference_state(self.run, self.arguments, self.profile)
        return {**state, "training": training_state(self.run, self.hooks, self.data)}

    def _save_last(self, run: Run) -> None:
        """Write last.pt, and the periodic checkpoint where one is due."""
        if not distributed.is_main() or self.arguments.nosave:
            return
        assert self.directory is not None
        save_checkpoint(self.directory.last, self._full_state())
        period = self.arguments.save_period
        if period and run.step == 0 and run.epoch and run.epoch % period == 0:
            save_checkpoint(self.directory.weights / f"epoch{run.epoch}.pt", inference_state(run, self.arguments, self.profile))

    def _keep_best(self, run: Run) -> None:
        if not distributed.is_main():
            return
        state = inference_state(self.run, self.arguments, self.profile)
        state["metrics"]["epoch"] = run.epoch + 1
        if self.arguments.nosave or self.directory is None:
            self.best_state = state
        else:
            save_checkpoint(self.directory.best, state)
