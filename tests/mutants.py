"""Mutants of schedules: changed structures, made-up instances, changed text. All drawn from a generator that is given."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import inspect

import torch

from compression.schedule.learning_rates import schedulers
from compression.schedule.policies import PruningOptions
from compression.schedule.pruners import PRUNERS
from compression.schedule.reading import SECTIONS
from compression.schedule.regularizers import REGULARIZERS
from compression.schedule.windows import KEYS

# fmt: off
EXTREMES = [
    -1, 0, 1, 2, 3, 0.5, 1.0, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 10**30, True, False, None, "", "*", "?", "[", "(", "(a+)+",
    "1e-4", "nan", "0x10", "3D", "Rows", "Channels", "Blocks", "Filters", "Max", "Average", "Leader", "a\nb", "\x00", "\ud800", "ä" * 5,
    "x" * 20_000, "fc.weight", "fc.bias", "module.fc.weight", "bn1.weight", "layer1.*", ".*", "(.*)*x", "*.weight", "*bias", "conv1.weight",
    [], [None], [0.1], [1, 2], [[[]]], {}, {"a": {"b": []}}, {"*": 0.5}, {"fc.weight": 0.1}, {1: 2}, {None: None}, {"*": [0.1, "3D"]},
    {"fc.weight": [0.1, "Rows"]}, {"block_shape": [1, 1, 1, 1]}, datetime.date(2001, 1, 1), b"\xff", ["fc.weight", "fc.bias"], [0, 1],
]
WORDS = [
    *PRUNERS, *REGULARIZERS, *schedulers(), *KEYS, *SECTIONS, *(section.kind for section in SECTIONS.values()),
    *PruningOptions.__dataclass_fields__, "class", "args", "instance_name", "version", "policies", "weights", "group_type", "reg_regims",
    "desired_sparsity", "final_sparsity", "initial_sparsity", "sensitivities", "thresholds", "group_dependency", "kwargs", "noise",
    "group_size", "gamma", "step_size", "milestones", "gammas", "T_max", "max_lr", "base_lr", "total_steps", "total_iters", "T_0",
    "threshold_criteria", "levels", "name", "model", "FilterRemover", "ChannelRemover", "KnowledgeDistillation", "sparsity_range",
]
SNIPPETS = [
    '!!python/object/apply:os.system ["touch hacked"]', "!!python/name:os.system", "!!python/object/new:os.system [touch hacked]", "&a",
    "*a", "<<: *a", "&a [*a]", "\t", "\x00", "\x07", "---", "...", "%YAML 9.9", "!!int x", "!!bool x", "!!timestamp x", "!!binary x",
    "!!omap [a: 1]", "? ", ": ", "- ", "{", "}", "[", "]", "'", '"', "#", "|", ">", "@", "`", "\u2028", "\ufeff", "é",
    "!!set {a, b}", "!!float ''", "1:60:60", "2001-99-99", ".inf", ".nan", "~", '"\\ud800"', '"\\x00"',
    "0x" + "f" * 2000, "a: &x [1, 2]", "[" * 100, "{a: " * 60,
]
# fmt: on


def sooner(content, rng):
    """Return a schedule whose policies all act within three epochs."""
    content = copy.deepcopy(content)
    for policy in content["policies"]:
        if "epochs" in policy:
            policy["epochs"] = rng.choice(([0], [1], [2], [1, 2]))
        else:
            policy.update(starting_epoch=rng.choice((0, 0, 1)), ending_epoch=rng.choice((2, 3, 3)), frequency=rng.choice((1, 1, 2)))
    return content


BY_WEIGHT = [{"*": 0.5}, {"layer1.*.conv?.weight": 0.3, "fc.*": 0.1}, {"*": 0, "fc.bias": 0.9}]
# What a made-up instance may be given: mostly plausible.
LIKELY = {
    "weights": [
        ["layer?.?.conv1.weight"],
        ["fc.weight"],
        ["*"],
        ["layer1.*.bn1.weight"],
        ["conv1.weight", "layer1.0.conv1.weight"],
        "*bias",
    ],
    "reg_regims": [{"*": 1e-3}, {"*": [1e-3, "4D"]}, {"fc.weight": [0.5, "Cols"]}, {"*.conv1.weight": [0.3, "Filters"]}, {"*bn1*": 0.1}],
    "group_type": ["Filters", "Filters", "3D", "Channels", "Rows", "Blocks", "2D", "4D"],
    "group_dependency": [None, None, "Leader", "Average"],
    "kwargs": [None, None, {"block_shape": [1, 2, 3, 3]}, {"block_shape": [1, 1, 1, 1]}, {"block_shape": [0, 0, 0, 0]}],
    "rounding_fn": ["floor", "math.floor"],
    "threshold_criteria": ["Max", "Mean_Abs", None],
    "sparsity_range": [[0.1, 0.5], [0.5, 0.1]],
    "final_sparsity": [0.5, 0.9, 0.999],
    "hi_thresh_mult": [0.5, 0.9, 0.999],
    **dict.fromkeys(("thresholds", "sensitivities", "levels"), BY_WEIGHT),
    **{key: [True, False] for key in ("cycle_momentum", "three_phase", "pretrained")},
    "mode": ["min", "max", "triangular", "exp_range"],
    "anneal_strategy": ["cos", "linear"],
    "milestones": [[1], [0, 1], [2, 1], []],
    "gammas": [[0.5], [0.5, 0.1], [0]],
    "resume": ["nothing.pt"],
    "teacher": ["resnet20", "nothing"],
}
WHOLE = ("group_size", "T_max", "step_size", "total_iters", "total_steps", "T_0", "T_mult", "cooldown", "patience", "step_size_up")
NUMBERS = [0, 0.0, 0.1, 0.3, 0.5, 0.9, 0.999, 1, 2, 3, 7, 1e-4, -1, -0.5, 30, True]


def drawn(name, rng):
    """Return a value for an option of that name."""
    if rng.random() < 0.04:
        return copy.deepcopy(rng.choice(EXTREMES))
    likely = [1, 1, 2, 4] if name in WHOLE else [0, 0.1, 0.3, 0.5, 0.9]
    return copy.deepcopy(rng.choice(LIKELY.get(name, likely)))


def invent(content, rng):
    """Replace an instance by one of another class, with values for most of its arguments; draw a policy's args."""
    section = rng.choice([name for name in SECTIONS if content.get(name)])
    if section == "lr_schedulers":
        kind = rng.choice(schedulers())
        made = getattr(torch.optim.lr_scheduler, kind, torch.optim.lr_scheduler.MultiStepLR)
        known = [name for name in inspect.signature(made).parameters if name not in ("optimizer", "last_epoch")]
        required = {name for name, parameter in inspect.signature(made).parameters.items() if parameter.default is parameter.empty}
    else:
        kind = rng.choice(list(SECTIONS[section].classes))
        fields = [field for field in dataclasses.fields(SECTIONS[section].classes[kind]) if "read" in field.metadata]
        known = [field.name for field in fields]
        required = {field.name for field in fields if field.default is dataclasses.MISSING} | {"weights", "group_type", "desired_sparsity"}
    given = {name: drawn(name, rng) for name in known if rng.random() < (0.98 if name in required else 0.2)}
    content[section][rng.choice(list(content[section]))] = {"class": kind, **given}
    for policy in content["policies"]:
        for name in ("pruner", "regularizer"):
            if name in policy and rng.random() < 0.5:
                options = [f.name for f in dataclasses.fields(SECTIONS[f"{name}s"].options) if f.name != "levels"]
                policy[name]["args"] = {option: rng.choice((True, True, False)) for option in options if rng.random() < 0.3}
                policy[name]["args"] |= {"mini_batch_pruning_frequency": 1} if name == "pruner" and rng.random() < 0.5 else {}
    return content


