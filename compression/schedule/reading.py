"""Read a schedule: YAML -> checked instances and policies. Nothing of the file is run, and nothing in it is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compression.quantizers import QUANTIZERS, Quantizer
from compression.schedule.distillation_policy import KnowledgeDistillation
from compression.schedule.learning_rates import PLATEAU, Plateau, check_class, learning_rates
from compression.schedule.policies import PruningOptions, RegularizingOptions
from compression.schedule.pruners import PRUNERS
from compression.schedule.regularizers import REGULARIZERS
from compression.schedule.thinning import EXTENSIONS
from compression.schedule.windows import KEYS, Window, read_window
from utils.errors import UserError, nearest
from utils.files.yaml_files import read_yaml
from utils.options import Place, build, mapping, one_line, shown

VERSION = 1
LONGEST_NAME = 100  # of an instance; its messages and tables stay readable
INJECTED = ("name", "model", "optimizer", "last_epoch")  # what Distiller hands to a constructor; a file need not


@dataclass(frozen=True)
class NoOptions:
    """The ``args`` of a policy that takes none."""


@dataclass(frozen=True)
class Section:
    """A section of the file.

    Attributes:
        kind: what a policy calls one of its instances.
        classes: by name; learning rates have their own table.
        options: of the policy's ``args``.
        ignored: arguments of old files that mean nothing here.
        endless: whether a policy may leave the window's end out.
    """

    kind: str
    classes: Mapping[str, type]
    options: type = NoOptions
    ignored: tuple[str, ...] = ()
    endless: bool = False


SECTIONS = {
    "pruners": Section("pruner", PRUNERS, PruningOptions),
    "regularizers": Section("regularizer", REGULARIZERS, RegularizingOptions),
    "quantizers": Section("quantizer", QUANTIZERS, endless=True),
    "lr_schedulers": Section("lr_scheduler", {}, endless=True),
    "extensions": Section("extension", EXTENSIONS, ignored=("thinning_func_str", "arch", "dataset", "layer_names")),
    "distillers": Section("distiller", {"KnowledgeDistillation": KnowledgeDistillation}, endless=True),
}


@dataclass(frozen=True)
class Rates:
    """A learning-rate scheduler as the file describes it; the rates follow once the optimizer is known."""

    class_name: str
    arguments: Mapping[str, Any]
    place: Place

    def of(self, base_lrs: list[float], epochs: int) -> list[list[float]] | Plateau:
        """Return the rates by epoch, for groups of these initial rates; or what watches the validation."""
        if self.class_name == PLATEAU:
            return Plateau(self.arguments, base_lrs, self.place)
        return learning_rates(self.class_name, self.arguments, base_lrs, epochs, self.place)


@dataclass(frozen=True)
class Entry:
    """One policy of the file: which instance acts when, and how."""

    kind: str
    name: str
    class_name: str
    instance: Any
    window: Window
    options: Any = None


@dataclass
class Schedule:
    """A schedule that has been checked.

    Attributes:
        source: the file, for messages.
        entries: policies in the file's order, those of learning rates last.
        matches: place in the file -> parameters that the pattern there matched.
        unused: instances that no policy uses.
    """

    source: str = ""
    entries: list[Entry] = field(default_factory=list)
    matches: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Entry]:
        """Return the policies of some kinds."""
        return [entry for entry in self.entries if entry.kind in kinds]

    def describe(self) -> list[str]:
        """Return lines that say what acts when, and which parameters each pattern matched."""
        lines = [f"{entry.kind} {entry.name}: {entry.class_name}, {entry.window}" for entry in self.entries]
        for path, names in self.matches.items():
            few = ", ".join(names[:3]) + (f" ... {names[-1]} ({len(names)})" if len(names) > 3 else "")
            lines.append(f"{path} -> {few or 'nothing that another entry leaves'}")
        return [*lines, *(f"{name} is described, but no policy uses it" for name in self.unused)]


def read_schedule(path: str | Path, parameters: Mapping[str, int]) -> Schedule:
    """Read a schedule for a network.

    Args:
        path: the file.
        parameters: names of the network's parameters, and their numbers of dimensions.

    Raises:
        UserError: something in the file is unknown, missing, of a wrong value, or names no parameter. The message names
            the place in the file.
    """
    content = read_yaml(Path(path), "schedule")
    try:
        return parse_schedule(content, parameters, str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_schedule(content: Mapping[str, Any], parameters: Mapping[str, int], source: str = "") -> Schedule:
    """Check a schedule's content; see ``read_schedule``."""
    matches: dict[str, list[str]] = {}
    root = Place("", parameters, matches)
    known = ["version", *SECTIONS, "policies"]
    for name in content:
        if name not in known:
            raise UserError(one_line(f"unknown section {shown(name)}.{nearest(str(name), known)} Valid: {', '.join(known)}"))
    if content.get("version", VERSION) not in (VERSION, str(VERSION)):
        raise UserError(f"version is {shown(content['version'])}; this reads version {VERSION}")
    instances: dict[str, dict[str, tuple[str, Any]]] = {}
    for name, section in SECTIONS.items():
        instances[name] = _instances(section, name, content.get(name), root / name)
    if len(instances["quantizers"]) > 1:
        raise UserError(f"quantizers: there can be one, not {len(instances['quantizers'])}")
    policies = content.get("policies")
    if not isinstance(policies, list) or not policies:
        raise UserError(f"'policies' must be a list that says what acts when, not {shown(policies)}")
    found = [_policy(item, instances, root / "policies" / i) for i, item in enumerate(policies)]
    used = {(entry.kind, entry.name) for entry in found}
    unused = [f"{name}.{key}" for name, section in SECTIONS.items() for key in instances[name] if (section.kind, key) not in used]
    last = [entry for entry in found if entry.kind == "lr_scheduler"]
    return Schedule(source, [*(entry for entry in found if entry not in last), *last], matches, unused)


