"""Ranks of feature maps: their files, and the scores of channel groups that follow.

In the layout of HRank's files (arXiv:2002.10179), ``rank_conv{k}.npy`` is float32 [channels]: the mean ranks of the k-th
convolution's maps, in forward order. Convolutions whose outputs are added up before anything reads them share one file.

Differs: ties in the rank are broken by the effective rank, then by the nuclear norm, which have files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compression.scoring.feature_maps import Tap, find_taps
from compression.scoring.hrank_layout import LAYOUTS, file_to_read, files_to_write, may_be_missing
from compression.scoring.scores import GroupScore, MapScores, TapScore, from_taps, taps_of, tied_share
from compression.tracing.graph import ChannelGraph
from utils.errors import UserError
from utils.files.runs import write_json

FORMAT = 1
INDEX = "ranks.json"
# For each criterion, the measure that decides, then those that break ties.
KEYS = {
    "rank": ("rank", "effective_rank", "nuclear"),
    "effective_rank": ("effective_rank", "nuclear"),
    "nuclear_norm": ("nuclear", "effective_rank"),
}
KINDS = KEYS["rank"]


def scores_from_ranks(loaded: MapScores, graph: ChannelGraph, criterion: str = "rank") -> dict[str, GroupScore]:
    """Turn ranks, measured or read from files, into the scores of the prunable groups.

    A group that only linear layers carry has no score in rank files of another origin, and is not in the result.

    Raises:
        UserError: the files do not hold what the criterion needs.
    """
    taps, scores = [tap for tap in find_taps(graph) if tap.name in loaded.taps], {}
    for group in graph.prunable:
        mine = taps_of(group, taps)
        kinds = [kind for kind in KEYS[criterion] if mine and all(kind in loaded.taps[tap.name].means for tap in mine)]
        if not mine:
            continue
        if not kinds:
            raise UserError(f"these rank files hold no {criterion} of group '{group.name}'; those that prune.py writes do")
        keys = [from_taps(group, mine, {tap.name: loaded.taps[tap.name].means[kind] for tap in mine}) for kind in kinds]
        images = loaded.images.get(group.name, min(loaded.taps[tap.name].images for tap in mine))
        scores[group.name] = GroupScore.of(keys, images)
    return scores


def save_ranks(folder: str | Path, model_name: str, graph: ChannelGraph, measured: MapScores) -> None:
    """Write rank files in HRank's layout, the files that break ties beside them, and ``ranks.json``, into a new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, names = {}, files_to_write(model_name, find_taps(graph))
    for tap in measured.taps.values():
        for name in names[tap.name]:
            for kind, means in tap.means.items():
                np.save(folder / f"{kind}_{name}.npy", means.numpy().astype(np.float32))
            files[f"rank_{name}.npy"] = {
                "weights": list(tap.weights),
                "channels": len(tap.means["rank"]),
                "map_size": list(tap.map_size) if tap.map_size else None,
                "images": tap.images,
                "share_tied": tied_share(tap.means["rank"]),
            }
    images = {group.name: measured.images[group.name] for group in graph.groups if group.name in measured.images}
    write_json(folder / INDEX, {"format": FORMAT, "model": model_name, "files": files, "images_per_group": images})


