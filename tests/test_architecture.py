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

from compression.pruners.pruner import Pruner
from compression.pruners.ranked import RankedPruner
from compression.regularizers.grouped import GroupRegularizer
from compression.regularizers.regularizer import Regularizer

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"utils": 1, "models": 2, "compression": 3, "benchmarks": 4}
SCRIPT_FLOOR = 4
SOURCES = sorted(path.relative_to(ROOT) for pattern in ("*.py", *(f"{floor}/**/*.py" for floor in FLOORS)) for path in ROOT.glob(pattern))
HEAVY = ("torchvision", "timm", "pandas", "matplotlib", "tensorboard", "tensorflow", "thop", "yaml", "scipy", "PIL")


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def floor(module):
    return FLOORS.get(module.split(".")[0], SCRIPT_FLOOR)


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
    assert {"utils", "utils.errors", "models", "models.layers", "compression.compressor", "train", "val", "predict"} <= set(MODULES)
    assert {"models.external", "models.yolo", "utils.spec"} <= imports("models")  # models.external is imported in a function
    assert "utils.distributed" in imports("train")  # from utils import distributed
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_file_imports_from_its_own_package_and_the_floors_below_only():
    climbing = {
        f"{module} -> {other}"
        for module in MODULES
        for other in imports(module)
        if floor(other) > floor(module) or (floor(other) == floor(module) and other.split(".")[0] != module.split(".")[0])
    }
    assert climbing == set()


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
        if path.parts[0] not in ("utils", "models", "compression"):
            continue
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path}:{node.lineno} {node.name}")
    assert bare == []


OBSERVER = """
import json, os, pathlib, random, signal, sys, threading, warnings
import cv2, numpy, torch, torchvision  # what they do on import is not ours
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

changed, before = {}, world()
for name in sys.argv[1:]:
    import_module(name)
    after = world()
    for key in before:
        if before[key] != after[key]:
            changed[f"{name}: {key}"] = [str(before[key])[:200], str(after[key])[:200]]
    before = after
pathlib.Path("changed.json").write_text(json.dumps(changed))
"""


def python(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_importing_any_module_changes_nothing_and_prints_nothing(tmp_path):
    done = python(tmp_path, "-c", OBSERVER, *MODULES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "changed.json").read_text()) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["changed.json"]


@pytest.mark.parametrize(
    "entry", [["models.backends", "models.prediction", "models.writers", "utils.sources"], ["predict", "val"], ["train"]]
)
def test_a_script_starts_without_the_libraries_that_it_may_not_need(entry, tmp_path):
    report = f"import sys; print(sorted(set({HEAVY}) & {{name.split('.')[0] for name in sys.modules}}))"
    done = python(tmp_path, "-c", f"import {', '.join(entry)}; {report}")
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("base", [Pruner, RankedPruner, Regularizer, GroupRegularizer])
def test_a_method_that_leaves_something_out_is_not_made(base):
    forgetful = type("Forgetful", (base,), {})
    with pytest.raises(TypeError, match="abstract method"):
        forgetful()