def read_quantizer(path: Path) -> Quantizer:
    """Read a file that describes one quantizer and no policies.

    Raises:
        UserError: it holds something else, or see ``read_schedule``.
    """
    content = read_yaml(path, "quantizer")
    if extra := [name for name in content if name not in ("version", "quantizers")]:
        raise UserError(one_line(f"{path}: {shown(extra[0])} has no place in it; valid: version, quantizers"))
    try:
        found = _instances(SECTIONS["quantizers"], "quantizers", content.get("quantizers"), Place("", {}, {}) / "quantizers")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(found) != 1:
        raise UserError(f"{path}: quantizers: there must be one, not {len(found)}")
    ((_, quantizer),) = found.values()
    assert isinstance(quantizer, Quantizer)
    return quantizer


def _instances(section: Section, name: str, entries: Any, place: Place) -> dict[str, tuple[str, Any]]:
    """Make the instances of a section, by name; a policy may write a name 1 as '1'."""
    found: dict[str, tuple[str, Any]] = {}
    for key, values in (mapping(entries, place) if entries is not None else {}).items():
        if not str(key).isprintable() or not 0 < len(str(key)) <= LONGEST_NAME:
            raise place.error(f"the name {shown(key)} must be one line of at most {LONGEST_NAME} characters")
        if str(key) in found:
            raise place.error(f"there are two of the name '{key}'")
        found[str(key)] = _instance(section, name, values, place / str(key))
    return found


def _instance(section: Section, name: str, values: Any, place: Place) -> tuple[str, Any]:
    """Make an instance of a class that a section may name; return the class's name too."""
    given = dict(mapping(values, place))
    if "class" not in given:
        raise place.error("'class' is missing")
    class_name = given.pop("class")
    given = {key: value for key, value in given.items() if key not in INJECTED}
    if name == "lr_schedulers":
        check_class(class_name, place)
        rates = Rates(class_name, given, place)
        rates.of([0.1], 1)  # so that a wrong argument is found here
        return class_name, rates
    if not isinstance(class_name, str) or class_name not in section.classes:
        valid = ", ".join(section.classes) or "none in this version"
        raise (place / "class").error(
            f"unknown {section.kind} {shown(class_name)}.{nearest(str(class_name), section.classes)} Valid: {valid}"
        )
    return class_name, build(section.classes[class_name], given, place, section.ignored)


def _policy(item: Any, instances: Mapping[str, Mapping[str, tuple[str, Any]]], place: Place) -> Entry:
    """Check one entry of ``policies``."""
    policy = mapping(item, place)
    kinds = {section.kind: name for name, section in SECTIONS.items()}
    given = [key for key in policy if key in kinds]
    for key in policy:
        if key not in kinds and key not in KEYS:
            valid = [*kinds, *KEYS]
            raise place.error(f"unknown key '{key}'.{nearest(str(key), valid)} Valid: {', '.join(valid)}")
    if len(given) != 1:
        raise place.error(f"must name one of {', '.join(kinds)}, not {len(given)}")
    kind = given[0]
    section, known = SECTIONS[kinds[kind]], instances[kinds[kind]]
    inner = mapping(policy[kind], place / kind)
    for key in inner:
        if key not in ("instance_name", "args"):
            raise (place / kind).error(f"unknown key '{key}'.{nearest(str(key), ('instance_name', 'args'))} Valid: instance_name, args")
    if "instance_name" not in inner:
        raise (place / kind).error("'instance_name' is missing")
    name = str(inner["instance_name"])
    if name not in known:
        raise (place / kind / "instance_name").error(
            f"no {shown(name)} under {kinds[kind]}.{nearest(name, known)} There: {', '.join(known) or 'nothing'}"
        )
    options: Any = build(section.options, inner.get("args"), place / kind / "args")
    class_name, instance = known[name]
    return Entry(kind, name, class_name, instance, read_window(policy, place, section.endless), options)


def with_entry(schedule: Schedule, entry: Entry) -> Schedule:
    """Return a schedule with one more policy, which acts before those of learning rates."""
    rates = schedule.of("lr_scheduler")
    others = [other for other in schedule.entries if other.kind != "lr_scheduler"]
    return replace(schedule, entries=[*others, entry, *rates])
