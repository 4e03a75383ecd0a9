"""What a checkpoint holds of a run, and how a run is resumed from one."""

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

OVERRIDABLE = {"device", "workers", "verbose", "local_rank"}  # these may differ in a resumed run; the launcher sets the last
CALL = {"resume", "project"}  # these say which run is resumed


def open_run(arguments: TrainArguments, given: set[str]) -> tuple[TrainArguments, RunDirectory | None, dict[str, Any] | None]:
    """Find the run to resume, if any: the one that --resume names, or the one whose workers torchrun has restarted.

    Returns:
        The arguments on record, the run's folder and its checkpoint. For a new run: its arguments (with --reset-optimizer
        they name the old run's weights), None and None.

    Raises:
        UserError: there is no such run, it has finished, or an argument is given that can't change.
    """
    if arguments.reset_optimizer or (arguments.looks_only and arguments.resume):
        arguments = _from_weights_alone(arguments)
    directory = None
    if distributed.is_main():
        directory = find_run(arguments.resume, arguments.project) if arguments.resume else find_restarted(arguments.project, arguments.name)
    directory = distributed.broadcast(directory)
    if directory is None:
        return arguments, None, None
    if arguments.resume and (extra := sorted(given - OVERRIDABLE - CALL)):
        raise UserError(
            f"--{extra[0].replace('_', '-')} can't be changed by --resume-from: a resumed run keeps its arguments, except "
            "--device, --verbose and --workers; to start a new run from its weights, add --reset-optimizer"
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
    """Return arguments that take only the weights of the run that --resume names: for a new run, or for an analysis."""
    if not arguments.resume:
        raise UserError("--reset-optimizer goes with --resume-from RUN: it starts a new run from that run's weights")
    if arguments.weights or arguments.pretrained:
        other = "weights" if arguments.weights else "pretrained"
        raise UserError(f"--resume-from and --{other} exclude each other: both say where the weights come from")
    path = Path(arguments.resume)
    weights = path if path.is_file() else find_run(arguments.resume, arguments.project).last
    return replace(arguments, weights=str(weights), resume="", reset_optimizer=False)


def inference_state(run: Run, arguments: TrainArguments, profile: Profile) -> dict[str, Any]:
    """Return what every checkpoint holds, and all that inference needs."""
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
    """Return what a resumed run needs besides ``inference_state`` to end with the same bits."""
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
    """Restore a run to where its checkpoint left it, in place.

    Raises:
        UserError: the images have changed since, or the checkpoint lacks a hook's state.
    """
    state = checkpoint["training"]
    for name, digest in state["splits"].items():
        if data.split(name).digest() != digest:
            raise UserError(f"the {name} images of data '{data.name}' have changed since the run began, so it can't be resumed")
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
