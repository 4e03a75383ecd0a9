"""Command lines from dataclasses: a field is a flag, with its default, its help, and its entry in the run's record."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, closest, nearest, unknown

Arguments = TypeVar("Arguments")
# In the order of --help.
GROUPS = ("data", "network", "training", "pruning", "latency", "schedule", "distillation", "quantization", "analysis", "output", "run")
_KINDS = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "text")}  # metavar, and the type in an error
_ARGPARSE_WORDS = {"expected": "expects", "ignored explicit argument": "takes no value, but was given"}


def flag(
    default: Any,
    help: str,
    *aliases: str,
    group: str,
    choices: Iterable[Any] = (),
    metavar: str = "",
    const: Any = None,
    many: bool = False,
) -> Any:
    """Declare a field that is a flag.

    Args:
        default: the value without the flag.
        help: one line.
        aliases: further spellings, with their dashes.
        group: the heading in ``--help``, one of ``GROUPS``.
        choices: the only values allowed, besides the default.
        metavar: what stands for the value in ``--help``; where not given, the choices, or N, X or TEXT by type.
        const: the value of the flag without a value; makes the value optional.
        many: the flag takes one or more values; the field is a tuple.
    """
    assert group in GROUPS, group
    choices = tuple(choices)
    metavar = metavar or (f"{{{','.join(map(str, choices))}}}" if choices else "")
    details = {"help": help, "aliases": aliases, "group": group, "choices": choices, "metavar": metavar, "const": const, "many": many}
    return dataclasses.field(default=default, metadata=details)


# Flags that several scripts have in common.
shared = SimpleNamespace(
    data=partial(flag, metavar="NAME|FOLDER|YAML|TAR", group="data"),
    download=partial(flag, False, "download a built-in data set that is not in data/ yet", group="data"),
    model=partial(flag, "", "architecture, for a plain state dict that does not name its own", metavar="NAME", group="network"),
    imgsz=partial(
        flag,
        None,
        "side of the input, or its height and width; default: the weights' own",
        "--img",
        "--img-size",
        metavar="PIXELS",
        group="network",
        many=True,
    ),
    max_pixels=partial(
        flag, 1 << 27, "an image of more, once reduced as far as its format allows, is not decoded but counted as unreadable", group="data"
    ),
    device=partial(flag, "", "cpu, mps, cuda, or a CUDA device's number; default: CUDA if available", metavar="DEVICE", group="run"),
    workers=partial(flag, 8, "processes that load images, at most one per core", group="run"),
    half=partial(flag, False, "half precision: bf16 where the device supports it, else fp16 on CUDA", group="run"),
    project=partial(flag, help="folder of the runs", metavar="FOLDER", group="run"),
    name=partial(flag, "exp", "name of the run; a number is appended if it is taken", metavar="NAME", group="run"),
    exist_ok=partial(flag, False, "write into the folder of that name even if it exists", group="run"),
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Prints an example in place of the usage, and of each flag the spellings with dashes, with its value once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns - 2, 120))

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "example: " if usage else prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = {"?": f"[{action.metavar}]", "+": f"{action.metavar} ...", 0: ""}.get(action.nargs or "", action.metavar or "")
        return f"{', '.join(spelling for spelling in action.option_strings if '_' not in spelling)} {value}".rstrip()


class _Parser(argparse.ArgumentParser):
    """Raises one-line errors that name the flag, the value, and what is valid instead."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            word = message.removeprefix("unrecognized arguments:").split()[0]
            raise self._unknown(word.partition("=")[0]) if word.startswith("-") else UserError(f"'{word}' follows no flag. See --help")
        if named := re.fullmatch(r"argument ([^/:]+)[^:]*: (.*)", message, flags=re.DOTALL):
            message = f"{named[1]} {named[2]}"
            for theirs, ours in _ARGPARSE_WORDS.items():
                message = message.replace(theirs, ours, 1)
        raise UserError(message)

    def _unknown(self, name: str) -> UserError:
        """Build the error for a misspelt flag: the nearest one, and the flags of its group."""
        found = closest(name, self._option_string_actions)
        if not found:
            return UserError(f"unknown flag {name}. See --help")
        group = next(group for group in self._action_groups if self._option_string_actions[found] in group._group_actions)
        flags = ", ".join(action.option_strings[0] for action in group._group_actions)
        return UserError(f"unknown flag {name}. Did you mean '{found}'? Flags of {group.title}: {flags}. See --help")


