"""The flags of train.py: a field is a flag."""

from __future__ import annotations

from dataclasses import dataclass

from compression.distillation.arguments import DistillationArguments
from compression.quantizers.clipping import CLIPS
from compression.statistics.summaries import SUMMARIES
from compression.training.recipes import RECIPES
from models.quantized.numbers import MODES
from utils.arguments import check_at_least, flag, shared
from utils.data.caching import CACHES
from utils.data.datasets import SPLIT_FOLDERS
from utils.data.loaders import BALANCES
from utils.data.transforms import POLICIES, PRESETS
from utils.errors import UserError
from utils.loop.optim import OPTIMIZERS
from utils.spec import CHANNELS, FITS

GRIDS = f"{{{','.join(MODES)}}}"  # no choices, since --qe-mode also accepts Distiller's long names


@dataclass(frozen=True)
class RunArguments:
    """Flags of a training run: those of YOLOv5, under its names, and our own."""

    model: str = flag(
        "",
        "yolov5n-cls (default without --weights), resnet56, any of torchvision or timm, or a YAML",
        metavar="NAME|YAML",
        group="network",
    )
    weights: str = flag(
        "",
        "start from RankCut's or YOLOv5's checkpoint, or a state dict",
        "--exp-load-weights-from",
        metavar="PATH",
        group="network",
    )
    pretrained: bool = flag(False, "start a torchvision or timm network from its ImageNet weights (downloads them)", group="network")
    data: str = shared.data("digits", "built-in data set, folder (with train/ and val/, or with class folders), or YAML")
    download: bool = shared.download()
    max_pixels: int = shared.max_pixels()
    val_fraction: float = flag(
        0.1, "share of train to hold out if there is no val folder", "--validation-split", "--vs", metavar="SHARE", group="data"
    )
    imgsz: tuple[int, ...] | None = flag(
        None,
        "side of the input, or its height and width; default: the weights' or data's own, else 224",
        "--img",
        "--img-size",
        metavar="PIXELS",
        group="network",
        many=True,
    )
    fit: str = flag(
        "",
        "images of another shape: crop takes the middle, squash distorts, letterbox adds bars; default: the weights' own, else crop",
        choices=FITS,
        group="network",
    )
    channels: int | None = flag(None, "input channels; default: those of the weights or of the data set", choices=CHANNELS, group="network")

    epochs: int = flag(10, "passes over the training images", group="training")
    batch_size: int = flag(64, "images per batch, over all processes", "--batch", group="training")
    accumulate: int = flag(1, "batches whose gradients are added up for one optimizer step", group="training")
    recipe: str = flag(
        "",
        "values of the flags below that are not given: for training (default), for weights that were trained (default with --weights), "
        "or YOLOv5's own",
        choices=RECIPES,
        group="training",
    )
    optimizer: str | None = flag(None, "optimizer; default: the recipe's", choices=OPTIMIZERS, group="training")
    lr0: float | None = flag(None, "highest learning rate; default: the recipe's", metavar="RATE", group="training")
    lrf: float | None = flag(None, "final learning rate, as a share of lr0; default: the recipe's", metavar="SHARE", group="training")
    cos_lr: bool | None = flag(None, "lower the learning rate along a cosine instead of a line; default: the recipe's", group="training")
    warmup_epochs: float | None = flag(
        None, "epochs over which the learning rate rises from 0; default: the recipe's", metavar="EPOCHS", group="training"
    )
    momentum: float | None = flag(
        None, "momentum of SGD, Muon and RMSProp, beta1 of Adam and AdamW; default: the recipe's", group="training"
    )
    decay: float | None = flag(None, "weight decay; biases and norms have none; default: the recipe's", "--weight-decay", group="training")
    label_smoothing: float | None = flag(
        None, "share of the target that is spread over all classes; default: the recipe's", metavar="SHARE", group="training"
    )
    dropout: float | None = flag(None, "probability of all dropout layers; default: the network's own", metavar="P", group="network")
    patience: int = flag(0, "stop after this many epochs without improvement; 0: never", metavar="EPOCHS", group="training")

    augment: str | None = flag(None, "augmentation preset; default: the recipe's", choices=PRESETS, group="data")
    fliplr: float | None = flag(None, "probability of a horizontal flip; default: the data set's own", metavar="P", group="data")
    auto_augment: str | None = flag(None, "TrivialAugment or RandAugment; default: the preset's", choices=POLICIES, group="data")
    erasing: float | None = flag(None, "probability of random erasing; default: the preset's", metavar="P", group="data")
    mixup: float = flag(0.0, "share of the batches that get mixup", metavar="SHARE", group="data")
    cutmix: float = flag(0.0, "share of the batches that get cutmix", metavar="SHARE", group="data")
    balance: str = flag("none", "against skewed classes: sample them evenly, or weight the loss", choices=BALANCES, group="data")
    cache: str = flag("", "keep decoded images; ram if no value is given", const="ram", choices=CACHES, group="data")
    workers: int = shared.workers()

    freeze: tuple[str, ...] = flag(
        (), "what is not trained: the first N modules, or name patterns of modules", metavar="N|PATTERN", many=True, group="network"
    )
    freeze_norms: bool | None = flag(
        None,
        "keep batch norm's statistics as they are; default: of a network that prune.py has refitted, unless a schedule compresses it",
        group="training",
    )
    cutoff: int | None = flag(None, "keep this many layers of a YAML network, followed by a classification head", group="network")
    compress_rate: str = flag(
        "", 'build narrow: share of the channels to remove, as "[0.]+[0.15]*2+[0.4]*27", or one for all', metavar="RATES", group="pruning"
    )
    ranks: str = flag(
        "", "with --compress-rate and --weights: prune.py's rank files, which decide what stays", metavar="FOLDER", group="pruning"
    )
    refit: bool = flag(True, "with --ranks: fit the narrow network's weights to the dense network's outputs", group="pruning")

    distill: bool = flag(
        True, "distil a pruned network from the dense one that its file names, if there is no other teacher", group="distillation"
    )
    device: str = shared.device()
    amp: bool = flag(True, "mixed precision: bf16 where the device supports it, else fp16 on CUDA", group="training")
    ema: bool = flag(True, "validate and save a moving average of the weights", group="training")
    sync_bn: bool = flag(False, "synchronize batch norm over all processes (CUDA)", group="training")
    compile: bool = flag(False, "compile the network with torch.compile", group="run")
    deterministic: bool = flag(False, "deterministic operations only (slower on CUDA; CPUs are deterministic without it)", group="run")
    seed: int = flag(0, "equal seeds give equal results", group="run")
    local_rank: int = flag(-1, "set by torch.distributed.launch; torchrun does without", group="run")
    project: str = shared.project("runs/train")
    name: str = shared.name()
    exist_ok: bool = shared.exist_ok()
    nosave: bool = flag(False, "save checkpoints only at the end; the run can't be resumed", group="run")
    save_period: int = flag(0, "also keep a checkpoint every so many epochs; 0: none", metavar="EPOCHS", group="run")
    resume: str = flag(
        "",
        "continue a run: its folder or last.pt; the newest without a value",
        "--resume-from",
        metavar="RUN",
        const="newest",
        group="run",
    )
    verbose: bool = flag(False, "print the network", group="run")


