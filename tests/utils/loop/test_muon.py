"""Muon: orthogonal steps for matrices, AdamW's for the rest."""

import pytest
import torch

from utils.loop.muon import QUINTIC, Muon, orthogonalised

SHAPES = [(4, 4), (3, 12), (12, 3), (8, 9), (1, 6), (6, 1)]


def with_spectrum(rows, columns, values):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    count = min(rows, columns)
    return left[:, :count], torch.tensor(values[:count], dtype=torch.float64), right[:, :count]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_are_mapped_by_the_polynomial_and_the_vectors_stay(rows, columns):
    left, values, right = with_spectrum(rows, columns, [3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = orthogonalised(((left * values) @ right.T).float()).double()
    expected = values / values.square().sum().sqrt()
    for _ in range(5):
        expected = QUINTIC[0] * expected + QUINTIC[1] * expected**3 + QUINTIC[2] * expected**5
    assert torch.allclose(left.T @ found @ right, torch.diag(expected), atol=1e-4)
    assert expected.min() > 0.6
    assert expected.max() < 1.25


def test_a_zero_gradient_moves_nothing_and_rows_of_zeros_stay_zeros():
    assert not orthogonalised(torch.zeros(3, 5)).any()
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0
    assert not orthogonalised(matrix)[2].any()


def test_a_step_by_hand():
    # A rank-one gradient: its only singular value is brought to 1 by the polynomial's own values.
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight], lr=0.5, momentum=0.9, weight_decay=0.1)
    weight.grad = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    optimizer.step()
    size = 1.0
    for _ in range(5):
        size = QUINTIC[0] * size + QUINTIC[1] * size**3 + QUINTIC[2] * size**5
    expected = torch.full((2, 2), 1 - 0.5 * 0.1)
    expected[0, 0] -= 0.5 * 0.2 * 2**0.5 * size
    assert torch.allclose(weight.detach(), expected, atol=1e-5)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], weight.grad)


@pytest.mark.parametrize("shape", [(16, 12), (12, 16), (8, 3, 3, 3)])
def test_matrices_move_as_with_torchs_own(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    optimizers = Muon([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (ours.detach().flatten(1) - start.flatten(1)).norm()
    assert (ours.detach().flatten(1) - theirs.detach()).norm() < 0.03 * moved  # theirs computes in bfloat16


def test_vectors_move_as_with_adamw():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.05}
    optimizers = Muon([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn(5, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_it_goes_on_from_its_state():
    def steps(optimizer, weights, first, last):
        for step in range(first, last):
            for i, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, 0.1 * step + i) * torch.arange(weight.numel()).view_as(weight)
            optimizer.step()

    def fresh():
        weights = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4))]
        return weights, Muon(weights, lr=0.1)

    whole, optimizer = fresh()
    steps(optimizer, whole, 0, 6)
    first, optimizer = fresh()
    steps(optimizer, first, 0, 3)
    second, again = fresh()
    for weight, trained in zip(second, first, strict=True):
        weight.data.copy_(trained.data)
    again.load_state_dict(optimizer.state_dict())
    steps(again, second, 3, 6)
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


def test_it_takes_a_closure_and_leaves_parameters_without_gradient():
    weight, idle = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight, idle], lr=0.1, weight_decay=0.5)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 4.0
    assert torch.equal(idle, torch.ones(2, 2))
    assert not torch.equal(weight, torch.ones(2, 2))
