"""Errors that a user can fix, and how scripts report them."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


class UserError(ValueError):
    """An error that the user can fix: the message names the thing, the value and the valid choices."""


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved its state; the message says how to resume it."""


def closest(value: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is spelt most like ``value``, whatever the case, if any is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(value.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[matches[0]] if matches else None


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the choice closest to ``value``, or an empty string."""
    found = closest(value, choices)
    return f" Did you mean '{found}'?" if found else ""


def unknown(kind: str, value: str, choices: Iterable[str]) -> UserError:
    """Build the error for a misspelt name: what it is, the nearest match, the valid choices."""
    choices = list(choices)
    shown = ", ".join(choices[:20]) + (f", ... ({len(choices)} in all)" if len(choices) > 20 else "")
    return UserError(f"unknown {kind} '{value}'.{nearest(value, choices)} Valid: {shown}")


# Refusals of the operating system that the user can fix; any other OSError is a defect and keeps its traceback.
_FIXABLE = {
    errno.ENOSPC: "the disk is full; free some space or choose another --project",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another --project",
    errno.EFBIG: "the file would exceed the allowed size; choose another --project",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only; choose another --project",
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "is a directory, not a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}


def shown(name: object) -> str:
    """Return a name as it may go to a terminal: characters that control it, and bytes that are no text, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; errors that the user can fix become one line on stderr and exit code 2."""
    script = os.path.basename(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be bytes that are no text
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    except BrokenPipeError:  # whatever reads our output has closed it, as in `predict.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _FIXABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{script}: error: {where}{_FIXABLE[error.errno]}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    except Interrupted as stop:
        print(f"\n{script}: {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
