"""Start scripts and functions on processes that can be killed, without waiting for imports.

The processes are forked from one that has imported everything, and are what torchrun would start. Real ones are slow to
start; test_distributed has those.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compression.training.compressor import ClassifierCompressor
from tests.conftest import ROOT, spare_time_
from utils.loop.hooks import Hook


def as_script(name: str, *arguments: object) -> None:
    """Be ``python NAME ARGUMENTS``."""
    sys.argv = [name, *map(str, arguments)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


class Pause(Hook):
    """Waits after a batch (epoch and step counted from 1) until the process is killed or asked to stop."""

    def __init__(self, epoch: int, step: int) -> None:
        self.place = epoch, step

    def on_minibatch_end(self, run: Any) -> None:
        if (run.epoch + 1, run.step + 1) == self.place:
            print("waits")
            while not run.interrupted:
                time.sleep(0.005)


def as_paused_script(place: tuple[int, int], *command: object) -> None:
    """Be ``python COMMAND``, which trains up to an epoch and step and waits there."""
    train = ClassifierCompressor.run_training_loop

    def run_and_wait(compressor: ClassifierCompressor) -> Any:
        compressor.hooks.append(Pause(*place))
        return train(compressor)

    ClassifierCompressor.run_training_loop = run_and_wait
    as_script(*command)


def _be_rank(rank: int, world: int, port: int, folder: Path, log: Path, target: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.chdir(folder)
    if world > 1:
        os.environ |= {"WORLD_SIZE": f"{world}", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = f"{port}"
    spare_time_()
    with log.open("w", buffering=1) as output:
        sys.stdout = sys.stderr = output
        target(*arguments)


class Launch:
    """A function on some processes, in a folder; ``with`` starts it, and leaves none behind.

    Args:
        folder: where they run, and where NAME.RANK.log has what each prints.
        name: of the logs.
        target: what each calls; importable.
        arguments: its arguments.
        world: number of processes.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["compression.training.compressor", "torch.utils.tensorboard", "torch._dynamo", "thop", "pandas", "matplotlib.backends.backend_agg"]
    )

    def __init__(self, folder: Path, name: str, target: Callable[..., None], *arguments: object, world: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"{name}.{rank}.log" for rank in range(world)]
        values = [(rank, world, port, folder, log, target, arguments) for rank, log in enumerate(self.logs)]
        self.processes = [self.context.Process(target=_be_rank, args=of_rank) for of_rank in values]

    def __enter__(self) -> Launch:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def outputs(self) -> list[str]:
        """What each process has printed so far."""
        return [log.read_text() if log.exists() else "" for log in self.logs]

    def finish(self, code: int = 0) -> str:
        """Wait for the end and return what all have printed."""
        for process in self.processes:
            process.join(100)
            assert process.exitcode == code, self.outputs
        return "".join(self.outputs)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.outputs
            assert time.monotonic() < deadline, "the run did not get this far in time"
            time.sleep(0.005)

    def stop_where_it_waits(self, number: int) -> str:
        """Send a signal to all processes once the first of them waits at its ``Pause``."""
        self.wait_until(lambda: "waits\n" in self.outputs[0])
        return self.stop(number)

    def stop(self, number: int) -> str:
        """Send a signal to all processes, and wait for their end."""
        for process in self.processes:
            os.kill(process.pid, number)
        return self.finish(130 if number == signal.SIGINT else -number)