def make_parser(arguments: type[Any], description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a dataclass whose fields are declared with ``flag``.

    Args:
        arguments: the dataclass.
        description: a script's docstring, whose first line is "What it does: python script.py --an example".
    """
    what, _, example = (description or "").partition(": python ")
    example, _, rest = example.partition("\n")
    parser = _Parser(
        usage=f"python {example}" if example else None,
        description=f"{what}.\n{rest}".rstrip() if example else what,
        epilog="Underscores may replace the dashes inside a flag.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add_flags(parser, arguments, with_defaults=False)
    return parser


def add_flags(parser: argparse.ArgumentParser, arguments: type[Any], with_defaults: bool = True) -> None:
    """Add a dataclass's flags to a parser; without defaults, flags that are not given are absent from its result."""
    hints = typing.get_type_hints(arguments)
    for title, fields in _by_group(arguments).items():
        group = parser.add_argument_group(title)
        for field in fields:
            meta, kind = field.metadata, _value_type(hints[field.name])
            default = _default(field)
            options: dict[str, Any] = {
                "dest": field.name,
                "default": field.default if with_defaults else argparse.SUPPRESS,
                "help": meta["help"] + (f" (default: {default})" if default not in ("-", "off") else ""),
            }
            if kind is bool:
                options["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
            else:
                options |= {"type": _reader(kind, field), "metavar": _metavar(field, kind)}
                if meta["many"]:
                    options["nargs"] = "+"
                if meta["const"] is not None:
                    options |= {"nargs": "?", "const": meta["const"]}
            group.add_argument(*dict.fromkeys([*spellings_of(field.name), *meta["aliases"]]), **options)


def parse(arguments: type[Arguments], description: str | None, argv: Sequence[str] | None = None) -> tuple[Arguments, set[str]]:
    """Parse a command line; see ``make_parser``.

    Returns:
        The arguments, and the names of those that were given.

    Raises:
        UserError: a flag is unknown, or a value of the wrong type or not among the choices.
    """
    given = vars(make_parser(arguments, description).parse_args(argv))
    if given.get("seed", 0) >= 2**63:
        raise UserError(f"seed is {given['seed']}; it must be below 2^63")
    if "max_pixels" in given:
        check_at_least(SimpleNamespace(**given), max_pixels=1)
    return from_record(arguments, given), set(given)


def check_at_least(arguments: Any, **limits: int) -> None:
    """Check numbers against their smallest values, given by field.

    Raises:
        UserError: one is too small.
    """
    for name, least in limits.items():
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"{name.replace('_', '-')} is {value}; it must be at least {least}")


def spellings_of(name: str) -> list[str]:
    """Return a field's flags: with dashes, and with underscores where that differs."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


def from_record(arguments: type[Arguments], record: dict[str, Any]) -> Arguments:
    """Rebuild arguments from a run's record.

    Raises:
        UserError: this version does not know one of the entries.
    """
    known = {field.name for field in dataclasses.fields(arguments)}  # type: ignore[arg-type]
    if extra := sorted(set(record) - known):
        raise UserError(f"the run's record has the unknown entry '{extra[0]}'; it was written by another version")
    return arguments(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def from_keywords(arguments: type[Arguments], given: Mapping[str, Any]) -> Arguments:
    """Make arguments from a function's keywords; a UserError says what is no flag, of the wrong type or not among the choices."""
    hints, known = typing.get_type_hints(arguments), {field.name: field for field in dataclasses.fields(arguments)}  # type: ignore[arg-type]
    if strange := next((name for name in given if name not in known), None):
        raise unknown("argument", strange, known)
    return arguments(**{name: _checked(name, value, known[name], _value_type(hints[name])) for name, value in given.items()})


def _checked(name: str, value: Any, field: dataclasses.Field[Any], kind: type) -> Any:
    if value is None or (type(value) is type(field.default) and value == field.default):
        return field.default
    several = field.metadata["many"] and isinstance(value, list | tuple)
    parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in (value if several else [value])]
    for part in parts:
        if not isinstance(part, (kind, int) if kind is float else kind) or (isinstance(part, bool) and kind is not bool):
            raise UserError(f"{name} is {value!r}; it must be {'true or false' if kind is bool else _KINDS[kind][1]}")
        if (choices := field.metadata["choices"]) and part not in (*choices, field.default):
            raise UserError(f"{name} is {value!r}.{nearest(str(part), map(str, choices))} Valid: {', '.join(map(str, choices))}")
    return tuple(parts) if field.metadata["many"] else parts[0]


def to_record(arguments: Any) -> dict[str, Any]:
    """Return JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(arguments).items()}


def flag_table(scripts: dict[str, type[Any]]) -> str:
    """Return the flags of several scripts as Markdown: a section per script, with a table per group."""
    lines: list[str] = []
    for script, arguments in scripts.items():
        lines += [f"## {script}", ""]
        hints = typing.get_type_hints(arguments)
        for group, fields in _by_group(arguments).items():
            rows = [_table_row(field, _value_type(hints[field.name])) for field in fields]
            lines += [f"### {group}", "", "| flag | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip()


def _table_row(field: dataclasses.Field[Any], kind: type) -> str:
    spellings = [spellings_of(field.name)[0], *(alias for alias in field.metadata["aliases"] if "_" not in alias)]
    if kind is bool and field.default is not False:
        spellings.append(spellings[0].replace("--", "--no-", 1))
    value = "" if kind is bool else f"`{_metavar(field, kind)}{' ...' if field.metadata['many'] else ''}`"
    cells = [", ".join(f"`{spelling}`" for spelling in spellings), value, _default(field), field.metadata["help"]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _by_group(arguments: type[Any]) -> dict[str, list[dataclasses.Field[Any]]]:
    fields = dataclasses.fields(arguments)
    grouped = {group: [field for field in fields if field.metadata["group"] == group] for group in GROUPS}
    return {group: members for group, members in grouped.items() if members}


def _value_type(hint: Any) -> type:
    """Return the type of one value: of ``int | None`` it is int, of ``tuple[str, ...]`` str."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _value_type(next(part for part in typing.get_args(hint) if part is not type(None)))
    if typing.get_origin(hint) is tuple:
        return _value_type(typing.get_args(hint)[0])
    return typing.cast(type, hint)


def _reader(kind: type, field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """Return argparse's ``type`` of a field: it converts one value and checks it against the choices."""
    choices = field.metadata["choices"]

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is '{text}'; it must be {_KINDS[kind][1]}") from None
        if isinstance(value, str) and value not in choices:
            value = next((word for word in choices if isinstance(word, str) and word.lower() == value.lower()), value)
        if choices and value not in (*choices, field.default):
            words = [str(choice) for choice in choices]
            raise argparse.ArgumentTypeError(f"is '{text}'.{nearest(text, words)} Valid: {', '.join(words)}")
        return value

    return read


def _metavar(field: dataclasses.Field[Any], kind: type) -> str:
    return str(field.metadata["metavar"] or _KINDS[kind][0])


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is None or value in ("", ()):
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
