"""The quantizer of --quantize-eval and the --qe-* flags, under Distiller's names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from compression.quantizers.post_training import PostTrainLinearQuantizer
from compression.schedule.reading import read_quantizer
from compression.training.arguments import PostTrainingArguments
from utils.errors import UserError
from utils.options import Place, build

OPTIONS = {
    "qe_mode": "mode",
    "qe_bits_acts": "bits_activations",
    "qe_bits_wts": "bits_parameters",
    "qe_bits_accum": "bits_accum",
    "qe_clip_acts": "clip_acts",
    "qe_clip_n_stds": "clip_n_stds",
    "qe_per_channel": "per_channel_wts",
    "qe_stats_file": "model_activation_stats",
}


def requested_quantizer(arguments: PostTrainingArguments) -> PostTrainLinearQuantizer | None:
    """Return the quantizer that the flags describe, or None without --quantize-eval.

    Raises:
        UserError: a value is invalid, or flags contradict each other.
    """
    fields = dataclasses.fields(PostTrainingArguments)
    given = {field.name: getattr(arguments, field.name) for field in fields if getattr(arguments, field.name) != field.default}
    if not given.pop("quantize_eval", False):
        if given:
            raise UserError(f"{_spelt(next(iter(given)))} needs --quantize-eval")
        return None
    if given.pop("qe_config_file", ""):
        if given:
            raise UserError(f"--qe-config-file and {_spelt(next(iter(given)))} exclude each other; write it into the file")
        quantizer = read_quantizer(Path(arguments.qe_config_file))
        if not isinstance(quantizer, PostTrainLinearQuantizer):
            raise UserError(f"{arguments.qe_config_file}: {type(quantizer).__name__} is for training; give the file to --compress")
        return quantizer
    return build(PostTrainLinearQuantizer, {OPTIONS[name]: value for name, value in given.items()}, Place("--quantize-eval", {}, {}))


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"
