"""Command lines from dataclasses: one field is the flag, its default, its help, and its line in the run's record."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, nearest

Arguments = TypeVar("Arguments")


def flag(default: Any, help: str, *aliases: str, const: Any = None, many: bool = False) -> Any:
    """Declare a field that is a flag.

    Args:
        default: the value without the flag.
        help: one line.
        aliases: further spellings, with their dashes.
        const: the value of the flag without a value; makes the value optional.
        many: the flag takes one or more values; the field is a tuple.
    """
    return dataclasses.field(default=default, metadata={"help": help, "aliases": aliases, "const": const, "many": many})


class _Parser(argparse.ArgumentParser):
    """Reports in one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            word = message.removeprefix("unrecognized arguments:").split()[0]
            flags = [option for action in self._actions for option in action.option_strings]
            message = f"unknown flag {word}.{nearest(word, flags)} See --help"
        raise UserError(message)


def make_parser(arguments: type[Any], description: str) -> argparse.ArgumentParser:
    """Make the parser of a dataclass whose fields are declared with ``flag``."""
    parser = _Parser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        meta, kind = field.metadata, _value_type(hints[field.name])
        spellings = dict.fromkeys([*spellings_of(field.name), *meta["aliases"]])
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{meta['help']} (default: {_shown(field.default)})",
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
            if meta["many"]:
                options["nargs"] = "+"
            if meta["const"] is not None:
                options |= {"nargs": "?", "const": meta["const"]}
        parser.add_argument(*spellings, **options)
    return parser


def parse(arguments: type[Arguments], description: str, argv: Sequence[str] | None = None) -> tuple[Arguments, set[str]]:
    """Parse a command line.

    Returns:
        The arguments, and the names of those that were given.

    Raises:
        UserError: an unknown flag or a value of the wrong type.
    """
    given = vars(make_parser(arguments, description).parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given.get("seed", 0) >= 2**63:
        raise UserError(f"seed is {given['seed']}; it must be below 2^63")
    return arguments(**values), set(given)


def spellings_of(name: str) -> list[str]:
    """Return a field's flags: with dashes, and with underscores where that differs."""
    return [f"--{name.replace('_', '-')}", *([f"--{name}"] if "_" in name else [])]


def from_record(arguments: type[Arguments], record: dict[str, Any]) -> Arguments:
    """Rebuild arguments from a run's record; entries that this version does not know are refused.

    Raises:
        UserError: an entry is unknown.
    """
    known = {field.name for field in dataclasses.fields(arguments)}  # type: ignore[arg-type]
    if extra := sorted(set(record) - known):
        raise UserError(f"the run's record has the unknown entry '{extra[0]}'; it was written by another version")
    return arguments(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def to_record(arguments: Any) -> dict[str, Any]:
    """Return JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(arguments).items()}


def flag_table(scripts: dict[str, type[Any]]) -> str:
    """Return one Markdown table of several scripts' flags: a row per flag, each script's default in its own column."""
    rows: dict[str, list[str]] = {}
    meanings: dict[str, str] = {}
    for column, arguments in enumerate(scripts.values()):
        for field in dataclasses.fields(arguments):
            spellings = dict.fromkeys([spellings_of(field.name)[0], *field.metadata["aliases"]])
            negation = f" / `--no-{field.name.replace('_', '-')}`" if field.default is True else ""
            key = ", ".join(f"`{spelling}`" for spelling in spellings) + negation
            rows.setdefault(key, [""] * len(scripts))[column] = _shown(field.default)
            meanings.setdefault(key, field.metadata["help"])
    head = ["flag", *scripts, "meaning"]
    lines = [head, ["---"] * len(head), *([key, *cells, meanings[key]] for key, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value_type(hint: Any) -> type:
    """Return the type of one value: of ``int | None`` it is int, of ``tuple[str, ...]`` str."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _value_type(next(part for part in typing.get_args(hint) if part is not type(None)))
    if typing.get_origin(hint) is tuple:
        return _value_type(typing.get_args(hint)[0])
    return typing.cast(type, hint)


def _shown(value: Any) -> str:
    if value is None or value in ("", ()):
        return "-"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"
