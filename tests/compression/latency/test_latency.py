"""Budgets of time: networks at other widths without an export, the fit of times, the search, and prune.py on a clock that is known."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import device_probe
from compression.exporting.graphs import ExportSource
from compression.exporting.measuring import noise_images
from compression.latency import probes
from compression.latency.model import LatencyModel, Timed, non_negative
from compression.latency.runtimes import Candidates, cut_copy
from compression.latency.table import LatencyTable, setting_of, width_vector
from compression.pruning.latency_budget import first_units
from compression.pruning.plan import Entry
from compression.pruning.time_allocation import TimeSearch, drawn_widths
from compression.scoring.calibration import Calibration
from compression.tracing.channels import trace
from compression.tracing.costs import macs_cost
from models.backends.metadata import Metadata
from models.networks import build
from tests.scripts.test_prune import YOLO, write_dense
from tests.zoo import randomised
from utils.errors import UserError
from utils.spec import ModelSpec


def network(name, size=32, channels=3):
    torch.manual_seed(0)
    spec = ModelSpec(name, 10, size, channels)
    model = randomised(build(spec)).eval()
    return spec, model, trace(model, torch.randn(1, channels, size, size))


def candidates(spec, model, graph, runtime="onnxruntime", precision="fp32"):
    calibration = Calibration(noise_images(spec, 8, 0), torch.zeros(8, dtype=torch.int64), spec, 8)
    return Candidates(ExportSource(model, Metadata(spec, batch_size=1), calibration=calibration), graph, runtime, precision)


def drawn(graph, number):
    return first_units(graph, drawn_widths([Entry((group,)) for group in graph.prunable], number))


# ---- networks at other widths


@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "mobilenet-v2-hrank", "yolov5n-cls"),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resnet20-b", "vgg16-cifar", "yolo11n-cls", "googlenet-cifar")),
    ],
)
def test_a_narrowed_file_computes_what_the_cut_network_does(name):
    """Nothing is trained or refitted, so the file's outputs must be those of the network that was cut in torch."""
    spec, model, graph = network(name)
    found, images = candidates(spec, model, graph), noise_images(spec, 1, 1)
    in_torch = candidates(spec, model, graph, "torch")
    for number in (1, 2):
        keep = drawn(graph, number)
        expected, outputs = in_torch.narrow(keep).logits(images), found.narrow(keep).logits(images)
        assert torch.allclose(outputs, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(found.narrow({}).logits(images), in_torch.narrow({}).logits(images), rtol=1e-3, atol=1e-3)


def test_a_narrowed_int8_file_runs_at_its_widths():
    spec, model, graph = network("resnet20-b")
    found, keep = candidates(spec, model, graph, precision="int8"), drawn(graph, 3)
    narrow = found.model.at(keep)
    arrays = {tensor.name: tuple(tensor.dims) for tensor in narrow.graph.initializer}
    cut = cut_copy(model, graph, keep)
    layer = "layer2.1.conv1"
    shape = tuple(cut.get_submodule(layer).weight.shape)
    assert arrays[f"{layer}.weight_quantized"] == shape != tuple(model.get_submodule(layer).weight.shape)
    assert arrays[f"{layer}.weight_scale"] == shape[:1]
    expected = candidates(spec, model, graph, "torch").narrow(keep).logits(noise_images(spec, 1, 1))
    outputs = found.narrow(keep).logits(noise_images(spec, 1, 1))
    assert outputs.shape == expected.shape
    assert torch.corrcoef(torch.stack([outputs[0], expected[0]]))[0, 1] > 0.8


# ---- the fit


def test_the_least_squares_without_negative_factors():
    # x'Gx / 2 - t'x with G = I: the target, and zero where it is negative
    assert non_negative(np.eye(3), np.array([2.0, -1.0, 0.5])) == pytest.approx([2, 0, 0.5])
    # coupled: minimize (x + y - 1)^2 / 2 + y^2 / 2 - 0 -> y = 0, x = 1
    assert non_negative(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([1.0, 1.0])) == pytest.approx([1, 0], abs=1e-6)


def test_times_of_a_known_law_are_predicted():
    """A constant, whole blocks of 16 outputs, and what a layer reads: half of the measured networks tell of the others."""
    _, _, graph = network("resnet20-b")
    layers = graph.contractions

    def law(keep):
        indices, total = graph.indices(keep), 0.05
        for layer in layers:
            out, read = (len(indices.get(layer.weight, {}).get(dim, range(graph.shapes[layer.weight][dim]))) for dim in (0, 1))
            kernel = np.prod(graph.shapes[layer.weight][2:])
            total += layer.repeats * (1e-7 * kernel * read * -(-out // 16) * 16 + 2e-6 * read)
        return total

    timed = [Timed(width_vector(graph, keep), law(keep)) for keep in ({}, *(drawn(graph, i) for i in range(1, 80)))]
    model = LatencyModel(graph, timed[:40])
    errors = [abs(model(one.widths) / one.ms - 1) for one in timed[40:]]
    assert np.mean(errors) < 0.02
    assert model.error < 0.03
    assert model.scaled(2)(timed[0].widths) == pytest.approx(2 * model(timed[0].widths))
    assert model.at(np.stack([one.widths for one in timed])) == pytest.approx([model(one.widths) for one in timed])


# ---- the search


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_trying_everything_finds(seed):
    rng = np.random.default_rng(seed)
    _, _, graph = network("resnet20-b", 16)
    entries = [Entry((group,)) for group in graph.prunable[1:4]]  # 16 channels each
    names, full = [group.name for group in graph.groups], np.array([group.size for group in graph.groups], dtype=np.float64)
    columns = [names.index(entry[0].name) for entry in entries]
    weight, block = rng.uniform(0.2, 3, 3), rng.choice([1, 4, 8], 3)

    def times(widths):
        chosen = widths[:, columns]
        steps = np.ceil(chosen / block) * block
        return 1 + steps @ weight / 16 + 0.3 * (steps[:, 0] * steps[:, 1] + steps[:, 1] * steps[:, 2]) / 256

    harm = rng.uniform(0.5, 2, 3)
    search = TimeSearch(entries, names, full, times, lambda i, share: float(harm[i] * (1 - share) ** 2))
    whole = float(times(full[None])[0])
    for share in (0.8, 0.6, 0.45):
        limit = share * whole
        grid = np.repeat(full[None], 16**3, 0)
        grid[:, columns] = list(itertools.product(range(1, 17), repeat=3))
        costs = np.where(times(grid) <= limit, ((1 - grid[:, columns] / 16) ** 2) @ harm, np.inf)
        if not np.isfinite(costs.min()):
            with pytest.raises(UserError, match="can't be reached"):
                search.within(limit)
            continue
        found = search.within(limit)
        vector = full.copy()
        vector[columns] = [found[entry[0].name] for entry in entries]
        assert float(times(vector[None])[0]) <= limit
        assert float(((1 - vector[columns] / 16) ** 2) @ harm) <= costs.min() * 1.05 + 1e-9
    assert search.within(whole) == {entry[0].name: 16 for entry in entries}
    with pytest.raises(UserError, match="can't be reached: at the least widths the network is predicted to take"):
        search.within(0.5)


# ---- tables


@pytest.fixture(scope="module")
def table():
    spec, _, graph = network("resnet20-b", 16)
    setting = setting_of(graph, spec, 1, "torch", "fp32", 1)
    cost = macs_cost(graph, graph.macs({}))
    keeps = [{}, *(drawn(graph, i) for i in range(1, 30))]
    timed = tuple(Timed(vector, cost(vector) / 1e6) for vector in (width_vector(graph, keep) for keep in keeps))
    return graph, spec, LatencyTable(setting, tuple(group.name for group in graph.groups), timed, "2026-01-31")


def test_a_table_comes_back(table, tmp_path):
    graph, spec, written = table
    (tmp_path / "t.json").write_text(written.to_json())
    read = LatencyTable.read(tmp_path / "t.json", graph, written.setting)
    assert (read.setting, read.groups, read.measured) == (written.setting, written.groups, written.measured)
    assert all(
        (a.widths == b.widths).all() and a.ms == pytest.approx(b.ms, abs=1e-6) for a, b in zip(read.timed, written.timed, strict=True)
    )
    other = setting_of(graph, spec.with_(imgsz=32), 1, "torch", "fp32", 1)
    with pytest.raises(UserError, match=r"t.json is a latency table for size \(16, 16\), not \(32, 32\)"):
        LatencyTable.read(tmp_path / "t.json", graph, other)
    _, _, another = network("resnet20", 16)
    with pytest.raises(UserError, match=r"t.json is a latency table for another network"):
        LatencyTable.read(tmp_path / "t.json", another, setting_of(another, spec, 1, "torch", "fp32", 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: text.replace("rankcut-latency", "else"),
        lambda text: text.replace('"ms": ', '"ms": -'),
        lambda text: text.replace('"timed"', '"times"'),
        lambda text: "[]",
        lambda text: text.replace('"threads": 1', '"threads": 1, "more": 2'),
        lambda text: "\x00",
    ],
)
def test_damaged_tables_are_refused_in_one_line(table, tmp_path, change):
    graph, _, written = table
    (tmp_path / "t.json").write_text(change(written.to_json()))
    with pytest.raises(UserError, match=r"t.json is no latency table of this version") as caught:
        LatencyTable.read(tmp_path / "t.json", graph, written.setting)
    assert "\n" not in str(caught.value)


# ---- prune.py


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A network's pass takes as many milliseconds as it has weights, in ten thousands, and one."""
    calls = []

    def times_of(backends, images, rounds, passes, max_seconds=0):
        calls.append(len(backends))
        taken = [0.05 + sum(p.numel() for p in backend.model.parameters() if p.ndim == 4) / 1e4 for backend in backends]
        return [[ms] * (rounds * passes) for ms in taken]

    monkeypatch.setattr("compression.latency.table.times_of", times_of)
    monkeypatch.setattr("compression.latency.table.DRAWN", 40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


FLAGS = ("--workers", 0, "--images", 24, "--runtime", "torch", "--threads", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "tiny.pt", "tiny", definition=YOLO)


@pytest.fixture
def prune(script, photos, tiny):
    """Run prune.py on a small network and a few photos."""
    return lambda *flags: script("prune.py", "--weights", tiny, "--data", photos, *flags)


def test_a_budget_of_time_is_kept_and_told(prune, tmp_path, clock, monkeypatch):
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    done = prune(*FLAGS, "--latency", 0.6, "--project", tmp_path, "--name", "a")
    assert done.code == 0, done.err
    latency = json.loads((tmp_path / "a/results.json").read_text())["latency"]
    dense, narrow = latency["measured_ms"]
    assert {name: latency[name] for name in ("runtime", "precision", "threads", "batch")} == {
        "runtime": "torch",
        "precision": "fp32",
        "threads": 1,
        "batch": 1,
    }
    assert latency["budget_ms"] == pytest.approx(0.6 * dense, rel=1e-3)
    assert 0.9 * latency["budget_ms"] < narrow <= latency["budget_ms"]
    assert latency["predicted_ms"] == pytest.approx(narrow, rel=0.05)
    assert f"measured {narrow:.3f} ms, dense {dense:.3f} ms" in done.out
    assert "note   times of 40 networks measured on " in done.out
    (kept,) = (tmp_path / "cache/rankcut").iterdir()
    before = len(clock)
    done = prune(*FLAGS, "--latency-ms", 0.6 * dense, "--project", tmp_path, "--name", "b")
    assert done.code == 0, done.err
    assert f"note   times of {kept}, measured " in done.out
    assert len(clock) - before < 12
    again = json.loads((tmp_path / "b/results.json").read_text())["latency"]
    assert again["measured_ms"][1] <= 0.6 * dense


def test_a_device_measures_probes_and_its_table_is_used(prune, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.setattr("compression.latency.table.times_of", lambda backends, images, rounds, passes, _=0: [[1.0] * (rounds * passes)] * 2)
    monkeypatch.setattr("compression.latency.table.DRAWN", 8)
    monkeypatch.setattr(probes, "COUNT", 12)
    flags = [*FLAGS]
    flags[flags.index("torch")] = "onnxruntime"
    common = (*flags, "--project", tmp_path)
    done = prune(*common, "--latency", 0.99, "--write-probes", tmp_path / "probes", "--name", "a")
    assert sorted(path.name for path in (tmp_path / "probes").iterdir()) == [*(f"{i:03}.onnx" for i in range(12)), "probes.json"], done.err
    monkeypatch.setattr(device_probe, "machine", lambda: "a smaller one")
    monkeypatch.setattr(sys, "argv", ["device_probe.py", str(tmp_path / "probes"), "--threads", "1", "--out", str(tmp_path / "t.json")])
    device_probe.main()
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["setting"]["machine"] == "a smaller one"
    assert len(table["timed"]) == 12
    assert all(row["ms"] > 0 for row in table["timed"])
    capsys.readouterr()
    done = prune(*common, "--latency", 0.9, "--latency-table", tmp_path / "t.json", "--name", "b")
    assert done.code == 0, done.err
    assert "measured " in done.out
    assert "not measured here, as the table is another machine's" in done.out
    assert json.loads((tmp_path / "b/results.json").read_text())["latency"]["measured_ms"] == [None, None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--latency", 1.5), "latency is 1.5; it is the share that stays, in (0, 1]"),
        (("--latency", 0), "latency is 0.0; it is the share that stays"),
        (("--latency-ms", -1), "latency-ms is -1.0; it must be above 0"),
        (("--latency", 0.5, "--macs", 0.5), "--macs and --latency exclude each other"),
        (("--latency", 0.5, "--latency-ms", 2), "--latency and --latency-ms exclude each other"),
        (("--latency", 0.5, "--allocation", "uniform"), "--allocation uniform is for --macs or --params"),
        (("--latency", 0.5, "--precision", "int8"), "--runtime torch has no int8; valid: onnxruntime, openvino"),
        (("--latency", 0.5, "--latency-batch", 0), "latency-batch is 0"),
        (("--latency", 0.5, "--latency-table", "nowhere.json"), "nowhere.json can't be read (No such file or directory)"),
        (("--latency", 0.5, "--write-probes", "p"), "--write-probes is for --runtime onnxruntime"),
        (("--latency", 0.0001), "a latency of "),
        (("--macs", 0.5), "--runtime is for a budget of time: give --latency or --latency-ms too"),
    ],
)
def test_what_can_be_mended_is_one_line(prune, tmp_path, clock, monkeypatch, flags, message):
    monkeypatch.setattr("compression.pruning.widths.DAMAGE_IMAGES", (8, 8))
    monkeypatch.chdir(tmp_path)
    done = prune(*FLAGS, *flags, "--project", tmp_path / "runs")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))


def test_a_network_whose_file_can_not_be_narrowed_is_exported_at_each_width(monkeypatch):
    spec, model, graph = network("resnet20-b", 16)
    found, keep = candidates(spec, model, graph), drawn(graph, 1)
    some = "layer1.0.conv1.weight"
    monkeypatch.setattr(found.model, "places", {some: found.model.places[some]})
    expected = candidates(spec, model, graph, "torch").narrow(keep).logits(noise_images(spec, 1, 1))
    assert torch.allclose(found.narrow(keep).logits(noise_images(spec, 1, 1)), expected, rtol=1e-3, atol=1e-3)
    assert found.by_export


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_runs_narrowed_files(precision):
    pytest.importorskip("openvino", reason="openvino is not installed")
    if precision == "int8":
        pytest.importorskip("nncf", reason="nncf is not installed")
    spec, model, graph = network("resnet20-b", 16)
    keep, images = drawn(graph, 2), noise_images(spec, 1, 1)
    expected = candidates(spec, model, graph, "torch").narrow(keep).logits(images)
    found = candidates(spec, model, graph, "openvino", precision)
    outputs = found.narrow(keep).logits(images)
    assert not found.by_export
    if precision == "fp32":
        assert torch.allclose(outputs, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    else:
        assert torch.corrcoef(torch.stack([outputs[0], expected[0]]))[0, 1] > 0.8
