"""Checkpoints: plain dicts of tensors and JSON-able values, written atomically, read without running code."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

FORMAT, VERSION = "rankcut", 1


class NeedsCode(UserError):
    """The file is a pickle that can only be loaded by running code, which we never do."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it into place.

    Readers see the old file or the new one, never a part; after an error the old file stands and the temporary is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(path: Path) -> None:
    if os.name != "posix":  # only POSIX systems can open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, stamped with the format and its version.

    Raises:
        OSError: the disk is full or the place not writable; what stood there before still stands.
    """
    try:
        with atomic_write(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)
    except RuntimeError as error:  # torch's zip writer reports a failed write as a RuntimeError
        if not any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "iostream error")):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def read_tensor_file(path: Path) -> Any:
    """Read any file that torch can read without running code.

    Raises:
        NeedsCode: the file's pickle asks for classes or functions; nothing of it was run.
        UserError: the file is absent, damaged or foreign.
    """
    import pickle

    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weights file")
    if not path.exists():
        raise UserError(f"no weights file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch remarks on the pickle's protocol; what it then raises says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip or "GLOBAL" in str(error):  # "unsupported GLOBAL", "Unsupported global: GLOBAL"; not "Unsupported operand"
            raise NeedsCode(f"{path} needs code to load, which could do anything, so it is refused; save a plain state dict") from None
        raise UserError(f"{path} is not a weights file, or is damaged") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to where a half-written file does not reach
            raise
        raise UserError(f"{path} is not a weights file, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, struct.error):
        # What torch's reader raises for a half-written zip or for bytes that are no pickle at all.
        raise UserError(f"{path} is not a weights file, or is damaged") from None


def is_checkpoint(content: Any) -> bool:
    """Whether ``read_tensor_file``'s result is a checkpoint of this project."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_version(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint whose version this code can read.

    Raises:
        UserError: the version is newer than this code, or entries are missing.
    """
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise UserError(f"{path} has checkpoint version {content.get('version')}; this code reads up to {VERSION}: update RankCut")
    if missing := [key for key in ("spec", "state_dict") if not isinstance(content.get(key), dict)]:
        raise UserError(f"{path} is not a complete checkpoint: '{missing[0]}' is missing")
    return content


def find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in a foreign file: the content itself, or under a usual key.

    Raises:
        UserError: there is none.
    """
    for key in (None, "state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "net"):
        candidate = content if key is None else content.get(key) if isinstance(content, dict) else None
        if isinstance(candidate, dict) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return {str(name): tensor for name, tensor in candidate.items()}
    raise UserError(f"{path} holds no state dict (a mapping from names to tensors)")
