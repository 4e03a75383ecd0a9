"""The flags of prune.py: a field is a flag."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from compression.latency.runtimes import PRECISIONS, RUNTIMES, check_runtime
from compression.pruning.allocation import ALLOCATIONS, check_share
from compression.pruning.rates import parse_rates
from compression.scoring.criteria import CRITERIA
from utils import distributed
from utils.arguments import check_at_least, flag, shared
from utils.errors import UserError

AMOUNTS = ("compress_rate", "macs", "params", "latency", "latency_ms", "sweep", "max_drop")
MANY, FEW, SMALL = 1024, 512, 96  # images that a cut is made on: many where they have at most so many pixels a side


@dataclass(frozen=True)
class PruneArguments:
    """Flags of prune.py."""

    weights: str = flag("", "classifier: RankCut's own, a plain state dict, or YOLOv5's *-cls.pt", metavar="PATH", group="network")
    model: str = flag(
        "",
        "architecture, for a plain state dict without one; with --dry-run in place of --weights",
        metavar="NAME",
        group="network",
    )
    num_classes: int = flag(1000, "outputs of --model without --weights", group="network")
    data: str = shared.data("digits", "training images for the scores, validation images for the accuracy")
    download: bool = shared.download()
    max_pixels: int = shared.max_pixels()
    imgsz: tuple[int, ...] | None = shared.imgsz()

    compress_rate: str = flag(
        "", 'share of the channels to remove, as "[0.]+[0.15]*2+[0.4]*27", or one for all entries', metavar="RATES", group="pruning"
    )
    macs: float | None = flag(None, "share of the multiply-adds to keep", metavar="SHARE", group="pruning")
    params: float | None = flag(None, "share of the parameters to keep", metavar="SHARE", group="pruning")
    sweep: tuple[float, ...] = flag((), "cut to each of these shares, a file each", metavar="SHARE", many=True, group="pruning")
    max_drop: float | None = flag(
        None, "cut as far as top-1 on the validation images falls by no more than this", metavar="SHARE", group="pruning"
    )
    by: str = flag("macs", "what the shares of --sweep and --max-drop are of", choices=("macs", "params", "latency"), group="pruning")
    latency: float | None = flag(
        None, "share of the dense network's time to keep, in the runtime that will run it", group="latency", metavar="SHARE"
    )
    latency_ms: float | None = flag(None, "milliseconds that the network may take there", group="latency", metavar="MS")
    runtime: str = flag("", "what will run it (default: onnxruntime where it is installed)", choices=RUNTIMES, group="latency")
    precision: str = flag("fp32", "of the file that will run", choices=PRECISIONS, group="latency")
    threads: int = flag(0, "threads that will run it (default: those of torch)", metavar="N", group="latency")
    latency_batch: int = flag(1, "images per pass when it runs", metavar="N", group="latency")
    latency_table: str = flag("", "times of another device, from benchmarks/device_probe.py", metavar="FILE", group="latency")
    write_probes: str = flag("", "also write the files that device_probe.py times on another device", metavar="FOLDER", group="latency")
    allocation: str = flag(
        "",
        "spread a budget evenly, or where it is measured to cost the least (default; a dry run, which measures nothing, spreads evenly)",
        choices=ALLOCATIONS,
        group="pruning",
    )
    round_to: int = flag(8, "with a budget: keep multiples of this many channels", metavar="CHANNELS", group="pruning")
    min_channels: int = flag(1, "with a budget: fewest channels to keep in a group", metavar="CHANNELS", group="pruning")
    exclude: tuple[str, ...] = flag((), "name patterns of groups that are not cut", metavar="PATTERN", many=True, group="pruning")
    criterion: str = flag(
        "",
        f"how channels are scored: {', '.join(CRITERIA)}; list explains them; default: reconstruction for a budget, HRank's rank "
        "(taylor, where activations are never zero) for --compress-rate",
        choices=(*CRITERIA, "list"),
        metavar="CRITERION",
        group="pruning",
    )
    ranks: str = flag("", "take the scores from the rank files in this folder", metavar="FOLDER", group="pruning")
    images: int | None = flag(
        None, f"training images used for the scores and the refit (default: {MANY}, above {SMALL} px {FEW})", group="data"
    )
    batch_size: int = flag(32, "images per forward pass", "--batch", group="run")
    refit: bool = flag(
        True, "after the cut, fit the weights that remain to the dense network's outputs; labels are not used", group="pruning"
    )
    recalibrate_bn: bool = flag(
        False, "measure batch norm's statistics again in any case; by default a refit decides whether that helps", group="pruning"
    )
    controls: bool = flag(False, "also prune by L1, at random, and at random widths of the same cost, to compare", group="pruning")

    dry_run: bool = flag(False, "print the groups and the widths after the cut, and exit", group="run")
    json: str = flag("", "with --dry-run: also write what results.json would contain", metavar="PATH", group="run")
    seed: int = flag(0, "equal seeds give equal cuts", group="run")
    device: str = shared.device()
    workers: int = shared.workers()
    project: str = shared.project("runs/prune")
    name: str = shared.name()
    exist_ok: bool = shared.exist_ok()

    def images_for(self, imgsz: int) -> int:
        """Return how many training images are used at an image size: what they cost grows with it."""
        return self.images or (MANY if imgsz <= SMALL else FEW)

    @property
    def asks_for_time(self) -> bool:
        """Whether the budget is a time."""
        several = bool(self.sweep) or self.max_drop is not None
        return self.latency is not None or self.latency_ms is not None or (several and self.by == "latency")

    @property
    def runtime_name(self) -> str:
        """The runtime that times are for."""
        return self.runtime or ("onnxruntime" if find_spec("onnxruntime") and find_spec("onnx") else "torch")

    @property
    def measures_damage(self) -> bool:
        """Whether a budget is spread by what a cut is measured to cost."""
        by_default = not self.dry_run and not self.compress_rate
        return self.allocation == "sensitivity" or (not self.allocation and by_default)


def check_arguments(arguments: PruneArguments) -> None:
    """Refuse what can't be done before anything is loaded.

    Raises:
        UserError: a value is out of range, flags do not go together, or the amount is not given exactly once.
    """
    given = [name for name in AMOUNTS if getattr(arguments, name) not in ("", None, ())]
    amounts = [f"--{name if name == 'compress_rate' else name.replace('_', '-')}" for name in given]
    if len(amounts) > 1:
        raise UserError(f"{' and '.join(amounts)} exclude each other")
    if not amounts and not arguments.dry_run:
        raise UserError(
            "say how much goes: --compress_rate (share of the channels that goes), --macs, --params or --latency (share that stays)"
        )
    if arguments.compress_rate:
        parse_rates(arguments.compress_rate)
        if arguments.allocation == "sensitivity":
            raise UserError("--allocation sensitivity is for a budget (--macs or --params); --compress_rate sets the widths itself")
    for name in ("macs", "params", "latency"):
        if (share := getattr(arguments, name)) is not None:
            check_share(name, share)
    _check_several(arguments)
    check_at_least(arguments, round_to=1, min_channels=1, batch_size=1, num_classes=1, seed=0, threads=0, latency_batch=1)
    _check_latency(arguments)
    if arguments.images is not None:
        check_at_least(arguments, images=1)
    if arguments.recalibrate_bn and min(arguments.images or FEW, arguments.batch_size) < 2:
        raise UserError("--recalibrate-bn needs --images and --batch-size of at least 2: one image may have no variance")
    if not arguments.weights and not (arguments.dry_run and arguments.model):
        raise UserError("give --weights; with --dry-run, --model NAME and --num-classes N will do")
    if arguments.ranks and arguments.criterion not in ("", "rank"):
        raise UserError(f"--ranks gives the scores, so --criterion {arguments.criterion} can't be used too")
    if arguments.json and not arguments.dry_run:
        raise UserError("--json needs --dry-run; without it the results are written to results.json in the run's folder")


def _check_latency(arguments: PruneArguments) -> None:
    if arguments.asks_for_time:
        if arguments.latency_ms is not None and not 0 < arguments.latency_ms < float("inf"):
            raise UserError(f"latency-ms is {arguments.latency_ms}; it must be above 0")
        if arguments.allocation == "uniform":
            raise UserError("--allocation uniform is for --macs or --params; a latency is kept by what is measured")
        if not arguments.dry_run:
            check_runtime(arguments.runtime_name, arguments.precision)
        if distributed.launched():
            raise UserError("--latency measures times, which several processes on one machine disturb; run it without torchrun")
        return
    for name in ("runtime", "threads", "latency_table", "write_probes"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} is for a budget of time: give --latency or --latency-ms too")
    if arguments.precision != "fp32" or arguments.latency_batch != 1:
        raise UserError("--precision and --latency-batch are for a budget of time: give --latency or --latency-ms too")


def _check_several(arguments: PruneArguments) -> None:
    if not arguments.sweep and arguments.max_drop is None:
        if arguments.by != "macs":
            raise UserError("--by is for --sweep and --max-drop")
        return
    for share in arguments.sweep:
        check_share("sweep", share)
    if arguments.max_drop is not None and not 0 <= arguments.max_drop < 1:
        raise UserError(f"max-drop is {arguments.max_drop}; it is a share of the images, in [0, 1)")
    flag = "--sweep" if arguments.sweep else "--max-drop"
    for name, wrong in (("dry-run", arguments.dry_run), ("controls", arguments.controls), ("torchrun", distributed.launched())):
        if wrong:
            raise UserError(f"{flag} does not go with {'torchrun' if name == 'torchrun' else f'--{name}'}")
