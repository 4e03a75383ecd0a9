"""Read a schedule: YAML -> checked instances and policies. Nothing in the file is executed, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compression.quantizers import QUANTIZERS, Quantizer
from compression.schedule.distillation_policy import KnowledgeDistillation
from compression.schedule.learning_rates import DescribedRates
from compression.schedule.policies import PruningOptions, RegularizingOptions
from compression.schedule.pruners import PRUNERS
from compression.schedule.regularizers import REGULARIZERS
from compression.schedule.schedule import PolicyEntry, Schedule
from compression.schedule.thinning import EXTENSIONS
from compression.schedule.windows import KEYS, read_window
from utils.errors import UserError, nearest
from utils.files.yaml_files import read_yaml
from utils.options import Place, build, mapping, one_line, shown

VERSION = 1
LONGEST_NAME = 100  # of an instance, so that messages and tables remain readable
OLD_NAMES = {"bits_overrides": "overrides"}  # of arguments, in Distiller's early files
INJECTED = ("name", "model", "optimizer", "last_epoch")  # Distiller passes them to constructors; a file need not give them

_LEARNED = "is of reinforcement learning (AMC), which is not done here: prune.py spreads a budget by measured damage"
NOT_DONE = {"network": _LEARNED, "rl_lib": _LEARNED, "reinforcement_learning": _LEARNED}  # sections of Distiller's other files

Instances = Mapping[str, tuple[str, Any]]  # name -> name of the class, instance


@dataclass(frozen=True)
class NoOptions:
    """The ``args`` of a policy that takes none."""


@dataclass(frozen=True)
class Section:
    """A section of the file.

    Attributes:
        kind: the key by which a policy refers to one of its instances.
        classes: by name; learning-rate schedulers have their own table.
        options: of the policy's ``args``.
        ignored: arguments in old files that have no meaning here.
        endless: whether a policy may leave out the window's end.
        finish: turns an instance of the class into what the policy takes.
    """

    kind: str
    classes: Mapping[str, type]
    options: type = NoOptions
    ignored: tuple[str, ...] = ()
    endless: bool = False
    finish: Callable[[Any], Any] = lambda instance: instance


SECTIONS = {
    "pruners": Section("pruner", PRUNERS, PruningOptions),
    "regularizers": Section("regularizer", REGULARIZERS, RegularizingOptions),
    "quantizers": Section("quantizer", QUANTIZERS, endless=True),
    "lr_schedulers": Section("lr_scheduler", {}, endless=True),
    "extensions": Section("extension", EXTENSIONS, ignored=("arch", "dataset", "layer_names")),
    "distillers": Section("distiller", {"KnowledgeDistillation": KnowledgeDistillation}, endless=True, finish=KnowledgeDistillation.flags),
}
KINDS = {section.kind: name for name, section in SECTIONS.items()}


def read_schedule(path: str | Path, parameters: Mapping[str, int]) -> Schedule:
    """Read a schedule for a network.

    Args:
        path: the file.
        parameters: names of the network's parameters, and their numbers of dimensions.

    Raises:
        UserError: something in the file is unknown, missing, has a wrong value, or matches no parameter. The message names
            the place in the file.
    """
    notes: list[str] = []
    content = read_yaml(Path(path), "schedule", notes)
    try:
        return replace(parse_schedule(content, parameters, str(path)), notes=notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_schedule(content: Mapping[str, Any], parameters: Mapping[str, int], source: str = "") -> Schedule:
    """Check a schedule's content; see ``read_schedule``."""
    matches: dict[str, list[str]] = {}
    root = Place("", parameters, matches)
    known = ["version", *SECTIONS, "policies"]
    for name in content:
        if name in NOT_DONE:
            raise UserError(f"the section '{name}' {NOT_DONE[name]}")
        if name not in known:
            raise UserError(one_line(f"unknown section {shown(name)}.{nearest(str(name), known)} Valid: {', '.join(known)}"))
    if content.get("version", VERSION) not in (VERSION, str(VERSION)):
        raise UserError(f"version is {shown(content['version'])}; this reads version {VERSION}")
    instances = {name: _instances(name, content.get(name), root / name) for name in SECTIONS}
    if len(instances["quantizers"]) > 1:
        raise UserError(f"quantizers: there can be one, not {len(instances['quantizers'])}")
    policies = content.get("policies")
    if not isinstance(policies, list) or not policies:
        raise UserError(f"'policies' must be a list that says what acts when, not {shown(policies)}")
    entries = [_policy(item, instances, root / "policies" / i) for i, item in enumerate(policies)]
    used = {(KINDS[entry.kind], entry.name) for entry in entries}
    unused = [f"{section}.{name}" for section in SECTIONS for name in instances[section] if (section, name) not in used]
    return Schedule(source, entries, matches, unused)


