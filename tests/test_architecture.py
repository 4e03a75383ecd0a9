"""The rules of the house: what imports what, what importing does, what is documented, how long things are."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from compression.schedule.pruners.pruner import Pruner
from compression.schedule.pruners.ranked import RankedPruner
from compression.schedule.regularizers.grouped import GroupRegularizer
from compression.schedule.regularizers.regularizer import Regularizer

ROOT = Path(__file__).resolve().parent.parent
# The rooms from the ground up: a room imports only from rooms above it in this table. A room is a folder, or a file beside folders.
ROOMS = {
    "utils/errors.py": "errors that a user can mend",
    "utils/modes.py": "eval mode for a while",
    "utils/arguments.py": "command lines from dataclasses",
    "utils/options.py": "options that a YAML file describes",
    "utils/spec.py": "what a classifier is, as plain data",
    "utils/distributed.py": "several processes as one",
    "utils/files": "checkpoints, YAML files, run folders",
    "utils/measures": "metrics, multiply-adds",
    "utils/data": "image files to batches",
    "utils/loop": "fit and evaluate, hooks, optimizer, EMA, precision",
    "utils/output": "logs, plots, reports",
    "models/quantized": "quantized modules",
    "models/networks": "the networks, and their widths",
    "models/spelling.py": "others' names of tensors to ours",
    "models/state_dicts.py": "a state dict into a network",
    "models/loading.py": "a weights file of any origin to a network",
    "models/backends": "one file a runtime",
    "models/validation.py": "any classifier's file on a split",
    "models/prediction.py": "images to classes",
    "models/writers.py": "what a prediction run saves",
    "compression/tracing": "which channels belong together, and the proofs",
    "compression/layers": "convolutions and linear layers as least squares",
    "compression/scoring": "which channels matter",
    "compression/exporting": "files that run without this project",
    "compression/latency": "how long a narrow network takes",
    "compression/pruning": "how much goes, and the cut",
    "compression/statistics": "what is looked at and changes nothing",
    "compression/structures.py": "filters, channels, rows, blocks of a weight",
    "compression/distillation": "losses, teacher",
    "compression/quantizers": "one file a quantizer",
    "compression/schedule": "a YAML file over the epochs",
    "compression/training": "the run behind train.py",
    "compression/analysis": "what train.py does instead of training",
}
PACKAGES = ("utils", "models", "compression")
SOURCES = sorted(
    path.relative_to(ROOT) for pattern in ("*.py", *(f"{top}/**/*.py" for top in (*PACKAGES, "benchmarks"))) for path in ROOT.glob(pattern)
)
HEAVY = ("torchvision", "timm", "pandas", "matplotlib", "tensorboard", "tensorflow", "thop", "yaml", "scipy", "PIL")
LIGHT = ("models.backends", "models.prediction", "models.writers", "utils.data.sources", "predict", "val", "train")


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def room(module):
    """The folder of a module within its package, or its own file where it lies beside the folders."""
    path = MODULES[module]
    return "/".join(path.parts[:2]) if len(path.parts) > 2 else path.as_posix()


def in_packages(modules):
    return {
        module
        for module in modules
        if MODULES[module].parts[0] in PACKAGES and len(MODULES[module].parts) + (MODULES[module].name != "__init__.py") > 2
    }


@cache
def imports(module):
    """The modules of ours that a module names in an import, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in submodules]
        found |= {name for name in names if name in MODULES}
    return found - {module}