def load_ranks(folder: str | Path, graph: ChannelGraph, model_name: str = "") -> MapScores:
    """Read rank files: those of ``save_ranks``, or a folder of HRank's that has rank_conv1.npy, rank_conv2.npy, ... alone.

    Args:
        folder: of the files.
        graph: of the network that they are for.
        model_name: its name; HRank numbers the files of some networks in a way of its own (``hrank_layout``).

    Raises:
        UserError: a file is missing, damaged or of another network.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder with rank files (rank_conv1.npy, rank_conv2.npy, ...)")
    index, taps = _read_index(folder), find_taps(graph)
    files = index.get("files", {})
    names = _names_in_index(folder, files, taps) if index else _names_of_hrank(folder, model_name, taps)
    found = {}
    for tap in taps:
        if (name := names.get(tap.name)) is None:
            continue
        entry, means = files.get(f"rank_{name}.npy", {}), {}
        for kind in KINDS:
            path = folder / f"{kind}_{name}.npy"
            if kind == "rank" or index or path.exists():
                means[kind] = torch.from_numpy(_read_array(path, tap))
        size = entry.get("map_size")
        found[tap.name] = TapScore(tap.name, tap.weights, (size[0], size[1]) if size else None, int(entry.get("images", 0)), means)
    return MapScores(found, {name: int(count) for name, count in index.get("images_per_group", {}).items()})


def _names_in_index(folder: Path, files: dict[str, Any], taps: Sequence[Tap]) -> dict[str, str]:
    """Return the name of each tap's file: of the last that scores its weights."""
    by_weights = {tuple(entry.get("weights", ())): name.removeprefix("rank_").removesuffix(".npy") for name, entry in files.items()}
    for tap in taps:
        if tap.weights not in by_weights:
            there = files.get(f"rank_{tap.name}.npy", {}).get("weights")
            raise UserError(f"{folder / INDEX} is of another network: rank_{tap.name}.npy scores {there} there, {list(tap.weights)} here")
    names = {tap.name: by_weights[tap.weights] for tap in taps}
    _check_names(folder, {*names.values(), *(name.removeprefix("rank_").removesuffix(".npy") for name in files)}, taps)
    return names


def _names_of_hrank(folder: Path, model_name: str, taps: Sequence[Tap]) -> dict[str, str]:
    """Return the name of each tap's file in a folder of HRank's; a tap that HRank never cuts may have none."""
    names = {tap.name: file_to_read(model_name, tap) for tap in taps}
    known = set(LAYOUTS[model_name]() if model_name in LAYOUTS else [tap.name for tap in taps if tap.spatial])
    there = {name for name in [*known, *filter(None, names.values())] if (folder / f"rank_{name}.npy").exists()}
    _check_names(folder, there | {name for name in known if not may_be_missing(model_name, name)}, taps)
    return {tap: name for tap, name in names.items() if name in there}


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, files, groups = index["format"], index["files"], index["images_per_group"]
        well_formed = all(isinstance(entry, dict) for entry in files.values()) and all(isinstance(n, int) for n in groups.values())
        well_formed = well_formed and all(_is_entry(entry) for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        well_formed, version = False, None
    if version is not None and version != FORMAT:
        raise UserError(f"{path} has format {version}; this version reads format {FORMAT}")
    if not well_formed:
        raise UserError(f"{path} is damaged; it should be the index that prune.py writes beside rank files")
    return dict(index)


def _is_entry(entry: dict[str, Any]) -> bool:
    size = entry.get("map_size")
    sized = size is None or (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size))
    return sized and isinstance(entry.get("images"), int)


def _check_names(folder: Path, known: set[str], taps: Sequence[Tap]) -> None:
    """Refuse a folder that has files of more layers than the network, or of fewer."""
    wanted, there = {f"rank_{name}.npy" for name in known}, {path.name for path in folder.glob("rank_*.npy")}
    if surplus := sorted(there - wanted):
        convolutions = sum(tap.spatial for tap in taps)
        raise UserError(f"{folder / surplus[0]} is of another network: this one has {convolutions} files rank_conv1.npy and on")
    if missing := sorted(wanted - there, key=lambda name: (len(name), name)):
        raise UserError(f"{folder / missing[0]} is missing: {len(missing)} of {len(wanted)} rank files of this network are not there")


def _read_array(path: Path, tap: Tap) -> NDArray[np.float32]:
    expected = f"expected {tap.channels} finite numbers, the scores of {tap.weights[0]}"
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {expected}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no array that NumPy can read without running code ({error}); {expected}") from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path} holds {getattr(array, 'dtype', 'several arrays')}, not floating-point numbers; {expected}")
    if array.shape != (tap.channels,):
        raise UserError(f"{path} has shape {list(array.shape)}: it is of another network; {expected}")
    if not np.isfinite(array).all():
        raise UserError(f"{path} has {int((~np.isfinite(array)).sum())} entries that are not finite; {expected}")
    return array.astype(np.float32)