@dataclass(frozen=True)
class ScheduleArguments:
    """Flags of compression schedules and their reports, under Distiller's names."""

    compress: str = flag("", "schedule: what to prune, quantize or distil, and when", "--schedule", metavar="YAML", group="schedule")
    dry_run: bool = flag(False, "with --compress: print what the schedule would do in each epoch, and exit", group="schedule")
    reset_optimizer: bool = flag(False, "with --resume-from: take only the weights and start again at epoch 0", group="run")
    effective_train_size: float = flag(1.0, "share of the training images in an epoch, drawn anew for each", metavar="SHARE", group="data")
    print_freq: int = flag(0, "print the loss and its parts every so many batches; 0: never", "-p", metavar="BATCHES", group="run")
    masks_sparsity: bool = flag(False, "print the sparsity of the masks after every epoch", group="schedule")
    param_hist: bool = flag(False, "write histograms of the parameters to TensorBoard after every epoch", group="analysis")
    act_stats: str = flag(
        "",
        "each epoch, write statistics of the activations to CSV, YAML and TensorBoard",
        choices=SPLIT_FOLDERS,
        group="analysis",
    )
    confusion: bool = flag(False, "print the confusion matrix at the end", group="analysis")


@dataclass(frozen=True)
class PostTrainingArguments:
    """Flags of post-training quantization, under Distiller's names."""

    quantize_eval: bool = flag(
        False, "quantize --weights, calibrated on training images, into weights/quantized.pt, and measure", "--qe", group="quantization"
    )
    qe_config_file: str = flag(
        "", "YAML with a PostTrainLinearQuantizer, in place of the other --qe flags", "--qecf", metavar="YAML", group="quantization"
    )
    qe_mode: str = flag("", "grid; default: asym_u for inputs, sym_restr for weights", "--qem", metavar=GRIDS, group="quantization")
    qe_bits_acts: int = flag(8, "bits of the layers' inputs; 32 leaves them in float", "--qeba", metavar="BITS", group="quantization")
    qe_bits_wts: int = flag(8, "bits of the weights; 32 leaves them in float", "--qebw", metavar="BITS", group="quantization")
    qe_bits_accum: int = flag(32, "bits at which sums of products saturate", "--qebacc", metavar="BITS", group="quantization")
    qe_clip_acts: str = flag("none", "how the range of an input is clipped", "--qeca", choices=CLIPS, group="quantization")
    qe_clip_n_stds: float = flag(2.0, "number of standard deviations for n_std", "--qecns", group="quantization")
    qe_per_channel: bool = flag(False, "one grid per output channel of the weights", "--qepcw", group="quantization")
    qe_stats_file: str = flag("", "calibration.yaml of an earlier run, to reuse", "--qesf", metavar="YAML", group="quantization")


