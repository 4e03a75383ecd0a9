"""Rank files as HRank published them: which file counts for which convolution, and what prune.py writes in their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compression.pruning.plan import entries_of
from compression.scoring.criteria import score_by_files
from compression.scoring.feature_maps import find_taps
from compression.scoring.ranks import load_ranks, save_ranks, scores_from_ranks
from compression.scoring.scores import MapScores, TapScore
from compression.tracing.channels import trace
from compression.tracing.graph import ChannelGraph
from models.networks import build
from utils.errors import UserError
from utils.spec import ModelSpec

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
RESNET50 = [64, *(n for d, w in STAGES for b in range(d) for n in ((w, w, 4 * w, 4 * w) if b == 0 else (w, w, 4 * w)))]
BRANCHES = ("n1x1", "n3x3", "n5x5", "pool_planes")
INCEPTIONS = [(64, 128, 32, 32), (128, 192, 96, 64), (192, 208, 48, 64), (160, 224, 64, 64), (128, 256, 64, 64)]
INCEPTIONS += [(112, 288, 64, 64), (256, 320, 128, 128), (256, 320, 128, 128), (384, 384, 128, 128)]
# The folders of github.com/lmbxmu/HRank: name of a file -> how many numbers it holds.
PUBLISHED = {
    "vgg16-cifar": {f"conv{k}": n for k, n in enumerate([64, 64, 128, 128, *[256] * 3, *[512] * 5], 1)},
    "resnet56": {f"conv{k}": n for k, n in enumerate([16, *[16] * 18, *[32] * 18, *[64] * 18], 1)},
    "resnet50": {f"conv{k}": n for k, n in enumerate(RESNET50, 1)},
    "densenet40": {f"conv{k}": n for k, n in enumerate([24, *[12] * 12, 168, *[12] * 12, 312, *[12] * 12], 1)},
    "googlenet-cifar": {"conv1": 192}
    | {f"conv{k}_{b}": n for k, widths in enumerate(INCEPTIONS, 2) for b, n in zip(BRANCHES, widths, strict=True)},
}
COUNTS = {"vgg16-cifar": 12, "resnet56": 55, "resnet50": 53, "densenet40": 39, "googlenet-cifar": 37}


def traced(name: str) -> tuple[torch.nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = build(ModelSpec(name, 10, 32)).eval()
    return model, trace(model, torch.zeros(1, 3, 32, 32))


def publish(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Write a folder like HRank's with random ranks; a shortcut's file is that of the branch beside it, as theirs are."""
    rng, arrays = np.random.default_rng(0), {}
    for file, channels in PUBLISHED[name].items():
        arrays[file] = rng.permutation(channels).astype(np.float32)
    if name == "resnet50":
        for shortcut in (4, 14, 27, 46):
            arrays[f"conv{shortcut}"] = arrays[f"conv{shortcut + 1}"]
    for file, ranks in arrays.items():
        np.save(folder / f"rank_{file}.npy", ranks)
    return arrays


# group -> the file that counts (for a stream the mean of several: not here)
COUNTING = {
    "vgg16-cifar": {"features.conv0": "conv1", "features.conv11": "conv12"},
    "resnet56": {"conv1": "conv1", "layer1.0.conv1": "conv2", "layer3.8.conv1": "conv54"},
    "resnet50": {"layer1.0.conv1": "conv2", "layer1.0.conv2": "conv3", "layer1.1.conv1": "conv6", "layer2.0.conv1": "conv12"},
    "densenet40": {"dense1.0.conv1": "conv2", "trans1.conv1": "conv14", "dense3.11.conv1": "conv39"},
    "googlenet-cifar": {
        "pre_layers.0": "conv1",
        "inception_a3.branch1x1.0": "conv2_n1x1",
        "inception_a3.branch3x3.3": "conv2_n3x3",
        "inception_a3.branch5x5.3": "conv2_n5x5",
        "inception_a3.branch5x5.6": "conv2_n5x5",
        "inception_b5.branch_pool.1": "conv10_pool_planes",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_load_and_the_right_file_counts(name, tmp_path):
    assert len(PUBLISHED[name]) == COUNTS[name]
    arrays = publish(tmp_path, name)
    model, graph = traced(name)
    scores = score_by_files(str(tmp_path), model, graph, name).groups
    found = scores_from_ranks(load_ranks(tmp_path, graph, name), graph)
    assert {group.name for entry in entries_of(graph, name) for group in entry} <= set(found)
    for group, file in COUNTING[name].items():
        assert scores[group].order.tolist() == arrays[file].argsort().tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_has_the_files_of_hrank_and_is_read_again(name, tmp_path):
    _, graph = traced(name)
    rng = np.random.default_rng(1)
    taps = find_taps(graph)
    means = {tap.name: torch.from_numpy(rng.random(tap.channels).astype(np.float32)) for tap in taps}
    scored = {
        tap.name: TapScore(tap.name, tap.weights, (4, 4), 8, dict.fromkeys(("rank", "effective_rank", "nuclear"), means[tap.name]))
        for tap in taps
    }
    save_ranks(tmp_path, name, graph, MapScores(scored, {}))
    for file, channels in PUBLISHED[name].items():
        assert np.load(tmp_path / f"rank_{file}.npy").shape == (channels,)
    loaded = load_ranks(tmp_path, graph, name)
    assert {tap: score.means["rank"].tolist() for tap, score in loaded.taps.items()} == {tap: m.tolist() for tap, m in means.items()}


def test_a_file_of_a_convolution_that_is_cut_may_not_be_missing(tmp_path):
    publish(tmp_path, "vgg16-cifar")
    (tmp_path / "rank_conv12.npy").unlink()
    _, graph = traced("vgg16-cifar")
    with pytest.raises(UserError, match=r"rank_conv12.npy is missing: 1 of 12 rank files"):
        load_ranks(tmp_path, graph, "vgg16-cifar")


def test_the_thirteenth_file_of_vgg_is_read_where_it_is_there(tmp_path):
    publish(tmp_path, "vgg16-cifar")
    np.save(tmp_path / "rank_conv13.npy", np.arange(512, dtype=np.float32))
    _, graph = traced("vgg16-cifar")
    assert "conv13" in load_ranks(tmp_path, graph, "vgg16-cifar").taps


def test_a_folder_of_another_network_is_refused(tmp_path):
    publish(tmp_path, "googlenet-cifar")
    _, graph = traced("vgg16-cifar")
    with pytest.raises(UserError, match=r"rank_conv10_n1x1.npy is of another network: this one has 13 files"):
        load_ranks(tmp_path, graph, "vgg16-cifar")
