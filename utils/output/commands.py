"""The commands that scripts print for the next step, ready to be pasted into a shell."""

from __future__ import annotations

import os
import shlex

PACKAGE = "rankcut."  # what the names of an installed copy's modules begin with


def command(script: str, **flags: str | os.PathLike[str]) -> str:
    """Return a script's command line: ``command("val", data="a b")`` is "python val.py --data 'a b'".

    An installed copy has a command in place of the scripts: "rankcut val --data 'a b'".
    """
    start = f"rankcut {script}" if __name__.startswith(PACKAGE) else f"python {script}.py"
    return " ".join([start, *(f"--{name.replace('_', '-')} {quoted(os.fspath(value))}" for name, value in flags.items())])


def quoted(word: str) -> str:
    """Quote a word for a POSIX shell, on one line and without control characters."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in word.replace("\\", "\\\\"))
    return "$'" + escaped.replace("'", "\\'") + "'"
