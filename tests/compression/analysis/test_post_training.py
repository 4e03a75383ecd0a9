"""Post-training quantization from the command line: --quantize-eval and --qe-*."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from compression.analysis.post_training import requested_quantizer
from compression.exporting.learned import learned_ranges
from compression.quantizers.modes import Modes
from compression.training.arguments import TrainArguments
from models.loading import load_classifier
from tests.conftest import ROOT
from utils.errors import UserError

WEIGHTS = str(ROOT / "weights/digits.pt")
QUANTIZE = ("--weights", WEIGHTS, "--quantize-eval", "--workers", 0)
DOREFA = "quantizers:\n  few: {class: DorefaQuantizer, bits_weights: 2}\n"


def test_flags_say_what_a_file_says(tmp_path):
    by_flags = TrainArguments(
        quantize_eval=True, qe_mode="ASYM_S", qe_bits_wts=4, qe_bits_accum=20, qe_clip_acts="AVG", qe_per_channel=True
    )
    values = {"mode": "asym_s", "bits_parameters": 4, "bits_accum": 20, "clip_acts": "avg", "per_channel_wts": True}
    content = {"quantizers": {"after": {"class": "PostTrainLinearQuantizer", **values}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    by_file = TrainArguments(quantize_eval=True, qe_config_file=str(tmp_path / "a.yaml"))
    quantizer = requested_quantizer(by_flags)
    assert quantizer == requested_quantizer(by_file)
    assert (quantizer.mode, quantizer.bits_activations, quantizer.bits_weights) == (Modes("asym_s", "asym_s"), 8, 4)
    assert requested_quantizer(TrainArguments()) is None


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ({"qe_bits_wts": 4}, "", "--qe-bits-wts needs --quantize-eval"),
        ({"quantize_eval": True, "qe_bits_acts": 0}, "", "bits_activations: is 0; it must be at least 1"),
        ({"quantize_eval": True, "qe_clip_acts": "gaus"}, "", "clip_acts.*Did you mean 'gauss'"),
        ({"quantize_eval": True, "qe_config_file": "F", "qe_per_channel": True}, DOREFA, "--qe-config-file and --qe-per-channel exclude"),
        ({"quantize_eval": True, "qe_config_file": "F"}, DOREFA, "DorefaQuantizer is for training"),
        ({"quantize_eval": True, "qe_config_file": "F"}, f"{DOREFA}policies: []\n", "'policies' does not belong there"),
        ({"quantize_eval": True, "qe_config_file": "F"}, f"{DOREFA}  more: {{class: WRPNQuantizer}}\n", "must be one, not 2"),
    ],
)
def test_what_means_nothing_is_refused(flags, content, message, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        requested_quantizer(TrainArguments(**{key: str(tmp_path / "a.yaml") if value == "F" else value for key, value in flags.items()}))


def test_a_network_is_quantized_measured_and_saved_with_its_ranges(script, tmp_path):
    done = script("train.py", *QUANTIZE, "--evaluate", "--name", "one")
    assert done.code == 0, done.err
    assert "20 layers quantized, ranges of 256 training images\nbefore: top-1 99.30%" in done.out
    assert "next: python export.py --weights runs/train/one/weights/quantized.pt --int8" in done.out
    path = tmp_path / "runs/train/one/weights/quantized.pt"
    model = load_classifier(str(path), None).model
    statistics = yaml.safe_load((tmp_path / "runs/train/one/calibration.yaml").read_text())
    of_input = statistics["layer1.0.conv1"]["inputs"][0]  # behind a ReLU
    scale, zero_point = learned_ranges(model).inputs["layer1.0.conv1"]
    assert of_input["min"] == 0.0
    assert (scale, zero_point) == (pytest.approx(of_input["max"] / 255), 0)

    # What was printed is what the file gives; statistics of that run are as good as images.
    measured = script("val.py", "--weights", path, "--data", "digits", "--workers", 0)
    assert measured.code == 0, measured.err
    top1 = json.loads((tmp_path / "runs/val/exp/results.json").read_text())["top1"]
    assert f"after:  top-1 {top1:.2%}" in done.out
    again = script("train.py", *QUANTIZE, "--qe-stats-file", tmp_path / "runs/train/one/calibration.yaml", "--name", "two")
    assert again.code == 0, again.err
    assert f"20 layers quantized, ranges by {tmp_path}/runs/train/one/calibration.yaml\n" in again.out
    other = load_classifier(str(tmp_path / "runs/train/two/weights/quantized.pt"), None).model
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_few_bits_cost_accuracy_and_go_into_no_int8_file(script, tmp_path):
    done = script("train.py", *QUANTIZE, "--qe-bits-wts", 2)
    assert done.code == 0, done.err
    after = float(done.out.partition("after:  top-1 ")[2].partition("%")[0])
    assert after < 90
    assert "next: python val.py --weights runs/train/exp/weights/quantized.pt" in done.out
    exported = script("export.py", "--weights", "runs/train/exp/weights/quantized.pt", "--int8", "--data", "digits")
    assert exported.code == 2
    assert "conv1 is quantized with 2 bits for weights" in exported.err
