"""What docs/how-a-cut-works.md says beside its computed tables: both proofs, and what each of them refuses."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch

from compression.tracing.cutting import NotProved, prove_channels, prove_outputs
from docs.four_layers import INPUT, KEEP, Swapped, dense_steps, shrunk_network, shrunk_steps
from tests.conftest import ROOT
from tests.docs.conftest import blocks

PAGE = ROOT / "docs" / "how-a-cut-works.md"
SAYS = [block.strip() for block in blocks(PAGE, "text")]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_cut_of_the_page_is_proved():
    shrunk, dense, graph = shrunk_network()
    prove_channels(shrunk, graph, KEEP, INPUT)
    assert prove_outputs(shrunk, dense, graph, KEEP, IMAGES) < 1e-4


def test_the_second_trace_has_the_numbers_of_the_first_without_those_that_go():
    gone = {8, 20, 31, 34}
    assert [step.numbers for step in shrunk_steps()] == [tuple(n for n in step.numbers if n not in gone) for step in dense_steps()]


def test_the_structural_proof_refuses_another_order_of_the_concatenation():
    shrunk, _, graph = shrunk_network()
    swapped = Swapped()
    for name, layer in shrunk.named_children():
        setattr(swapped, name, deepcopy(layer))
    assert swapped(IMAGES).shape == (8, 2)  # every shape fits
    with pytest.raises(NotProved) as refusal:
        prove_channels(swapped, graph, KEEP, INPUT)
    assert str(refusal.value) == SAYS[0]


def test_the_proof_of_outputs_refuses_channels_that_do_not_belong_together():
    shrunk, dense, graph = shrunk_network()
    own = [0, 2, 3]
    with torch.no_grad():
        shrunk.body.weight.copy_(dense.body.weight[own][:, list(KEEP["stem"])])
        shrunk.body.bias.copy_(dense.body.bias[own])
    prove_channels(shrunk, graph, KEEP, INPUT)  # the structure is the planned one
    with pytest.raises(NotProved) as refusal:
        prove_outputs(shrunk, dense, graph, KEEP, IMAGES)
    (found, said), places = ([re.findall(r"0\.\d+", text) for text in (str(refusal.value), SAYS[1])], r"0\.\d+")
    assert re.sub(places, "", str(refusal.value)) == re.sub(places, "", SAYS[1])
    assert float(found[0]) == pytest.approx(float(said[0]), rel=0.1)
