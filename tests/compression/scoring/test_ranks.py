from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from compression.scoring.calibration import Calibration
from compression.scoring.criteria import score
from compression.scoring.feature_maps import find_taps, show_maps
from compression.scoring.measuring import looks, measure_ranks
from compression.scoring.ranks import load_ranks, save_ranks, scores_from_ranks
from compression.scoring.scores import GroupScore, ScoringTask, order_units
from compression.scoring.singular_values import spectrum_scores
from compression.tracing.channels import trace
from compression.tracing.tracer import evaluating
from models.networks import build
from tests.launch import Launch
from utils import distributed
from utils.errors import UserError
from utils.spec import ModelSpec


class Small(nn.Module):
    """Three convolutions: a plain one, and two whose outputs are added up; in-place ReLU after each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 5, 3, 2, 1)
        self.norm = nn.BatchNorm2d(5)
        self.right = nn.Conv2d(6, 5, 2, 2)  # not 1 x 1: of fewer than 8 channels oneDNN with AVX2 writes out of bounds (torch 2.14)
        self.hidden = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x).relu_()
        x = (self.norm(self.left(x)) + self.right(x)).relu_()
        x = self.hidden(x.mean((2, 3))).relu_()
        return self.head(x)


def images(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    pixels[:, size // 2 :] = pixels[:, :1]  # rows that repeat, so that ranks differ
    return Calibration(pixels, torch.arange(count) % 3, ModelSpec("resnet20", 3, imgsz=size), 64)


def lively(model, seed=0):
    """Fresh networks have equal channels: give each its own scale and shift, some of which are dead."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, -0.3, 0.7)
            nn.init.uniform_(module.weight, 0.1, 1.0)
    return model


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    model = lively(Small())
    return model, trace(model, torch.zeros(1, 3, 12, 12)), images(40, 12)


def oracle(module_maps):
    """One map at a time, as the definition says."""
    return torch.tensor([[torch.linalg.matrix_rank(one).item() for one in image] for image in module_maps]).double().mean(0)


def test_ranks_are_those_of_one_map_at_a_time(small):
    model, graph, calibration = small
    taps = measure_ranks(ScoringTask(model, graph, calibration, 0)).taps
    first, added = [], []
    with torch.no_grad():
        model.eval()
        for inputs, _ in calibration.batches():
            x = model.first(inputs).relu()
            first.append(x)
            added.append((model.norm(model.left(x)) + model.right(x)).relu())
    assert list(taps) == ["conv1", "conv2", "linear1"]
    assert taps["conv2"].weights == ("left.weight", "right.weight")
    assert (taps["conv1"].map_size, taps["conv2"].map_size, taps["linear1"].map_size) == ((12, 12), (6, 6), (1, 1))
    assert torch.equal(taps["conv1"].means["rank"], oracle(torch.cat(first)).float())
    assert torch.equal(taps["conv2"].means["rank"], oracle(torch.cat(added)).float())
    assert len(set(taps["conv2"].means["rank"].tolist())) > 2


def test_resnet_ranks_are_those_of_its_blocks_after_the_addition():
    model = lively(build(ModelSpec("resnet20", 3, imgsz=32))).eval()
    graph, calibration = trace(model, torch.zeros(1, 3, 32, 32)), images(16, 32)
    seen = {}
    for name, module in model.named_modules():
        if name in ("layer1.0", "layer2.1", "layer3.2"):
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.clone()}))
    with torch.no_grad():
        model(next(calibration.batches())[0])
    taps = measure_ranks(ScoringTask(model, graph, calibration, 0)).taps
    assert len(taps) == 19
    by_weight = {weight: tap for tap in taps.values() for weight in tap.weights}
    for name, maps in seen.items():
        assert torch.equal(by_weight[f"{name}.conv2.weight"].means["rank"], oracle(maps).float()), name


@pytest.mark.parametrize(("name", "count"), [("resnet56", 55), ("resnet20-b", 19), ("resnet50", 49)])
def test_convolutions_that_are_added_up_share_a_file(name, count):
    size = 32
    graph = trace(build(ModelSpec(name, 10, imgsz=size)), torch.zeros(1, 3, size, size))
    taps = find_taps(graph)
    assert [tap.name for tap in taps] == [f"conv{k + 1}" for k in range(count)]