def places(node, found=None):
    """Return (mapping or list, key) of every value in a structure."""
    found = [] if found is None else found
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(value, dict | list):
            places(value, found)
    return found


def mutate(content, rng):
    """Change a structure in one to three places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = rng.choice(places(content) or [({}, 0)])
        other, other_key = rng.choice(places(content) or [({0: 0}, 0)])
        what = rng.randrange(10)
        if what == 0:
            node.pop(key, None) if isinstance(node, dict) else node.pop(key)
        elif what == 1 and isinstance(node, dict):
            node[rng.choice([*WORDS, *(extreme for extreme in EXTREMES if not isinstance(extreme, dict | list))])] = node.pop(key, 0)
        elif what == 1:
            node.insert(key, copy.deepcopy(node[key]))
        elif what == 2:
            node[key] = copy.deepcopy(other.get(other_key) if isinstance(other, dict) else other[other_key])
        elif what == 3 and isinstance(node, dict):
            node[rng.choice(WORDS)] = copy.deepcopy(rng.choice(EXTREMES))
        elif what == 4:
            node[key] = rng.choice(WORDS)
        elif what in (5, 6) and isinstance(node[key], int | float):
            node[key] = rng.choice(NUMBERS)
        else:
            node[key] = copy.deepcopy(rng.choice(EXTREMES))
    return content


def mutate_text(text, rng):
    """Change a file's characters, lines or indentation in one to three places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.split("\n")
        at, spot = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
        what = rng.randrange(7)
        if what == 0:
            text = text[:spot] + chr(rng.choice((*range(1, 256), 0x2028, 0x1F600, 0xFEFF))) + text[spot + 1 :]
        elif what == 1:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif what == 2:
            text = "\n".join([*lines[:at], rng.choice(lines), *lines[at:]])
        elif what == 3:
            lines[at] = " " * rng.randrange(6) + lines[at].lstrip()
            text = "\n".join(lines)
        elif what == 4:
            text = text[:spot]
        else:
            text = text[:spot] + rng.choice(SNIPPETS) + text[spot:]
        text = text or "a"
    return text
