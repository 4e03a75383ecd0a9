"""Export -> predict for the table of architectures, dense and pruned, in every format, fp32 and int8.

VGG-16, cut, runs with the suite; test_exporting.py has a YOLOv5 that was cut and a CIFAR-ResNet that was not.
``python -m pytest -m exhaustive`` runs the others.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from compression.exporting import run
from compression.exporting.arguments import ExportArguments
from compression.pruning.narrowing import build_narrow
from models.backends import TorchBackend, open_backend
from models.loading import load_classifier
from models.networks import ARCHITECTURES, build
from models.prediction import predict
from tests.conftest import CLASSES
from tests.zoo import randomised
from utils.data.sources import open_source
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

CPU = torch.device("cpu")
QUICK = {("resnet20", "0.4")}
CASES = [
    pytest.param(name, rate, marks=() if (name, rate) in QUICK else pytest.mark.exhaustive, id=f"{name}-{rate or 'dense'}")
    for name in ARCHITECTURES
    for rate in ("", "0.4")
]
# Of int8 outputs, relative to their scale; 0.25 was seen a hundred layers deep, with random weights, which add rounding up.
TOLERANCE = 0.35
INT8 = ("onnx", *(["openvino"] if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf") else []))


def probabilities(backend, folder, batch):
    found = predict(backend, open_source(str(folder)), batch, topk=3)
    return {str(prediction.item.path): dict(prediction.topk) for prediction in found}


@pytest.mark.usefixtures("few_passes")
@pytest.mark.parametrize(("name", "rate"), CASES)
def test_files_predict_what_the_network_predicts(name, rate, photos, tmp_path):
    torch.manual_seed(0)
    spec = ModelSpec(name, 3, 32, 1 if rate else 3, tuple(CLASSES))  # the pruned ones take grey images
    narrow = build_narrow(spec, rate) if rate else None
    model = randomised(narrow.model if narrow else build(spec))
    layers = [key for key, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    content = {"spec": (narrow.spec if narrow else spec).to_dict(), "plan": {"kept": {}, "widths": dict(narrow.widths)} if narrow else None}
    save_checkpoint(tmp_path / "a.pt", {**content, "state_dict": model.state_dict()})
    flags = {"dynamic": True, "data": str(photos), "images": 8, "workers": 0}
    rows = []
    for include, int8 in ((INT8, True), (("torchscript",), False)):
        a = ExportArguments(str(tmp_path / "a.pt"), include=include, int8=int8, **flags)
        rows += run.run_export(a, run.prepare_export(a), tmp_path).files
    eager = TorchBackend(load_classifier(str(tmp_path / "a.pt"), None), CPU)
    expected = probabilities(eager, photos / "train", 32)
    assert len(expected) == 36
    assert [row.precision for row in rows] == [*["fp32", "int8"] * len(INT8), "fp32"]
    for row in rows:
        backend = open_backend(row.path, CPU)
        assert backend.spec.class_names == tuple(CLASSES)
        if row.precision == "int8":
            assert sorted(row.int8_layers) == sorted(layers)
            assert row.max_difference < TOLERANCE, row.format
        for batch in (1, 32):
            found = probabilities(backend, photos / "train", batch)
            assert found.keys() == expected.keys()
            if row.precision == "fp32":
                assert all(found[path] == pytest.approx(expected[path], abs=1e-4) for path in expected), row.format
