"""Muon and Adam: what a step does to the weights."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import MakePotential
from torch import Tensor, nn

from orbcalc.config import OptimizerConfig
from orbcalc.model.products import DegreeLinear
from orbcalc.training.optimizer import Muon, Optimizer, orthogonalized


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 40), (2, 40, 5)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrices = random(*shape)
    found = orthogonalized(matrices)
    for before, after in zip(matrices, found, strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        values = left.mT @ after @ right.mT  # in the basis of the gradient: diagonal
        diagonal = values.diagonal()
        assert torch.allclose(values, torch.diag(diagonal), atol=1e-10)
        assert 0.6 < float(diagonal.min()) <= float(diagonal.max()) < 1.3


def test_zero_stays_zero_and_size_does_not_matter() -> None:
    matrix = random(1, 6, 9)
    zero = orthogonalized(torch.zeros(1, 6, 9))
    assert torch.equal(zero, torch.zeros(1, 6, 9))
    for size in (1e-12, 1e-30, 1e30):
        found = orthogonalized((size * matrix).float()).double()
        torch.testing.assert_close(found, orthogonalized(matrix), atol=1e-5, rtol=0)


def test_what_a_batch_says_nothing_about_stays() -> None:
    rare, other = (nn.Parameter(random(2, 8, 8, seed=s).float()) for s in (0, 1))
    muon = Muon({False: [rare, other]}, weight_decay=0.1)
    muon.param_groups[0]["lr"] = 0.1
    for step in range(1200):  # float32 has no number as small as the mean gradient in the end
        other.grad = random(2, 8, 8, seed=step).float()
        rare.grad = torch.zeros_like(rare)
        if step in (0, 1199):
            rare.grad[0] = other.grad[0]
        before = rare.detach().clone()
        muon.step()
        moved = (rare - before).flatten(1).any(1).tolist()
        assert moved == [step in (0, 1199), False]
    assert torch.isfinite(rare).all()


def test_the_step_is_that_of_pytorch() -> None:
    """Its Muon works in bfloat16, on one matrix; the direction is the same."""
    weight, gradients = random(16, 12), [random(16, 12, seed=s) for s in (1, 2, 3)]
    own, other = nn.Parameter(weight.clone()), nn.Parameter(weight.float())
    muon = Muon({False: [own]}, weight_decay=0.0)
    muon.param_groups[0]["lr"] = 0.1
    reference = torch.optim.Muon([other], lr=0.1, weight_decay=0.0, momentum=0.95)
    for gradient in gradients:
        own.grad, other.grad = gradient.clone(), gradient.float()
        muon.step()
        reference.step()
    moved, expected = own.detach() - weight, other.detach().double() - weight
    torch.testing.assert_close(moved, expected, atol=0.02, rtol=0)
    assert float(torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)) > 0.999


def test_stacks_and_both_layouts_move_alike() -> None:
    linear = [nn.Linear(12, 5, bias=False, dtype=torch.float64) for _ in range(2)]
    mixed = DegreeLinear(1, 12, 5).double()
    with torch.no_grad():
        mixed.weight.copy_(torch.stack([layer.weight.mT for layer in linear]))
    gradient = random(2, 5, 12)
    for number, layer in enumerate(linear):
        layer.weight.grad = gradient[number]
    mixed.weight.grad = gradient.mT.contiguous()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    before = mixed.weight.detach().clone()
    Optimizer(nn.ModuleList([*linear, mixed, nn.Embedding(2, 3)]), config).step(1.0)
    after = torch.stack([layer.weight.detach().mT for layer in linear])
    torch.testing.assert_close(mixed.weight.detach(), after, rtol=1e-10, atol=1e-12)
    step = after - (1 - 0.1 * 0.3) * before
    size = 0.1 * 0.5 * math.sqrt(5 / 12)
    values = torch.linalg.svdvals(step) / size
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_every_weight_is_trained_once(make_potential: MakePotential) -> None:
    potential = make_potential(channels=8, xtb_head="baseline").requires_grad_(True)
    before = {name: weight.detach().clone() for name, weight in potential.named_parameters()}
    for weight in potential.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer = Optimizer(potential, OptimizerConfig(weight_decay=0.0))
    optimizer.step(1.0)
    for name, weight in potential.named_parameters():
        assert not torch.equal(weight, before[name]), name
    names = {name.split(".")[0] for name in optimizer.tensors()}
    assert names == {"adam", "muon"}
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in potential.parameters())


def test_moments_come_back(make_potential: MakePotential) -> None:
    """Going on from saved moments takes the steps that would have come."""
    config, ends = OptimizerConfig(), []
    for interrupted in (False, True):
        potential = make_potential(channels=8).requires_grad_(True)
        optimizer = Optimizer(potential, config)
        for step in range(4):
            for number, weight in enumerate(potential.parameters()):
                weight.grad = random(*weight.shape, seed=100 * step + number).to(weight.dtype)
            optimizer.step(0.5)
            if interrupted and step == 1:
                saved = {name: value.clone() for name, value in optimizer.tensors().items()}
                optimizer = Optimizer(potential, config)
                optimizer.load(saved)
        ends.append([weight.detach() for weight in potential.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_thin_matrices_of_degrees_step_by_their_inputs() -> None:
    """Their inputs come before their outputs, unlike those of a linear layer."""
    layers = nn.ModuleList([DegreeLinear(1, 64, 2), nn.Linear(64, 2, bias=False)])
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = Optimizer(layers, OptimizerConfig(learning_rate=1.0, weight_decay=0.0))
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step(1.0)
    for layer, old in zip(layers, before, strict=True):
        torch.testing.assert_close(old - layer.weight, torch.full_like(old, 1 / math.sqrt(64)))