def find_cycle(graph):
    """Return a path that comes back to its start, or an empty list."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for following in sorted(graph[node]):
            if cycle := visit(following):
                return cycle
        done.add(path.pop())
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), [])


def test_the_reader_of_imports_sees_all_of_them():
    assert {
        "utils",
        "utils.errors",
        "models",
        "models.networks.layers",
        "compression.training.compressor",
        "train",
        "val",
        "predict",
    } <= set(MODULES)
    assert {"models.networks.external", "models.networks.yolo", "utils.spec"} <= imports("models.networks")  # the first in a function
    assert "utils.distributed" in imports("train")  # from utils import distributed
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_file_lies_in_a_room_of_the_table():
    assert {room(module) for module in in_packages(MODULES)} == set(ROOMS)


def test_a_room_imports_only_from_rooms_above_it_in_the_table():
    """Rooms that are in such an order have no cycle between them."""
    order = list(ROOMS)
    climbing = {
        f"{module} -> {other}"
        for module in in_packages(MODULES)
        for other in in_packages(imports(module))
        if order.index(room(other)) > order.index(room(module))
    }
    assert climbing == set()


def test_packages_import_no_script_and_no_benchmark():
    outside = set(MODULES) - in_packages(MODULES) - set(PACKAGES)
    assert {f"{module} -> {other}" for module in in_packages(MODULES) for other in imports(module) & outside} == set()


def test_a_package_lists_its_rooms_and_few_files_beside_them():
    beside = {top: sorted(path.name for path in (ROOT / top).glob("*.py") if path.name != "__init__.py") for top in PACKAGES}
    assert beside["compression"] == ["structures.py"]
    assert all(len(files) <= 6 for files in beside.values())


def test_scripts_are_imported_by_nobody():
    scripts = {module for module, path in MODULES.items() if len(path.parts) == 1}
    assert {"train", "val", "predict"} <= scripts
    assert {f"{module} -> {script}" for module in MODULES for script in imports(module) & scripts} == set()


def test_there_is_no_import_cycle_lazy_imports_counted():
    assert find_cycle({module: imports(module) for module in MODULES}) == []


def test_no_name_becomes_code():
    forbidden = ("eval", "exec", "compile", "globals", "__import__")
    calls = [(path, node) for path in SOURCES for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    uses = [f"{path}:{call.lineno} {call.func.id}" for path, call in calls if isinstance(call.func, ast.Name) and call.func.id in forbidden]
    assert len(calls) > 1000
    assert uses == []


def test_files_and_functions_stay_short():
    long = {str(path): lines for path in SOURCES if (lines := len((ROOT / path).read_text().splitlines())) > 300}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 80:
                long[f"{path}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_every_public_function_and_class_says_what_it_does():
    """Methods may go without where their class's docstring says enough or where they override."""
    bare = []
    for path in SOURCES:
        bare += [str(path)] if ast.get_docstring(tree(path)) is None else []
        if path.parts[0] not in PACKAGES:
            continue
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path}:{node.lineno} {node.name}")
    assert bare == []


OBSERVER = """
import json, os, pathlib, random, signal, sys, threading, warnings
import cv2, numpy, torch  # what they do on import is not ours
from importlib import import_module

def world():
    return {
        "environment": dict(os.environ),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "cv2 threads": cv2.getNumThreads(),
        "files": sorted(os.listdir(".")),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "random states": [hash(random.getstate()), torch.initial_seed(), torch.get_rng_state().sum().item(), numpy.random.get_state()[2]],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": threading.active_count(),
        "warning filters": len(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "default type": str(torch.get_default_dtype()),
        "backends": [torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()],
    }

changed = {}

def watch(names):
    before = world()
    for name in names:
        import_module(name)
        after = world()
        for key in before:
            if before[key] != after[key]:
                changed[f"{name}: {key}"] = [str(before[key])[:200], str(after[key])[:200]]
        before = after

watch(sys.argv[1].split())
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import torchvision  # nor what this does
watch(sys.argv[2].split())
pathlib.Path("seen.json").write_text(json.dumps({"changed": changed, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What a new process sees, and prints, that imports first what predict.py, val.py and train.py start with, then every module."""
    folder = tmp_path_factory.mktemp("imported")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", OBSERVER, " ".join(LIGHT), " ".join(MODULES)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in folder.iterdir()] == ["seen.json"]
    return json.loads((folder / "seen.json").read_text())


def test_importing_any_module_changes_nothing_and_prints_nothing(imported):
    assert imported["changed"] == {}


def test_a_script_starts_without_the_libraries_that_it_may_not_need(imported):
    assert set(imported["loaded"]) & set(HEAVY) == set()
    assert {"torch", "train"} <= set(imported["loaded"])


@pytest.mark.parametrize("base", [Pruner, RankedPruner, Regularizer, GroupRegularizer])
def test_a_method_that_leaves_something_out_is_not_made(base):
    forgetful = type("Forgetful", (base,), {})
    with pytest.raises(TypeError, match="abstract method"):
        forgetful()
