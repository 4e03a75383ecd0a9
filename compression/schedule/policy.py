"""The interface of a schedule's policies."""

from __future__ import annotations

from compression.schedule.schedule import PolicyEntry
from utils.loop.hooks import Hook, LoopState


class Policy(Hook):
    """A hook whose ``on_`` and ``before_`` methods the scheduler calls only in the epochs of the policy's window."""

    def __init__(self, entry: PolicyEntry) -> None:
        self.name, self.window = entry.name, entry.window

    def target_epoch(self, epochs: int) -> int:
        """Return the last epoch, in a run of ``epochs`` epochs, in which the policy prunes, thins or quantizes; -1 if it never does."""
        return -1

    def check_start(self, run: LoopState) -> None:
        """Called at the beginning of every epoch; raises a UserError if the policy can't act on this network."""

    def end_window(self, run: LoopState) -> None:
        """Called once, at the beginning of the first epoch after the window."""

    def after_masks(self, run: LoopState) -> None:
        """Called in every epoch, after each optimizer step's masks were applied and at the epoch's end."""
