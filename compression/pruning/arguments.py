"""What a pruning run can be told: one field is one flag of prune.py."""

from __future__ import annotations

from dataclasses import dataclass

from utils.arguments import flag


@dataclass(frozen=True)
class PruneArguments:
    """Flags of prune.py."""

    # what and on what
    weights: str = flag("", "trained classifier to cut: ours, a plain state dict, or an official YOLOv5 *-cls.pt")
    model: str = flag("", "architecture: of a plain state dict that does not tell; or, with --dry-run, instead of --weights")
    num_classes: int = flag(1000, "outputs of --model without --weights")
    data: str = flag("digits", "built-in data set, folder, or YAML: train gives the images to score on, val the accuracy")
    download: bool = flag(False, "fetch a built-in data set that is not in data/")
    imgsz: int | None = flag(None, "side of the input, pixels; the weights' own where not given", "--img", "--img-size")
    # how much goes
    compress_rate: str = flag("", 'share of the channels that goes, by entry, "[0.]+[0.15]*2+[0.4]*27"; or one number for all')
    macs: float | None = flag(None, "share of the multiply-adds that stays")
    params: float | None = flag(None, "share of the parameters that stays")
    allocation: str = flag("uniform", "how a budget is spread: uniform, or sensitivity (measured: where it costs least)")
    round_to: int = flag(8, "with a budget: keep channels in multiples of this")
    min_channels: int = flag(1, "with a budget: fewest channels that stay of a group")
    exclude: tuple[str, ...] = flag((), "name patterns of groups that stay whole", many=True)
    # which go
    criterion: str = flag("", "what scores the channels; prune.py --criterion list prints them; by the network where not given")
    ranks: str = flag("", "use the rank files in this folder instead of measuring")
    images: int = flag(512, "training images to score on")
    batch_size: int = flag(32, "images per forward pass", "--batch")
    recalibrate_bn: bool = flag(False, "measure batch norm's statistics anew on the images, after the cut")
    controls: bool = flag(False, "also cut by L1, at random, and at random widths of the same cost, and print each accuracy")
    # the run
    dry_run: bool = flag(False, "print the groups and the widths that would be cut, and end")
    json: str = flag("", "with --dry-run: also write what results.json would hold to this file")
    seed: int = flag(0, "same seed, same cut")
    device: str = flag("", "cpu, cuda, a CUDA device's number, mps; the first CUDA device or the CPU where not given")
    workers: int = flag(8, "processes that load images, at most; never more than the cores")
    project: str = flag("runs/prune", "folder of the runs")
    name: str = flag("exp", "name of the run; a number is added where it is taken")
    exist_ok: bool = flag(False, "write into the folder of that name, whatever it holds")
