"""Mutants of the shipped schedules: each runs, or is refused in one line; nothing in a file is ever executed."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path

import pytest
import torch
import yaml

from compression.schedule.loop import ScheduledLoop
from compression.schedule.reading import parse_schedule, read_schedule
from compression.schedule.timeline import timeline
from models.networks import build
from models.networks.widths import resize_
from tests.loops import one_batch_an_epoch
from tests.mutants import invent, mutate, mutate_text, sooner
from utils.errors import UserError
from utils.spec import ModelSpec

FOLDER = Path(__file__).resolve().parents[3] / "data" / "schedules"
SEEDS, STRUCTURAL, TEXTUAL = 10, 160, 70  # 10 * (160 + 70) = 2,300 mutants, of which the suite runs those of QUICK seeds
QUICK = 3
EPOCHS = 3
SLOW = ("resnet56_filters_l1", "yolov5n_rank_distil", "alexnet_sensitivity")  # read and shown for every mutant, run for a few
NETWORKS = {"resnet56_filters_l1": "resnet56-b", "yolov5n_rank_distil": "yolov5n-cls", "alexnet_sensitivity": "alexnet"}


def narrow(name):
    """Build the network of a schedule with a quarter of the channels."""
    with torch.device("meta"):
        model = build(ModelSpec(name, 10, imgsz=32))
    if name == "alexnet":
        return model
    shapes = {
        key: [max(size // 4, 4) if axis < 2 and size > 10 else size for axis, size in enumerate(tensor.shape)]
        for key, tensor in model.state_dict().items()
    }
    torch.manual_seed(0)
    model = build(ModelSpec(name, 10, imgsz=32))
    resize_(model, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.ndim > 1 else torch.ones_like(parameter))
    return model.train()


@pytest.fixture(scope="module")
def networks():
    names = {path.stem: NETWORKS.get(path.stem, "resnet20-b") for path in sorted(FOLDER.glob("*.yaml"))}
    made = {name: narrow(name) for name in set(names.values())}
    return {stem: made[name] for stem, name in names.items()}


def carry_out(schedule, model, steps):
    """Read a schedule, show its timeline, and run it for so many epochs of a batch."""
    if steps:  # without, the network is not changed; copies take the most time here
        names = {name: parameter.ndim for name, parameter in model.named_parameters()}
        _ = parse_schedule(schedule, names) if isinstance(schedule, dict) else read_schedule(schedule, names)
        model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    device = next(model.parameters()).device
    inputs, labels = torch.ones(2, 3, 16, 16, device=device), torch.tensor([0, 1], device=device)
    inputs[1, :, :8] = -1
    loop = ScheduledLoop(schedule, model, optimizer, EPOCHS, 1, (inputs, labels), report=lambda line: None)
    timeline(loop.scheduler.schedule, EPOCHS, 0.01)
    one_batch_an_epoch(loop, steps, inputs, labels)


def outcome(schedule, model, steps):
    """Return "runs" or "refused"; anything else is a failure."""
    start = time.thread_time()
    try:
        carry_out(schedule, model, steps)
        refusal = None
    except UserError as error:
        refusal = str(error)
    assert refusal is None or (refusal.isprintable() and 10 < len(refusal) < 1_500), repr(refusal)
    taken = time.thread_time() - start
    assert taken < 10.0, f"{taken:.1f} s"  # an expression that explodes takes hours
    return "refused" if refusal else "runs"


def sources():
    return {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.exhaustive) for seed in range(SEEDS)])
def test_a_mutant_runs_or_is_refused_in_one_line(seed, networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    texts = sources()
    contents = {stem: yaml.safe_load(text) for stem, text in texts.items()}
    path, seen = tmp_path / "mutant.yaml", []
    for number in range(STRUCTURAL + TEXTUAL):
        stem = rng.choice(list(texts))
        steps = int(rng.random() < (0.02 if stem in SLOW else 0.4)) * (stem != "alexnet_sensitivity")
        if number < STRUCTURAL:
            soon = rng.random() < 0.2
            schedule = sooner(contents[stem], rng) if soon else copy.deepcopy(contents[stem])
            schedule = invent(schedule, rng) if rng.random() < 0.5 else mutate(schedule, rng)
            steps = EPOCHS if soon and steps else steps
        else:
            schedule = path
            path.write_text(mutate_text(texts[stem], rng), encoding="utf-8", errors="surrogatepass")
        try:
            seen.append(outcome(schedule, networks[stem], steps))
        except Exception as error:
            shown = schedule if number < STRUCTURAL else path.read_bytes()
            raise AssertionError(f"mutant {number} of seed {seed} ({stem}): {type(error).__name__}: {error}\n{shown}") from error
    assert [file.name for file in tmp_path.iterdir()] == ["mutant.yaml"]  # nothing else was written: nothing was executed
    assert min(seen.count("runs"), seen.count("refused")) > len(seen) // 20  # both happen
