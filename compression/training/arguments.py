"""What a training run can be told: one field is one flag of train.py."""

from __future__ import annotations

from dataclasses import dataclass

from compression.distillation.losses import DistillationArguments
from utils.arguments import flag
from utils.errors import UserError


@dataclass(frozen=True)
class RunArguments:
    """Flags of a training run: YOLOv5's, under their names and defaults, and ours."""

    # what and from what
    model: str = flag(
        "",
        "network: a name (yolov5n-cls, resnet56, any of torchvision or timm) or a YAML; yolov5n-cls without --weights",
    )
    weights: str = flag("", "checkpoint to start from: ours, a plain state dict, or an official YOLOv5 *-cls.pt", "--exp-load-weights-from")
    pretrained: bool = flag(False, "start a torchvision or timm network from its ImageNet weights (downloads them)")
    data: str = flag("digits", "built-in data set, folder (train/ and val/, or class folders), or YAML")
    download: bool = flag(False, "fetch a built-in data set that is not in data/")
    val_fraction: float = flag(
        0.1, "share of train that is held out for validation where there is no val folder", "--validation-split", "--vs"
    )
    imgsz: int | None = flag(None, "side of the input, pixels; the weights' or the data set's own, else 224", "--img", "--img-size")
    channels: int | None = flag(None, "input channels, 1 or 3; the weights' or the data set's own")
    # how long, how fast
    epochs: int = flag(10, "passes over the training images")
    batch_size: int = flag(64, "images per optimizer step (before --accumulate), over all processes", "--batch")
    accumulate: int = flag(1, "batches whose gradients are added up before an optimizer step")
    optimizer: str = flag("Adam", "SGD, Adam, AdamW or RMSProp")
    lr0: float = flag(1e-3, "initial learning rate")
    lrf: float = flag(0.01, "final learning rate, as a share of lr0")
    cos_lr: bool = flag(False, "fall along a cosine instead of a line")
    warmup_epochs: float = flag(0.0, "epochs over which the learning rate rises from 0")
    momentum: float = flag(0.9, "SGD's and RMSProp's momentum, Adam's beta1")
    decay: float = flag(5e-5, "weight decay, of weights only", "--weight-decay")
    label_smoothing: float = flag(0.1, "share of the target spread over all classes")
    dropout: float | None = flag(None, "probability of every dropout layer; the network's own where not given")
    patience: int = flag(0, "stop after so many epochs without improvement; 0 = never")
    # what the images go through
    augment: str | None = flag(None, "none, light, default or strong; the data set's own preset where not given")
    fliplr: float | None = flag(None, "probability of a mirror image; the data set's own where not given")
    auto_augment: str | None = flag(None, "none, trivial (TrivialAugment) or rand (RandAugment); the preset's where not given")
    erasing: float | None = flag(None, "probability of random erasing; the preset's where not given")
    mixup: float = flag(0.0, "share of the batches that are mixed up")
    cutmix: float = flag(0.0, "share of the batches that are cut and mixed")
    balance: str = flag("none", "against skewed classes: none, sampler (draw every class equally often) or weights (in the loss)")
    cache: str = flag("", "keep decoded images: ram or disk", const="ram")
    workers: int = flag(8, "processes that load images, at most; never more than the cores")
    # which part of the network
    freeze: tuple[str, ...] = flag((), "modules that do not train: a number (the first so many layers) or name patterns", many=True)
    cutoff: int | None = flag(None, "keep so many layers of a YAML network and put a classification head behind them")
    compress_rate: str = flag(
        "", 'build narrow: share of the channels that goes, by entry, "[0.]+[0.15]*2+[0.4]*27"; or one number for all'
    )
    ranks: str = flag("", "with --compress_rate and --weights: folder of rank files (prune.py writes it) that say which channels stay")
    # how it computes
    device: str = flag("", "cpu, cuda, a CUDA device's number, mps; the first CUDA device or the CPU where not given")
    amp: bool = flag(True, "mixed precision: bf16 where the device has it, else fp16 on CUDA")
    ema: bool = flag(True, "validate and save a moving average of the weights")
    sync_bn: bool = flag(False, "batch norm over all processes (CUDA)")
    compile: bool = flag(False, "compile the network with torch.compile")
    deterministic: bool = flag(False, "only deterministic operations (slower on CUDA; the CPU needs it not)")
    seed: int = flag(0, "same seed, same result")
    local_rank: int = flag(-1, "set by torch.distributed.launch; torchrun needs it not")
    # what is kept
    project: str = flag("runs/train", "folder of the runs")
    name: str = flag("exp", "name of the run; a number is added where it is taken")
    exist_ok: bool = flag(False, "write into the folder of that name, whatever it holds")
    nosave: bool = flag(False, "write checkpoints at the end only (such a run can't be resumed)")
    save_period: int = flag(0, "also keep a checkpoint every so many epochs; 0 = none")
    resume: str = flag("", "go on with a run: its folder or weights/last.pt; without a value the newest", "--resume-from", const="newest")
    verbose: bool = flag(False, "print the network")


