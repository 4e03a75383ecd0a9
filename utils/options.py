"""Options in YAML files: declared on a dataclass, checked when the file is read.

A field declares what it accepts::

    @dataclass
    class SensitivityPruner(Pruner):
        sensitivities: dict[str, float] = option(by_parameter(number(least=0)))

``build`` makes an instance from a mapping; its errors name the place in the file, the value and the valid choices.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.errors import UserError, nearest

T = TypeVar("T")
LONGEST_PATTERN = 200
LONGEST_MESSAGE = 1_000
MOST_STEPS = 200_000
WRAPPERS = ("module", "_orig_mod")  # what DataParallel, DDP and torch.compile add to names


@dataclass(frozen=True)
class Place:
    """The place of a value in a file, and the parameters to which it may refer.

    Attributes:
        path: "pruners.my_pruner.weights[2]".
        parameters: the network's parameters: name -> number of dimensions.
        matches: the names that each pattern matched, by place; filled while reading.
    """

    path: str
    parameters: Mapping[str, int]
    matches: dict[str, list[str]]

    def __truediv__(self, key: object) -> Place:
        path = f"{self.path}[{key}]" if isinstance(key, int) else f"{self.path}.{key}" if self.path else f"{key}"
        return dataclasses.replace(self, path=path)

    def error(self, message: str) -> UserError:
        """Return an error about this place."""
        return UserError(one_line(f"{self.path}: {message}"))


Reader = Callable[[Any, Place], Any]


def option(read: Reader, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field; without a default it is required."""
    return dataclasses.field(default=default, metadata={"read": read})


def build(kind: type[T], values: Any, place: Place, ignored: Sequence[str] = ()) -> T:
    """Make an instance from the options in a file.

    Args:
        kind: a dataclass whose fields are declared with ``option``. Its ``not_done``, if it has it, says of other tools'
            arguments why they have no counterpart here.
        values: a mapping from option to value, or None.
        place: the place of the values.
        ignored: further options, which are accepted without effect.

    Raises:
        UserError: an option is unknown, missing or has a wrong value, or the instance refuses a combination.
    """
    given = dict(mapping(values, place)) if values is not None else {}
    fields = {field.name: field for field in dataclasses.fields(kind) if "read" in field.metadata}  # type: ignore[arg-type]
    not_done, chosen = getattr(kind, "not_done", {}), {}
    for name, value in given.items():
        if name in fields:
            chosen[name] = fields[name].metadata["read"](value, place / name)
        elif name in not_done:
            raise place.error(f"'{name}' {not_done[name]}")
        elif name not in ignored:
            raise place.error(f"unknown argument '{name}'.{nearest(str(name), fields)} Valid: {', '.join(fields) or 'none'}")
    for name, field in fields.items():
        if name not in chosen and field.default is dataclasses.MISSING:
            raise place.error(f"'{name}' is missing")
    try:
        return kind(**chosen)
    except UserError as error:
        raise place.error(str(error)) from None


def mapping(value: Any, place: Place) -> Mapping[Any, Any]:
    """Accept a mapping."""
    if not isinstance(value, Mapping):
        raise place.error(f"must be a mapping, not {shown(value)}")
    return value