def test_a_tap_shows_the_tensor_before_it_is_overwritten():
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            x.mul_(0)
            return self.c((x + y).mean((2, 3)))

    model = Overwritten()
    taps = find_taps(trace(model, torch.zeros(1, 3, 4, 4)))
    inputs, shown = torch.rand(2, 3, 4, 4), {}
    with evaluating(model):
        show_maps(model, inputs, taps, lambda tap, maps: shown.update({tap.name: maps.clone()}))
    assert torch.allclose(shown["conv1"], model.a(inputs))


def test_the_scores_of_a_spectrum():
    eye, ones = torch.eye(6), torch.ones(6, 6)
    maps = torch.stack([eye, ones, torch.zeros(6, 6), torch.diag(torch.tensor([2.0, 1, 1, 0, 0, 0]))])[None]
    rank, effective, nuclear = spectrum_scores(maps)[:, 0]
    assert rank.tolist() == [6, 1, 0, 3]
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert effective.tolist() == pytest.approx([6, 1, 0, math.exp(entropy)], abs=1e-5)
    assert nuclear.tolist() == pytest.approx([6, 6, 0, 4], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (4, 7), (7, 7), (8, 8), (7, 12), (12, 7), (32, 32), (16, 1)])
def test_ranks_are_those_of_torch_near_the_threshold_too(shape):
    generator = torch.Generator().manual_seed(3)
    count, side = 300, min(shape)
    left, right = (torch.linalg.qr(torch.randn(count, n, side, generator=generator))[0] for n in shape)
    powers = -9 * torch.rand(count, side, generator=generator)
    powers[: count // 3] = -6.2 - torch.rand(count // 3, side, generator=generator)
    values = 10.0**powers
    values[:, 0] = 1
    maps = left @ (values[:, :, None] * right.mT)
    maps[::10] = 0
    maps[1::10] = maps[1::10].relu()
    maps[2::10, :, : shape[1] // 2] = 0
    assert spectrum_scores(maps[None])[0, 0].tolist() == [torch.linalg.matrix_rank(one).item() for one in maps]


def test_maps_that_are_not_finite_are_refused(small):
    _, graph, calibration = small
    broken = Small()
    nn.init.constant_(broken.first.bias, math.nan)
    with pytest.raises(UserError, match="not finite"):
        measure_ranks(ScoringTask(broken, graph, calibration, 0))


def test_ties_are_broken_by_the_next_key_and_reported():
    scores = GroupScore.of([torch.tensor([3.0, 1, 3, 3]), torch.tensor([0.5, 9, 0.1, 0.5])])
    assert scores.order.tolist() == [1, 2, 3, 0]
    assert scores.tied == 0.75
    assert order_units([torch.zeros(3)]).tolist() == [2, 1, 0]


def test_looks_are_whole_passes_and_end_with_all_images():
    assert looks(512) == [32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512]
    assert looks(20) == [20]
    assert looks(33) == [32, 33]


def test_scoring_stops_early_where_the_choice_is_plain(small):
    model, graph, _ = small
    calibration = images(300, 12, seed=5)
    whole = score("rank", model, graph, calibration, 0)
    assert {group.images for group in whole.groups.values()} == {300}
    keep = {group.name: 3 for group in graph.prunable}
    early = score("rank", model, graph, calibration, 0, keep)
    again = score("rank", model, graph, calibration, 0, keep)
    assert min(group.images for group in early.groups.values()) < 300
    for name, group in early.groups.items():
        assert len(set(group.order[-3:].tolist()) & set(whole.groups[name].order[-3:].tolist())) >= 2
        assert torch.equal(group.order, again.groups[name].order)
    assert early.maps.images == {name: group.images for name, group in early.groups.items()}


# --- files


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    model, graph, calibration = small
    scored = score("rank", model, graph, calibration, 0)
    folder = tmp_path_factory.mktemp("ranks")
    save_ranks(folder, "small", graph, scored.maps)
    return folder, graph, scored


@pytest.fixture
def copied(saved, tmp_path):
    folder, graph, _ = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path, graph


def test_files_hold_the_scores_in_the_layout_of_hrank(saved):
    folder, graph, scored = saved
    array = np.load(folder / "rank_conv1.npy", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (6,))
    assert {path.name for path in folder.iterdir()} == {
        "ranks.json",
        *(f"{kind}_{tap}.npy" for kind in ("rank", "effective_rank", "nuclear") for tap in ("conv1", "conv2", "linear1")),
    }
    index = json.loads((folder / "ranks.json").read_text())
    assert (index["format"], index["model"]) == (1, "small")
    entry = index["files"]["rank_conv2.npy"]
    assert (entry["weights"], entry["channels"], entry["map_size"], entry["images"]) == (["left.weight", "right.weight"], 5, [6, 6], 40)
    assert 0 <= entry["share_tied"] <= 1
    read = scores_from_ranks(load_ranks(folder, graph), graph)
    assert list(read) == list(scored.groups) == ["first", "left", "hidden"]
    for name, group in scored.groups.items():
        assert torch.equal(read[name].values, group.values)
        assert torch.equal(read[name].order, group.order)
        assert (read[name].tied, read[name].images) == (group.tied, group.images)


def test_a_folder_of_others_has_ranks_alone(tmp_path, saved):
    _, graph, _ = saved
    np.save(tmp_path / "rank_conv1.npy", np.array([3, 1, 2, 2, 5, 4], np.float32))
    np.save(tmp_path / "rank_conv2.npy", np.arange(5, dtype=np.float64))
    loaded = load_ranks(str(tmp_path), graph)
    read = scores_from_ranks(loaded, graph)
    assert list(read) == ["first", "left"]  # nothing is known of the linear layer
    assert read["first"].order.tolist() == [1, 3, 2, 0, 5, 4]
    assert (read["first"].tied, read["first"].images) == (pytest.approx(1 / 3), 0)
    with pytest.raises(UserError, match="hold no effective_rank of group 'first'"):
        scores_from_ranks(loaded, graph, "effective_rank")


class Unwanted:
    """Would be run by a careless reader."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rank_conv2.npy", None, r"rank_conv2.npy is missing.*3 rank files"),
        ("effective_rank_conv2.npy", None, r"effective_rank_conv2.npy is missing; expected 5 finite"),
        ("rank_conv2.npy", np.zeros(7, np.float32), r"rank_conv2.npy has shape \[7\].*another network; expected 5.*left.weight"),
        ("rank_conv2.npy", np.zeros((5, 1), np.float32), r"shape \[5, 1\]"),
        ("rank_conv2.npy", np.zeros(5, np.int64), "holds int64, not floating-point"),
        ("rank_conv2.npy", np.array([0, 1, np.nan, 2, 3], np.float32), "1 entries that are not finite"),
        ("rank_conv2.npy", np.array([Unwanted()] * 5, object), "without running code"),
        ("rank_conv2.npy", b"", "without running code"),
        ("rank_conv2.npy", b"\x93NUMPY\x01\x00", "without running code"),
        ("rank_conv3.npy", np.zeros(5, np.float32), "rank_conv3.npy is of another network: this one has 2"),
        ("ranks.json", b"{", "ranks.json is damaged"),
        ("ranks.json", b"[]", "ranks.json is damaged"),
        ("ranks.json", b'{"format": 2, "files": {}, "images_per_group": {}}', "has format 2; this version reads format 1"),
        ("ranks.json", b'{"format": 1, "files": {}, "images_per_group": {}}', r"of another network: rank_conv1.npy scores None"),
    ],
)
def test_files_of_another_network_and_damaged_ones_are_refused_by_name(copied, name, content, message, capsys):
    folder, graph = copied
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load_ranks(folder, graph)
    assert capsys.readouterr().out == ""


def test_no_folder(tmp_path, saved):
    with pytest.raises(UserError, match="is no folder with rank files"):
        load_ranks(tmp_path / "absent", saved[1])


def score_several():
    torch.manual_seed(1)
    model = lively(Small())
    graph, calibration = trace(model, torch.zeros(1, 3, 12, 12)), images(100, 12)
    found = {}
    for criterion, keep in (("rank", None), ("rank", {"first": 3, "left": 3}), ("taylor", None), ("apoz", None)):
        scored = score(criterion, model, graph, calibration, 0, keep)
        found[f"{criterion} {keep}"] = {name: (s.values, s.order, s.images) for name, s in scored.groups.items()}
    return found


def score_a_share():
    distributed.join(torch.device("cpu"))
    torch.save(score_several(), f"{distributed.rank()}_of_{distributed.world_size()}.pt")
    distributed.leave()


def test_two_processes_score_to_the_same_bits(tmp_path):
    with Launch(tmp_path, "two", score_a_share, world=2) as processes:
        alone = score_several()
        processes.finish()
    for rank in range(2):
        share = torch.load(tmp_path / f"{rank}_of_2.pt")
        for criterion, groups in alone.items():
            for name, (values, order, count) in groups.items():
                assert torch.equal(share[criterion][name][0], values), (criterion, name)
                assert torch.equal(share[criterion][name][1], order)
                assert share[criterion][name][2] == count