@dataclass(frozen=True)
class ScheduleArguments:
    """Flags of compression schedules and of what they report, under Distiller's names."""

    compress: str = flag("", "compression schedule (YAML): what to prune, regularize, distil, and when", "--schedule")
    dry_run: bool = flag(False, "with --compress: print what its schedule would do, epoch by epoch, and end")
    reset_optimizer: bool = flag(False, "with --resume-from: take the weights only, and begin anew at epoch 0")
    effective_train_size: float = flag(1.0, "share of the training images that an epoch sees, other ones in each epoch")
    print_freq: int = flag(0, "print the loss and its parts every so many batches; 0 = never", "-p")
    masks_sparsity: bool = flag(False, "print the masks' sparsity after every epoch")
    param_hist: bool = flag(False, "histograms of the parameters to TensorBoard, every epoch")
    act_stats: str = flag("", "statistics of the activations on train, val or test, to CSV, YAML and TensorBoard, every epoch")
    confusion: bool = flag(False, "print the confusion matrix at the end")


@dataclass(frozen=True)
class PostTrainingArguments:
    """Flags of post-training quantization."""

    quantize_eval: bool = flag(False, "quantize --weights after training, on training images; writes weights/quantized.pt", "--qe")
    qe_config_file: str = flag("", "YAML with a PostTrainLinearQuantizer under quantizers, instead of the other --qe flags", "--qecf")
    qe_mode: str = flag("", "grid: sym, sym_restr, asym_s or asym_u; asym_u for inputs, sym_restr for weights where not given", "--qem")
    qe_bits_acts: int = flag(8, "bits of the layers' inputs; 32 leaves them as they are", "--qeba")
    qe_bits_wts: int = flag(8, "bits of the weights; 32 leaves them as they are", "--qebw")
    qe_bits_accum: int = flag(32, "bits of the accumulators, at which sums of products saturate", "--qebacc")
    qe_clip_acts: str = flag("none", "which part of an input's range is kept: none, avg, n_std, gauss or laplace", "--qeca")
    qe_clip_n_stds: float = flag(2.0, "standard deviations of n_std", "--qecns")
    qe_per_channel: bool = flag(False, "a grid of the weights for each output channel", "--qepcw")
    qe_stats_file: str = flag("", "calibration.yaml of another such run, instead of measuring", "--qesf")


@dataclass(frozen=True)
class AnalysisArguments(PostTrainingArguments):
    """Flags that look at a network, thin or quantize it, and train nothing."""

    summary: str = flag("", "print a summary of the network and end: sparsity, compute, model or modules")
    sense: str = flag("", "sensitivity analysis on the validation images: element, filter or channel")
    sense_range: tuple[float, ...] = flag((0.0, 0.95, 0.05), "sparsities of --sense: start stop step", many=True)
    thinnify: bool = flag(False, "remove the filters of --weights that are zero, physically; writes weights/thinned.pt")
    evaluate: bool = flag(False, "only measure --weights on the validation images")

    @property
    def looks_only(self) -> bool:
        """Whether a network is only looked at, so that --resume-from means its weights and no run that goes on."""
        return bool(self.summary or self.sense or self.thinnify or self.quantize_eval or self.evaluate)


@dataclass(frozen=True)
class TrainArguments(AnalysisArguments, DistillationArguments, ScheduleArguments, RunArguments):
    """Flags of train.py."""

    def check_counts(self, processes: int) -> None:
        """Check the numbers that count something.

        Raises:
            UserError: one is too small, or a batch can't be shared by the processes.
        """
        limits = {"epochs": 1, "batch_size": 1, "accumulate": 1, "patience": 0, "save_period": 0, "seed": 0, "print_freq": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.batch_size % processes:
            raise UserError(f"batch-size {self.batch_size} must be a multiple of the {processes} processes")