def number(least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf) -> Reader:
    """Accept a finite number within bounds: ``least`` and ``most`` are inclusive, ``above`` and ``below`` exclusive."""
    bounds = (("at least", least, -math.inf), ("at most", most, math.inf), ("above", above, -math.inf), ("below", below, math.inf))
    limits = " and ".join(f"{words} {bound:g}" for words, bound, default in bounds if bound != default)

    def read(value: Any, place: Place) -> float:
        if isinstance(value, str):  # in YAML 1.1, 1e-4 is a string
            try:
                value = float(value)
            except ValueError:
                raise place.error(f"must be a number, not {shown(value)}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise place.error(f"must be a number, not {shown(value)}")
        if not (least <= value <= most and above < value < below):
            raise place.error(f"is {value:g}; it must be {limits}")
        return float(value)

    return read


def integer(least: int = 0, most: int = 10**9) -> Reader:
    """Accept a whole number within bounds."""

    def read(value: Any, place: Place) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise place.error(f"must be a whole number, not {shown(value)}")
        if not least <= value <= most:
            raise place.error(f"is {value}; it must be at least {least}" + (f" and at most {most}" if most < 10**9 else ""))
        return value

    return read


def boolean(value: Any, place: Place) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise place.error(f"must be true or false, not {shown(value)}")
    return value


def text(value: Any, place: Place) -> str:
    """Accept a string."""
    if not isinstance(value, str):
        raise place.error(f"must be text, not {shown(value)}")
    return value


def choice(*choices: str | None) -> Reader:
    """Accept one of these words, in any case; None among them allows an empty value."""
    words = [word for word in choices if word is not None]
    by_lower = {word.lower(): word for word in words}

    def read(value: Any, place: Place) -> str | None:
        if value is None and None in choices:
            return None
        if isinstance(value, str) and (found := value if value in words else by_lower.get(value.lower())):
            return found
        raise place.error(f"is {shown(value)}.{nearest(str(value), words)} Valid: {', '.join(words)}")

    return read


def optional(reader: Reader) -> Reader:
    """Accept an empty value, or what the reader accepts."""
    return lambda value, place: None if value is None else reader(value, place)


def listed(reader: Reader, length: int | None = None) -> Reader:
    """Accept a non-empty list of what the reader accepts, of a given length if there is one."""

    def read(value: Any, place: Place) -> tuple[Any, ...]:
        if not isinstance(value, list) or (len(value) != length if length else not value):
            raise place.error(f"must be a list{f' of {length}' if length else ', not empty'}, not {shown(value)}")
        return tuple(reader(item, place / i) for i, item in enumerate(value))

    return read


def parameters(value: Any, place: Place) -> tuple[str, ...]:
    """Accept a list of patterns of parameter names, or one; return the matching names once each, in the list's order."""
    found: dict[str, None] = {}
    for i, pattern in enumerate(value if isinstance(value, list) else [value]):
        found |= dict.fromkeys(match(pattern, place / i))
    if not found:
        raise place.error("is empty; it must name parameters")
    return tuple(found)


def by_parameter(reader: Reader) -> Reader:
    """Accept a mapping from patterns of parameter names to values; return a mapping from names to values.

    '*' is the default for weights that no other entry matches. An exact name takes precedence over a pattern; two
    patterns that match the same parameter are an error, so that none silently wins.
    """

    def read(value: Any, place: Place) -> dict[str, Any]:
        entries = mapping(value, place)
        if not entries:
            raise place.error("is empty; it must name parameters")
        found: dict[str, Any] = {}
        by_pattern: dict[str, str] = {}
        bare = {plain(name) for name in place.parameters}
        exact = {pattern for pattern in entries if isinstance(pattern, str) and plain(pattern) in bare}
        for pattern, item in entries.items():
            if pattern == "*":
                continue
            taken = reader(item, place / pattern)
            for name in match(pattern, place / pattern):
                if name in by_pattern and (pattern in exact) == (by_pattern[name] in exact):
                    raise place.error(f"'{by_pattern[name]}' and '{pattern}' both match {name}")
                if name not in by_pattern or pattern in exact:
                    found[name], by_pattern[name] = taken, pattern
        if "*" in entries:
            taken = reader(entries["*"], place / "*")
            rest = [name for name in match("*", place / "*") if name not in found]
            found |= dict.fromkeys(rest, taken)
            place.matches[(place / "*").path] = rest
        return {name: found[name] for name in place.parameters if name in found}

    return read


def match(pattern: Any, place: Place) -> list[str]:
    """Return the names of the parameters that a pattern matches.

    A pattern is tried as a name, with and without ``module.``; then with ``*``, ``?``, ``[...]`` as in a shell; then as a
    regular expression. A bare '*' matches all weights of two or more dimensions.

    Raises:
        UserError: nothing matches.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise place.error(f"must be the name or pattern of parameters, not {shown(pattern)}")
    known = list(place.parameters)
    if pattern == "*":
        found = [name for name, dims in place.parameters.items() if dims > 1]
    else:
        bare = plain(pattern)
        found = [name for name in known if name == pattern] or [name for name in known if plain(name) == bare]
        found = found or [name for name in known if fnmatch.fnmatchcase(plain(name), bare)] or _by_expression(pattern, known, place)
    if not found:
        theirs = "; Distiller's names are those of --model vgg16_cifar, mobilenet and the like" if plain(pattern) != pattern else ""
        raise place.error(f"'{pattern}' matches no parameter.{nearest(plain(pattern), known)} The network has {len(known)}{theirs}")
    place.matches[place.path] = found
    return found


def _by_expression(pattern: str, known: list[str], place: Place) -> list[str]:
    if _costly(pattern):
        raise place.error(f"{shown(pattern)} matches no name, and as a regular expression it may take very long; use fewer repeats")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets whose meaning may change in a later Python
            expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return []
    spellings = ((name, spelling) for name in known for spelling in (plain(name), f"module.{plain(name)}"))
    return list(dict.fromkeys(name for name, spelling in spellings if expression.fullmatch(spelling)))


def _costly(pattern: str) -> bool:
    """Whether trying a regular expression on a name may take more than about a millisecond.

    A backtracking matcher takes exponential time for a repeat or a choice inside a repeat, and about 20^n steps for n repeats
    in a row on names of this length.
    """
    bare = re.sub(r"\\.", "a", pattern, flags=re.DOTALL)
    bare = re.sub(r"\(\?", "(", re.sub(r"\[\^?\]?[^\]]*\]", "a", bare))
    repeat = r"(?:[*+?]|\{[\d,]*\})"
    steps = 20.0 ** len(re.findall(f"{repeat}[+?]?", bare))
    while (inner := re.search(rf"\(([^()]*)\)({repeat}?)", bare)) is not None:
        choices = inner[1].count("|") + 1
        varies = choices > 1 or re.search(repeat, inner[1])
        if varies and inner[2] not in ("", "?"):
            return True
        steps *= choices
        bare = bare[: inner.start()] + ("a*" if varies else "a") + bare[inner.end() :]  # what varies inside makes its surroundings vary
    return steps > MOST_STEPS


def plain(name: str) -> str:
    """Return a parameter's name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def one_line(message: str) -> str:
    """Return a message on one line, shortened, with unprintable characters escaped."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}..."


def shown(value: Any) -> str:
    """Return a value for a message, on one line, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
