"""Run directories: one numbered folder per run, made by rank 0, and finding the run to resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import distributed
from utils.errors import UserError
from utils.files.checkpoint import write_text

LAUNCH_FILE = ".launch"


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder; ``created`` says whether this process made it and so may remove it again."""

    path: Path
    created: bool = False

    @classmethod
    def create(cls, project: str, name: str, exist_ok: bool) -> RunDirectory:
        """Make the first free folder of ``project/name``, ``project/name2``, ...; with ``exist_ok`` use ``project/name``.

        Raises:
            UserError: a file stands in the way.
        """
        check_place(project, name)
        base = Path(project) / name
        path, created = base, False
        if distributed.is_main():
            try:
                base.parent.mkdir(parents=True, exist_ok=True)
                path, created = _make_free(base, exist_ok)
            except (FileExistsError, NotADirectoryError):
                raise UserError(f"--project {project} can't be a folder: a file is in the way") from None
            if distributed.launch_id():
                (path / LAUNCH_FILE).write_text(distributed.launch_id(), encoding="utf-8")
        return cls(distributed.broadcast(path), created)

    @property
    def weights(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "weights"

    @property
    def last(self) -> Path:
        """The newest checkpoint, from which a run resumes."""
        return self.weights / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation result."""
        return self.weights / "best.pt"

    def discard(self) -> None:
        """Remove the folder if this process made it: the run has failed with nothing to keep."""
        if self.created:
            shutil.rmtree(self.path, ignore_errors=True)


def check_place(project: str, name: str) -> None:
    """Refuse a run's folder that can't be made, before any work is done; nothing is created.

    Raises:
        UserError: the name is empty or leaves the project's folder, or nothing can be written there.
    """
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise UserError(f"--name {name!r} is no name of a folder below --project {project}")
    place = (Path(project) / name).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--project {project} can't be written: {place} is read-only")


def _make_free(base: Path, exist_ok: bool) -> tuple[Path, bool]:
    """Make the first free folder; return it, and whether it is new."""
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}{number}")
        try:
            path.mkdir()
            return path, True
        except FileExistsError:
            if exist_ok and path.is_dir():
                return path, False
            if exist_ok:
                raise UserError(f"{path} is a file, so --name {base.name} can't be a folder") from None
    raise AssertionError("unreachable")


def find_run(resume: str, project: str) -> RunDirectory:
    """Find the run to resume: a run's folder, a checkpoint in one, or, for "newest", the newest of a project.

    Raises:
        UserError: there is none with a checkpoint.
    """
    if resume == "newest":
        checkpoints = sorted(Path(project).glob("*/weights/last.pt"), key=os.path.getmtime)
        if not checkpoints:
            raise UserError(f"nothing to resume: no run below {project} has a weights/last.pt")
        return RunDirectory(checkpoints[-1].parent.parent)
    path = Path(resume)
    if path.is_file():
        if path.name != "last.pt" or path.parent.name != "weights":
            raise UserError(f"{path} is not the weights/last.pt of a run; to start a new run from these weights use --weights {path}")
        return RunDirectory(path.parent.parent)
    if not (path / "weights" / "last.pt").is_file():
        raise UserError(f"nothing to resume: {path / 'weights' / 'last.pt'} is not there")
    return RunDirectory(path)


def find_restarted(project: str, name: str) -> RunDirectory | None:
    """Find the run that this launch started before torchrun restarted its workers."""
    if not distributed.restarts():
        return None
    for marker in Path(project).glob(f"{name}*/{LAUNCH_FILE}"):
        if marker.read_text(encoding="utf-8") == distributed.launch_id() and (marker.parent / "weights" / "last.pt").is_file():
            return RunDirectory(marker.parent)
    return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")
