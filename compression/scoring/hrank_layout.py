"""Under which names HRank's files hold the ranks of the convolutions of its networks (github.com/lmbxmu/HRank, rank_conv/).

Mostly ``rank_conv{k}.npy`` holds those of the k-th convolution's maps, counted where maps that are added up count once. Here are
the networks where it is otherwise. A shortcut's convolution in ResNet-50 has a file of its own, though its maps are added to
those of the branch: HRank measures both behind the sum, so the two files hold the same numbers, and the branch's counts. In
GoogLeNet a block's four outputs have a file each, and HRank cuts both 3x3 convolutions of the third branch by the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from compression.scoring.feature_maps import Tap
from models.networks.googlenet import INCEPTIONS

Files = dict[str, tuple[str, ...]]  # name of a file -> the modules that it scores; the first one's maps were measured


def _resnet50() -> Files:
    files = [("conv1",)]
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for block in range(depth):
            layer = f"layer{stage}.{block}"
            files += [(f"{layer}.conv1",), (f"{layer}.conv2",)]
            files += [] if block else [(f"{layer}.downsample.0",)]
            files += [(f"{layer}.conv3",)]
    return {f"conv{k}": modules for k, modules in enumerate(files, 1)}


def _googlenet() -> Files:
    files: Files = {"conv1": ("pre_layers.0",)}
    for k, name in enumerate(INCEPTIONS, 2):
        files |= {
            f"conv{k}_n1x1": (f"{name}.branch1x1.0",),
            f"conv{k}_n3x3": (f"{name}.branch3x3.3",),
            f"conv{k}_n5x5": (f"{name}.branch5x5.6", f"{name}.branch5x5.3"),
            f"conv{k}_pool_planes": (f"{name}.branch_pool.1",),
        }
    return files


LAYOUTS: Mapping[str, Callable[[], Files]] = {"resnet50": _resnet50, "googlenet-cifar": _googlenet}
UNCUT = {"vgg16-cifar": {"conv13"}}  # files that may be missing: HRank never cuts these convolutions


def files_to_write(model_name: str, taps: Sequence[Tap]) -> dict[str, list[str]]:
    """Return the names of the files that hold each tap's ranks; what HRank has no file for is named by its module."""
    if model_name not in LAYOUTS:
        return {tap.name: [tap.name] for tap in taps}
    files = LAYOUTS[model_name]()
    found = {}
    for tap in taps:
        modules = [weight.removesuffix(".weight") for weight in tap.weights]
        found[tap.name] = [name for name, scored in files.items() if scored[0] in modules] or modules[:1]
    return found


def file_to_read(model_name: str, tap: Tap) -> str | None:
    """Return the name of the file of HRank's that counts for a tap; None if it has none."""
    if model_name not in LAYOUTS:
        return tap.name
    branch = tap.weights[0].removesuffix(".weight")
    return next((name for name, scored in LAYOUTS[model_name]().items() if branch in scored), None)


def may_be_missing(model_name: str, name: str) -> bool:
    """Return whether a folder of HRank's may lack a file."""
    return name in UNCUT.get(model_name, ())
