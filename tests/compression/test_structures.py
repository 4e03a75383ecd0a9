from __future__ import annotations

import pytest
import torch

from compression.structures import COMBINATIONS, STRUCTURES
from utils.errors import UserError

CONV = torch.arange(24).view(2, 3, 2, 2)  # filter f, channel c, place p: 12 f + 4 c + p
MATRIX = torch.arange(6).view(2, 3)

VIEWS = {
    "Filters": (CONV, [list(range(12)), list(range(12, 24))]),
    "3D": (CONV, [list(range(12)), list(range(12, 24))]),
    "Channels": (CONV, [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 16, 17, 18, 19], [8, 9, 10, 11, 20, 21, 22, 23]]),
    "2D": (CONV, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]),
    "4D": (CONV, [list(range(24))]),
    "Rows": (MATRIX, [[0, 1, 2], [3, 4, 5]]),
    "Cols": (MATRIX, [[0, 3], [1, 4], [2, 5]]),
}


def test_every_structure_has_its_view():
    assert set(VIEWS) | {"Blocks"} == set(STRUCTURES)


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_is_seen_as_a_stack_of_structures(name):
    weight, expected = VIEWS[name]
    assert STRUCTURES[name].view(weight).tolist() == expected


@pytest.mark.parametrize("name", VIEWS)
def test_values_are_spread_over_their_structures(name):
    weight, expected = VIEWS[name]
    spread = STRUCTURES[name].expand(torch.arange(len(expected)), weight.shape)
    assert spread.shape == weight.shape
    assert spread.is_contiguous()
    by_element = {element: group for group, elements in enumerate(expected) for element in elements}
    assert spread.flatten().tolist() == [by_element[element] for element in range(weight.numel())]


def test_blocks_are_counted_row_by_row():
    weight = torch.arange(16).view(2, 4, 1, 2)  # 8 f + 2 c + p
    blocks = STRUCTURES["Blocks"]
    # one filter x two channels x 1 x one place: filter 0 has channels 0 and 1 at place 0, then at place 1, ...
    assert blocks.view(weight, [1, 2, 1, 1]).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    spread = blocks.expand(torch.tensor([5, 6]), weight.shape, [2, 2, 1, 2])
    assert spread[0].flatten().tolist() == spread[1].flatten().tolist() == [5, 5, 5, 5, 6, 6, 6, 6]


def test_the_view_stays_on_the_tape():
    weight = torch.ones(2, 2, 1, 1, requires_grad=True)
    (STRUCTURES["Channels"].view(weight).sum(1) * torch.tensor([1.0, 10.0])).sum().backward()
    assert weight.grad.flatten().tolist() == [1, 10, 1, 10]


def test_other_numbers_of_dimensions():
    assert STRUCTURES["Filters"].view(torch.zeros(5, 2, 3)).shape == (5, 6)  # a Conv1d
    assert STRUCTURES["Channels"].view(torch.zeros(5, 2)).shape == (2, 5)
    assert STRUCTURES["4D"].view(torch.zeros(5)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "shape", "block", "message"),
    [
        ("Filters", (4, 3), None, r"structure 'Filters' is a filter \(dim 0\) .* convolution; a weight of shape \[4, 3\] has none"),
        ("Rows", (4, 3, 1, 1), None, r"structure 'Rows' .* \[4, 3, 1, 1\] has none"),
        ("Channels", (4,), None, "structure 'Channels'"),
        ("Filters", (0, 3, 1, 1), None, "has none"),
        ("Blocks", (4, 3), [1, 1], "'Blocks' is a block of a weight of 4 dimensions"),
        ("Blocks", (4, 3, 1, 1), None, "give block_shape"),
        ("Blocks", (4, 3, 1, 1), [1, 2, 1, 1], r"block_shape \[1, 2, 1, 1\] does not divide a weight of shape \[4, 3, 1, 1\]"),
        ("Blocks", (4, 3, 1, 1), [1, 0, 1, 1], "does not divide"),
        ("Blocks", (4, 3, 1, 1), [1, 1, 1], "does not divide"),
    ],
)
def test_a_weight_without_such_structures_is_an_error(name, shape, block, message):
    with pytest.raises(UserError, match=message):
        STRUCTURES[name].view(torch.zeros(shape), block)
    with pytest.raises(UserError, match=message):
        STRUCTURES[name].expand(torch.zeros(1), shape, block)


def test_combinations_are_structures_of_the_table():
    assert {name: [part.name for part in parts] for name, parts in COMBINATIONS.items()} == {
        "Rows+Cols": ["Rows", "Cols"],
        "Cols+Rows": ["Cols", "Rows"],
        "Channels+4D": ["Channels", "4D"],
        "4D+Channels": ["4D", "Channels"],
    }