def read_quantizer(path: Path) -> Quantizer:
    """Read a file that describes one quantizer and no policies.

    Raises:
        UserError: it contains something else, or see ``read_schedule``.
    """
    content = read_yaml(path, "quantizer")
    if extra := [name for name in content if name not in ("version", "quantizers")]:
        raise UserError(one_line(f"{path}: {shown(extra[0])} does not belong there; valid: version, quantizers"))
    try:
        found = _instances("quantizers", content.get("quantizers"), Place("quantizers", {}, {}))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(found) != 1:
        raise UserError(f"{path}: quantizers: there must be one, not {len(found)}")
    ((_, quantizer),) = found.values()
    assert isinstance(quantizer, Quantizer)
    return quantizer


def _instances(section: str, entries: Any, place: Place) -> Instances:
    """Make the instances of a section, by name; a policy may refer to the name 1 as '1'."""
    found: dict[str, tuple[str, Any]] = {}
    for key, values in (mapping(entries, place) if entries is not None else {}).items():
        if not str(key).isprintable() or not 0 < len(str(key)) <= LONGEST_NAME:
            raise place.error(f"the name {shown(key)} must be one line of at most {LONGEST_NAME} characters")
        if str(key) in found:
            raise place.error(f"the name '{key}' is used twice")
        found[str(key)] = _instance(section, values, place / str(key))
    return found


def _instance(section_name: str, values: Any, place: Place) -> tuple[str, Any]:
    """Make an instance of one of a section's classes; return the class's name too."""
    section = SECTIONS[section_name]
    given = dict(mapping(values, place))
    if "class" not in given:
        raise place.error("'class' is missing")
    class_name = given.pop("class")
    given = {OLD_NAMES.get(key, key): value for key, value in given.items() if key not in INJECTED}
    if section_name == "lr_schedulers":
        return class_name, DescribedRates(class_name, given, place)
    if not isinstance(class_name, str) or class_name not in section.classes:
        near, valid = nearest(str(class_name), section.classes), ", ".join(section.classes)
        raise (place / "class").error(f"unknown {section.kind} {shown(class_name)}.{near} Valid: {valid}")
    return class_name, section.finish(build(section.classes[class_name], given, place, section.ignored))


def _policy(item: Any, instances: Mapping[str, Instances], place: Place) -> PolicyEntry:
    """Check one entry of ``policies``."""
    policy = mapping(item, place)
    _check_keys(policy, [*KINDS, *KEYS], place)
    given = [key for key in policy if key in KINDS]
    if len(given) != 1:
        raise place.error(f"must name one of {', '.join(KINDS)}, not {len(given)}")
    kind = given[0]
    section, known, inner = SECTIONS[KINDS[kind]], instances[KINDS[kind]], place / kind
    description = mapping(policy[kind], inner)
    _check_keys(description, ["instance_name", "args"], inner)
    if "instance_name" not in description:
        raise inner.error("'instance_name' is missing")
    name = str(description["instance_name"])
    if name not in known:
        raise (inner / "instance_name").error(
            f"no {shown(name)} under {KINDS[kind]}.{nearest(name, known)} There: {', '.join(known) or 'nothing'}"
        )
    class_name, instance = known[name]
    options: Any = build(section.options, description.get("args"), inner / "args")
    if isinstance(options, PruningOptions) and options.levels is not None:
        if not hasattr(instance, "levels"):
            raise (inner / "args" / "levels").error(f"{class_name} has no levels")
        instance = replace(instance, levels=options.levels)  # a copy: other policies keep the file's levels
    return PolicyEntry(kind, name, class_name, instance, read_window(policy, place, section.endless), options)


def _check_keys(given: Mapping[Any, Any], valid: list[str], place: Place) -> None:
    for key in given:
        if key not in valid:
            raise place.error(f"unknown key '{key}'.{nearest(str(key), valid)} Valid: {', '.join(valid)}")
