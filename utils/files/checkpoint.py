"""Checkpoints: dicts of tensors and JSON-able values, written atomically, read without running code.

``python -m utils.files.checkpoint FILE`` prints the contents of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import secrets
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, run_script

FORMAT, VERSION = "rankcut", 1


class NeedsCode(UserError):
    """The file is a pickle that can only be loaded by running code, which RankCut never does."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it to ``path``.

    Readers see the old file or the new one, never a part; after an error the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync_directory(path: Path) -> None:
    if os.name != "posix":  # only POSIX systems can open directories
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; names of files that are not UTF-8 come out as the bytes that they are."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, stamped with the format and its version.

    Raises:
        OSError: the disk is full or the path not writable; an older file there is untouched.
    """
    try:
        with atomic_write(path) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)
    except RuntimeError as error:  # torch's zip writer reports a failed write as a RuntimeError
        if not any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "iostream error")):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensor_file(path: Path) -> Any:
    """Read any file that torch can read without running code.

    Raises:
        NeedsCode: the file's pickle names classes or functions; none of it was run.
        UserError: the file is missing, damaged or not a weights file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weights file")
    if not path.exists():
        raise UserError(f"no weights file {path}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle's protocol; the error that follows says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip or "GLOBAL" in str(error):  # "unsupported GLOBAL", "Unsupported global: GLOBAL"; not "Unsupported operand"
            raise NeedsCode(f"{path} needs code to load, which could do anything, so it is refused; save a plain state dict") from None
        raise UserError(f"{path} is not a weights file, or is damaged") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # raised by a seek beyond the end of a half-written file
            raise
        raise UserError(f"{path} is not a weights file, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, struct.error) as error:
        # What torch's reader raises for a half-written zip or for bytes that are not a pickle.
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript file; val.py and predict.py run it as *.torchscript") from None
        raise UserError(f"{path} is not a weights file, or is damaged") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: with the length of a JSON header, and that header."""
    with path.open("rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors, or where the file's metadata describe a classifier, a checkpoint."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path} is a safetensors file; to read it: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
    except Exception as error:  # the reader's own errors have no common class
        raise UserError(f"{path} is a damaged safetensors file ({' '.join(str(error).split())[:80]})") from None
    return {**about, "state_dict": tensors} if is_checkpoint(about) else tensors


def save_safetensors(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors as a safetensors file, atomically.

    Args:
        path: the file.
        state: names to tensors.
        about: the JSON-able rest of a checkpoint, which goes into the file's metadata; may be empty.
    """
    from safetensors.torch import save_file

    metadata = {FORMAT: json.dumps({"format": FORMAT, "version": VERSION, **about})} if about else {}
    with atomic_write(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary, {"format": "pt", **metadata}
        )


def is_checkpoint(content: Any) -> bool:
    """Whether ``read_tensor_file``'s result is a checkpoint of this project."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_version(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint if this code can read it.

    Raises:
        UserError: its version is newer than this code, or entries are missing.
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


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
MAX_SHOWN = 160  # characters of a value


def describe(content: Any, path: Path) -> str:
    """Describe a file's content as text: specification, metrics, arguments, plan, tensors.

    Raises:
        UserError: it is neither a checkpoint that this code reads nor a state dict.
    """
    lines = [f"{path}: plain state dict"]
    if is_checkpoint(content):
        content = check_version(content, path)
        lines = [f"{path}: checkpoint, version {content['version']}"]
        for key in ("spec", "metrics", "arguments"):
            lines += [key, *_values(content.get(key))]
        training = content.get("training")
        where = f"epoch {_shown(training.get('epoch'))}, step {_shown(training.get('step'))}" if isinstance(training, Mapping) else "none"
        lines += ["plan", *_plan(content.get("plan")), "training state", f"  {where}"]
        state = content["state_dict"]
    else:
        state = find_state_dict(content, path)
    lines += ["tensors"]
    rows = [(_shown(name), *_tensor(value)) for name, value in state.items()]
    columns = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines += [f"  {name:<{columns[0]}}  {shape:<{columns[1]}}  {kind}" for name, shape, kind in rows]
    parameters = [
        value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and str(name).rpartition(".")[2] not in STATISTICS
    ]
    lines.append(
        f"{len(state):,} tensors; {sum(value.numel() for value in parameters):,} parameters "
        f"in {len(parameters):,} of them (the others are statistics of norms and integers)"
    )
    return "\n".join(lines)


def _values(values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"  {_shown(values)}"]
    width = max((len(_shown(name)) for name in values), default=0)
    return [f"  {_shown(name):<{width}}  {_shown(value)}" for name, value in values.items()] or ["  none"]


def _plan(plan: Any) -> list[str]:
    """Return a line per group that was cut, 'kept of all'; earlier cuts follow later ones."""
    lines: list[str] = []
    while plan:
        if not isinstance(plan, Mapping) or not isinstance(plan.get("kept"), Mapping):
            return [*lines, f"  damaged: {_shown(plan)}"]
        sizes, widths = (plan[key] if isinstance(plan.get(key), Mapping) else {} for key in ("sizes", "widths"))
        counts = {name: len(units) if isinstance(units, list | tuple) else "?" for name, units in plan["kept"].items()}
        counts = counts or dict(widths)  # a network that was built narrow has only widths
        lines += _values({name: f"{_shown(count)} of {_shown(sizes.get(name, '?'))}" for name, count in counts.items()}) if counts else []
        if plan := plan.get("before"):
            lines.append("  and before that")
    return lines or ["  none: no channels were cut"]


def _tensor(value: Any) -> tuple[str, str]:
    return (str(list(value.shape)), str(value.dtype).removeprefix("torch.")) if isinstance(value, Tensor) else ("no tensor", _shown(value))


def _shown(value: Any) -> str:
    """Return a value on one line, shortened, without control characters."""
    text = "".join(character if character.isprintable() else "?" for character in str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def main() -> None:
    """Print the contents of the files named on the command line."""
    paths = sys.argv[1:]
    if not paths or any(path.startswith("-") for path in paths):
        raise UserError("python -m utils.files.checkpoint FILE ... prints the contents of checkpoints and state dicts")
    for path in map(Path, paths):
        print(describe(read_tensor_file(path), path))


if __name__ == "__main__":
    run_script(main)
