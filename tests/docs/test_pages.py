"""The pages say what is true: links and paths exist, commands and flags parse, examples run, the README is short."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from compression.schedule.reading import read_schedule
from docs.generate import SCRIPTS
from tests.conftest import ROOT
from tests.docs.conftest import PAGES, blocks
from utils.arguments import make_parser, parse
from utils.errors import UserError

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:srcset|src)=\"([^\"]+)\"")
CODE = re.compile(r"`([^`\n]+)`")
WRITTEN = [page for page in PAGES if page.name != "flags.md"]  # by hand


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def commands(path):
    """Every command of a page that starts a script of ours: lines of its blocks, and code within the text."""
    text = path.read_text(encoding="utf-8")
    lines = [line.split(" # ")[0] for block in blocks(path, "") for line in block.splitlines()]
    lines += CODE.findall(text)
    return [line.strip() for line in lines if re.match(r"(python|torchrun .*?) \w+\.py( |$)", line.strip())]


def heading_anchors(path):
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    for link in (first or second for first, second in LINK.findall(page.read_text(encoding="utf-8"))):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in heading_anchors(target), link


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_command_parses(page):
    for command in commands(page):
        words = shlex.split(command)
        script = next(word for word in words if word.endswith(".py"))
        parse(SCRIPTS[script], "", words[words.index(script) + 1 :])


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_path_in_a_command_that_the_repository_should_have_is_there(page):
    for command in commands(page):
        for word in shlex.split(command):
            if word.startswith(("data/", "weights/digits", "models/", "docs/")):
                assert (ROOT / word).exists(), command


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 14
    assert len([command for page in WRITTEN for command in commands(page)]) >= 45


OTHERS = {"--nproc_per_node", "--nnodes", "--help"}  # torchrun's, argparse's
DISTILLERS = {"--arch", "--lr", "--etes"}  # named beside ours


def test_every_flag_that_is_named_exists():
    known = {option for arguments in SCRIPTS.values() for action in make_parser(arguments, "")._actions for option in action.option_strings}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", benchmark.read_text(encoding="utf-8")))
    known |= OTHERS | DISTILLERS
    for page in WRITTEN:
        for code in [*CODE.findall(page.read_text(encoding="utf-8")), *blocks(page, "")]:
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?!\*|[\w-])", code):
                assert flag in known or flag.endswith("-"), f"{page.name}: {flag}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_module_that_is_run_exists(page):
    for module in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8")):
        if module.split(".")[0] in ("benchmarks", "utils", "docs", "tests") and not module.isupper():
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_readme_is_short_and_names_both_make_targets():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(text.splitlines()) <= 150
    assert set(re.findall(r"make (\w+)", text)) == {"demo", "test"}
    assert set(re.findall(r"`make ([\w-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))) | {"demo"} <= set(targets)


def test_the_schedule_of_the_page_has_the_timeline_of_the_page(script, tmp_path):
    page = ROOT / "docs" / "schedules.md"
    (tmp_path / "schedule.yaml").write_text(blocks(page, "yaml")[0])
    shown = script("train.py", "--model", "resnet20", "--epochs", "10", "--compress", "schedule.yaml", "--dry-run")
    assert shown.code == 0, shown.err
    assert blocks(page, "text")[0].rstrip() in shown.out


def test_the_classes_of_the_schedule_page_are_those_of_the_tables():
    from compression.quantizers import QUANTIZERS
    from compression.schedule.pruners import PRUNERS
    from compression.schedule.regularizers import REGULARIZERS
    from compression.schedule.thinning import EXTENSIONS

    text = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    classes = {name.removesuffix("_AGP") for name in (*PRUNERS, *REGULARIZERS, *QUANTIZERS, *EXTENSIONS)}
    assert {name for name in classes if f"`{name}`" not in text} == set()


def test_the_criteria_of_the_pruning_page_are_those_of_the_table():
    from compression.scoring.criteria import CRITERIA

    table = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8").split("| criterion |")[1].split("\n\n")[0]
    assert {name for row in table.splitlines() for name in CODE.findall(row.split("|")[1] if "|" in row else "")} == set(CRITERIA)


def test_the_entries_of_the_pruning_page_are_those_of_the_table():
    from compression.pruning.hrank_entries import HRANK_ENTRIES

    table = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8").split("| network | entries |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    shown = {CODE.findall(name)[0]: entries for name, entries in rows}
    assert shown.pop("resnet20") == "3 + blocks"  # and so to resnet110
    assert [len(HRANK_ENTRIES[f"resnet{depth}"]()) for depth in (20, 56, 110)] == [3 + 9, 3 + 27, 3 + 54]
    assert shown == {name: str(len(layout())) for name, layout in HRANK_ENTRIES.items() if name == "resnet50" or "resnet" not in name}


REFUSED = {  # what the page says does not run -> a file's content, and a part of the error
    "`quantize_inputs`": (
        "quantizers: {q: {class: PostTrainLinearQuantizer, overrides: {fc: {quantize_inputs: false}}}}\n"
        "policies: [{quantizer: {instance_name: q}, epochs: [0]}]\n",
        "'quantize_inputs' is not done",
    ),
    "names of a network": (
        "pruners: {p: {class: SensitivityPruner, sensitivities: {features.4.0.0.0.0.0.weight: 0.5}}}\n"
        "policies: [{pruner: {instance_name: p}, epochs: [0]}]\n",
        "features.4.0.0.0.0.0.weight",
    ),
    "sections of reinforcement": ("rl_lib: {}\n", "is of reinforcement learning (AMC), which is not done here"),
    "a key that stands twice": ("version: 1\nversion: 2\n", "version"),
    "language models": ("", ""),  # networks, not schedules
}


def test_what_the_schedule_page_says_does_not_run_is_refused(tmp_path):
    rows = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8").split("### What does not run")[1].split("|---|---|\n")[1]
    assert [next((begin for begin in REFUSED if row.startswith(f"| {begin}")), row) for row in rows.splitlines()] == list(REFUSED)
    for content, part in REFUSED.values():
        (tmp_path / "s.yaml").write_text(content)
        if content:
            with pytest.raises(UserError, match=re.escape(part)):
                read_schedule(tmp_path / "s.yaml", {"fc.weight": 2, "fc.bias": 1})


@pytest.mark.usefixtures("few_digits")
def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compression.exporting.measuring.ROUNDS", 1)
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.setattr("compression.pruning.arguments.MANY", 96)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(compile(block, "docs/python.md", "exec"), namespace)
    assert isinstance(namespace["results"], dict)
    assert {path.name for path in Path.cwd().iterdir()} >= {"mine.pt", "pruned.pt", "pruned.torchscript"}


def test_parsers_are_those_of_the_scripts():
    for script, arguments in SCRIPTS.items():
        assert isinstance(make_parser(arguments, ""), argparse.ArgumentParser)
        assert arguments.__name__ in (ROOT / script).read_text(encoding="utf-8")
