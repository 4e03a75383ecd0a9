"""What the comparison with others rests on."""

from __future__ import annotations

import torch

from benchmarks.cost_accuracy import CUTS, Case, cases
from benchmarks.peers import with_convolution_shortcuts
from models.networks import build
from tests.zoo import randomised
from utils.spec import ModelSpec


def test_option_b_with_copied_channels_computes_what_option_a_does():
    torch.manual_seed(0)
    padded = randomised(build(ModelSpec("resnet20", 10, 32))).eval()
    convolved = build(ModelSpec("resnet20-b", 10, 32)).eval()
    convolved.load_state_dict(with_convolution_shortcuts(padded.state_dict()))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(convolved(images), padded(images), atol=1e-5, rtol=1e-5)


def test_cases_leave_out_what_cannot_be(monkeypatch):
    monkeypatch.setattr("benchmarks.cost_accuracy.network_of", lambda weights: weights)
    options = type("Options", (), {"seeds": [0, 1], "budgets": [0.5, 0.3], "epochs": [0, 1, 6], "weights": ["resnet56", "resnet56-b"]})
    options.methods = ["default", "rank", "in two cuts", "torch-pruning", "from scratch", "dense, trained more"]
    assert set(options.methods[:2]) <= set(CUTS)
    found = list(cases(options))
    assert all(isinstance(case, Case) for case in found)
    rows = {(case.network, case.method, case.budget, case.seed, case.epochs) for case in found}
    assert len(rows) == len(found)
    assert not any(method == "torch-pruning" and network == "resnet56" for network, method, *_ in rows)  # option A
    assert {epochs for _, method, _, _, epochs in rows if method == "rank"} == {0}
    assert {epochs for _, method, _, _, epochs in rows if method == "from scratch"} == {1, 6}
    assert {epochs for _, method, _, _, epochs in rows if method == "in two cuts"} == {0, 6}
    assert {seed for *_, budget, seed, _ in rows if budget == 0.3} == {0}
