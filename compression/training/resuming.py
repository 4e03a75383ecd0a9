"""What a checkpoint holds of a run, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compression.training.arguments import TrainArguments
from utils import distributed
from utils.arguments import from_record, to_record
from utils.data.splits import ImageData
from utils.errors import UserError
from utils.files.checkpoint import check_version, is_checkpoint, read_tensor_file
from utils.files.runs import RunDirectory, find_restarted, find_run
from utils.loop.engine import Run
from utils.loop.hooks import Hook
from utils.measures.profile import Profile

OVERRIDABLE = {"device", "workers", "verbose", "local_rank"}  # what a resumed run may be told anew; the last is the launcher's
CALL = {"resume", "project"}  # what says which run goes on


def open_run(arguments: TrainArguments, given: set[str]) -> tuple[TrainArguments, RunDirectory | None, dict[str, Any] | None]:
    """Find the run that goes on, if one does: the one that --resume names, or the one whose workers torchrun restarts.

    Returns:
        The arguments (those of the run's record), the run's folder, its checkpoint; for a new run, its arguments (which
        with --reset-optimizer take that run's weights) and None twice.

    Raises:
        UserError: there is no such run, it has finished, or an argument is given that can't change.
    """
    anew = arguments.reset_optimizer or (arguments.looks_only and bool(arguments.resume))
    if anew:
        arguments = _from_weights_alone(arguments)
    directory = None
    if distributed.is_main():
        directory = find_run(arguments.resume, arguments.project) if arguments.resume else find_restarted(arguments.project, arguments.name)
    directory = distributed.broadcast(directory)
    if directory is None:
        return arguments, None, None
    if arguments.resume and (extra := sorted(given - OVERRIDABLE - CALL)):
        raise UserError(
            f"--{extra[0].replace('_', '-')} can't be changed by --resume-from: a run that goes on keeps its arguments, but for "
            "--device, --verbose and --workers; to begin a new run from its weights add --reset-optimizer"
        )
    content = read_tensor_file(directory.last)
    if not is_checkpoint(content) or "training" not in content:
        raise UserError(f"{directory.last} can't be resumed: it holds no training state")
    content = check_version(content, directory.last)
    record = from_record(TrainArguments, content["arguments"])
    if content["training"]["epoch"] >= record.epochs or content["training"]["stop"]:
        raise UserError(f"{directory.path} has finished; start a new run from it with --weights {directory.best}")
    return replace(record, **{name: getattr(arguments, name) for name in given & OVERRIDABLE}), directory, content


def _from_weights_alone(arguments: TrainArguments) -> TrainArguments:
    """Return the arguments of what starts from a run's weights: a new run at epoch 0, or an analysis."""
    if not arguments.resume:
        raise UserError("--reset-optimizer goes with --resume-from RUN: it begins anew from that run's weights")
    if arguments.weights or arguments.pretrained:
        other = "weights" if arguments.weights else "pretrained"
        raise UserError(f"--resume-from and --{other} exclude each other: both say where the weights come from")
    path = Path(arguments.resume)
    weights = path if path.is_file() else find_run(arguments.resume, arguments.project).last
    return replace(arguments, weights=str(weights), resume="", reset_optimizer=False)


def inference_state(run: Run, arguments: TrainArguments, profile: Profile) -> dict[str, Any]:
    """Return what every checkpoint holds, which is all that a shipped one needs."""
    evaluation = run.evaluation
    metrics = {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss} if evaluation else {}
    return {
        "spec": run.spec.to_dict(),
        "plan": run.plan,
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in run.averaged.state_dict().items()},
        "metrics": {**metrics, "epoch": run.epoch, "params": profile.params, "macs": profile.macs},
        "arguments": to_record(arguments),
    }


def training_state(run: Run, hooks: Sequence[Hook], data: ImageData) -> dict[str, Any]:
    """Return what a run needs beside ``inference_state`` to go on bit-identically."""
    return {
        "model": run.model.state_dict() if run.ema else None,
        "ema": run.ema.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "hooks": {type(hook).__name__: hook.state_dict() for hook in hooks},
        "epoch": run.epoch,
        "step": run.step,
        "loss_sums": run.loss_sums,
        "images_seen": run.images_seen,
        "stop": run.stop,
        "rng": torch.get_rng_state(),
        "splits": {name: split.digest() for name, split in data.splits.items() if name != "test"},
    }


def restore_(run: Run, hooks: Sequence[Hook], data: ImageData, checkpoint: dict[str, Any]) -> None:
    """Take up a run where its checkpoint left it, in place.

    Raises:
        UserError: the images are no longer those that the run began with.
    """
    state = checkpoint["training"]
    for name, digest in state["splits"].items():
        if data.split(name).digest() != digest:
            raise UserError(f"the {name} images of data '{data.name}' have changed since the run began; it can't go on bit-identically")
    run.model.load_state_dict(state["model"] or checkpoint["state_dict"])
    if run.ema:
        run.ema.model.load_state_dict(checkpoint["state_dict"])
        run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    for hook in hooks:
        if type(hook).__name__ not in state["hooks"]:
            raise UserError(f"the run's checkpoint holds no state of {type(hook).__name__}; it was written by another version")
        hook.load_state_dict(state["hooks"][type(hook).__name__])
    run.epoch, run.step, run.stop = state["epoch"], state["step"], state["stop"]
    if distributed.is_main():  # the sums of all ranks
        run.loss_sums, run.images_seen = dict(state["loss_sums"]), state["images_seen"]
    torch.set_rng_state(state["rng"])
