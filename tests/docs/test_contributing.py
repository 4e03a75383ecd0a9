"""What CONTRIBUTING.md and CHANGELOG.md name exists."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import yaml

from tests.conftest import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`\n]+)`")


def test_every_path_exists():
    paths = [code for code in CODE.findall(CONTRIBUTING) if re.fullmatch(r"[\w./-]+", code) and ("/" in code or code.endswith(".py"))]
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_table_is_where_it_says():
    named = re.findall(r"`(\w+)` in `([\w/]+)\.py`", CONTRIBUTING)
    assert len(named) >= 20
    for name, path in named:
        assert hasattr(importlib.import_module(path.removesuffix("/__init__").replace("/", ".")), name), f"{name} in {path}.py"


def test_the_kinds_that_people_look_for_are_there():
    table = CONTRIBUTING.split("## Rooms")[0]
    kinds = ["criterion", "pruner", "quantizer", "regularizer", "runtime", "network", "data", "flag", "export", "optimizer"]
    assert [kind for kind in kinds if not re.search(rf"^\| an?[^|]*\b{kind}|^\| another[^|]*\b{kind}", table, re.MULTILINE)] == []


def test_new_import_paths_of_the_changelog_can_be_imported():
    rows = re.findall(r"^\| `([^|]+)` \| `([^|]+)` \|$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 35
    for name in (name for _, new in rows for name in new.replace("`", "").split(", ")):
        module, _, attribute = name.rpartition(".")
        package = importlib.import_module(module)
        assert hasattr(package, attribute) or importlib.util.find_spec(name), name


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"])
def test_forms_are_sound_yaml(name):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if "body" in content:
        assert {"name", "description", "body"} <= set(content)
        assert len({part["id"] for part in content["body"]}) == len(content["body"])
    else:
        assert [hook["id"] for hook in content["repos"][0]["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