@dataclass(frozen=True)
class AnalysisArguments(PostTrainingArguments):
    """Flags that inspect, thin or quantize a network without training it."""

    summary: str = flag("", "print a summary of the network and exit", choices=SUMMARIES, group="analysis")
    sense: str = flag(
        "",
        "sensitivity analysis: prune each layer alone, by these, and measure",
        metavar="{element,filter,channel}",
        group="analysis",
    )
    sense_range: tuple[float, ...] = flag(
        (0.0, 0.95, 0.05), "sparsities of --sense: start, stop and step", metavar="SHARE", many=True, group="analysis"
    )
    thinnify: bool = flag(False, "physically remove the all-zero filters of --weights; writes weights/thinned.pt", group="analysis")
    evaluate: bool = flag(False, "only measure --weights on the validation images", group="analysis")

    @property
    def looks_only(self) -> bool:
        """Whether the network is not trained, so that --resume-from names its weights and no run to continue."""
        return bool(self.summary or self.sense or self.thinnify or self.quantize_eval or self.evaluate)


@dataclass(frozen=True)
class TrainArguments(AnalysisArguments, DistillationArguments, ScheduleArguments, RunArguments):
    """Flags of train.py."""

    def check_counts(self, processes: int) -> None:
        """Check the numbers that count something.

        Raises:
            UserError: one is too small, or the processes can't share a batch evenly.
        """
        check_at_least(self, epochs=1, batch_size=1, accumulate=1, patience=0, save_period=0, seed=0, print_freq=0)
        if self.batch_size % processes:
            raise UserError(f"batch-size {self.batch_size} must be a multiple of the {processes} processes")
