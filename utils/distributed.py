"""The process group of distributed training, and the exchanges that training needs; no-ops in a single process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError

TIMEOUT = timedelta(minutes=30)  # while one rank decodes a whole data set, the others wait


def launched() -> bool:
    """Whether torchrun or a similar launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device) -> None:
    """Join the process group that torchrun describes: nccl on CUDA, gloo elsewhere."""
    if launched() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # torchrun's store outlives its workers: without a prefix, restarted workers would find the addresses of dead ones.
        store, number, size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"restart{restarts()}", store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)


def leave() -> None:
    """Close the process group; unless an error is being raised, wait for all processes first."""
    if dist.is_initialized():
        if sys.exc_info()[0] is None:  # closing while another process still communicates would abort it
            dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0")) if launched() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def restarts() -> int:
    """Return how often torchrun has restarted the workers of this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """Return a name of this launch that survives a restart of its workers: the launcher's run and process."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.getppid()}" if launched() else ""


def sum_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value: Any) -> Any:
    """Return rank 0's value, a small picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_(tensors: list[Tensor]) -> None:
    """Replace tensors by those of rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    return bool(flag) if world_size() == 1 else bool(sum_(torch.tensor(int(flag), device=device)).item())


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 finish the block before the other ranks enter it, so that they find the files it has written."""
    if world_size() > 1 and not is_main():
        dist.barrier()
    yield
    if world_size() > 1 and is_main():
        dist.barrier()


def select_device(name: str) -> torch.device:
    """Return the device that ``--device`` names: '' means CUDA if available, a number a CUDA device.

    Raises:
        UserError: there is no such device.
    """
    name = name.strip().lower()
    if "," in name:
        raise UserError(f"device '{name}' names several; use torchrun --nproc_per_node {name.count(',') + 1} and leave --device out")
    if launched() and name in ("", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if name == "":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError:
        raise UserError(f"unknown device '{name}'; valid: cpu, cuda, a CUDA device's number, mps") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UserError(f"device '{name}' is not here: CUDA sees {torch.cuda.device_count()} device(s); use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device '{name}' is not supported; valid: cpu, cuda, a CUDA device's number, mps")
    return device
