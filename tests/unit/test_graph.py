"""Graphs: batches and padding, and the two operations on neighbours with their derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from orbcalc.errors import StructureError
from orbcalc.graph import AtomGraph, gather_neighbors, sum_reverse

CUTOFF = 3.0


def graph_of(atoms, cutoff=CUTOFF):
    return AtomGraph.from_atoms(atoms, cutoff)


@st.composite
def some_atoms(draw):
    """One to seven atoms, crowded or far apart, periodic or not, charged or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 7))
    size = draw(st.sampled_from([2.0, 4.0, 12.0]))
    return Atoms(
        f"C{n_atoms}",
        positions=rng.uniform(0, size, (n_atoms, 3)),
        cell=np.diag(rng.uniform(3.0, 6.0, 3)),
        pbc=draw(st.booleans()),
        info={"charge": draw(st.integers(-2, 2))},
    )


@settings(max_examples=60)
@given(st.lists(some_atoms(), min_size=1, max_size=5))
def test_a_batch_is_its_structures(batch):
    graphs = [graph_of(atoms) for atoms in batch]
    joined = AtomGraph.batch(graphs)
    assert joined.n_structures == len(batch)
    assert joined.n_atoms == sum(map(len, batch))
    assert joined.n_atoms_of_structure.tolist() == [len(atoms) for atoms in batch]
    assert joined.charge.tolist() == [atoms.info["charge"] for atoms in batch]
    vectors, first = joined.edge_vectors(), 0
    for number, graph in enumerate(graphs):
        own = slice(first, first + graph.n_atoms)
        assert (joined.structure_index[own] == number).all()
        used = slice(0, graph.n_slots)
        torch.testing.assert_close(
            vectors[own, used][graph.mask], graph.edge_vectors()[graph.mask], atol=0, rtol=0
        )
        assert torch.equal(joined.mask[own, used], graph.mask)
        assert not joined.mask[own, graph.n_slots :].any()
        assert ((joined.neighbors[own] >= first) & (joined.neighbors[own] < own.stop)).all()
        first = own.stop
    check_reverse(joined)


def check_reverse(graph):
    """The reverse of an edge is the edge with the opposite vector, at its neighbour."""
    everywhere = torch.arange(graph.n_atoms * graph.n_slots).view_as(graph.reverse)
    assert torch.equal(graph.reverse.flatten()[graph.reverse], everywhere)
    assert torch.equal(graph.reverse[~graph.mask], everywhere[~graph.mask])
    assert torch.equal(graph.reverse[graph.mask] // graph.n_slots, graph.neighbors[graph.mask])
    vectors = graph.edge_vectors()
    opposite = vectors.flatten(0, 1)[graph.reverse]
    torch.testing.assert_close(opposite[graph.mask], -vectors[graph.mask])


@settings(max_examples=25)
@given(st.lists(some_atoms(), min_size=1, max_size=4), st.integers(0, 99))
def test_sum_reverse_is_a_scatter(batch, seed):
    graph = AtomGraph.batch([graph_of(atoms) for atoms in batch])
    values = torch.randn(
        graph.n_atoms, graph.n_slots, 2, generator=torch.Generator().manual_seed(seed)
    ).double()
    slow = torch.zeros(graph.n_atoms, 2, dtype=torch.float64)
    for atom, slot in graph.mask.nonzero().tolist():
        slow[graph.neighbors[atom, slot]] += values[atom, slot]
    torch.testing.assert_close(sum_reverse(values, graph), slow)


@settings(max_examples=25)
@given(st.lists(some_atoms(), min_size=1, max_size=4), st.integers(0, 99))
def test_gather_and_sum_are_transposes(batch, seed):
    graph = AtomGraph.batch([graph_of(atoms) for atoms in batch])
    generator = torch.Generator().manual_seed(seed)
    at_atoms = torch.randn(graph.n_atoms, 3, generator=generator).double()
    at_slots = torch.randn(graph.n_atoms, graph.n_slots, 3, generator=generator).double()
    at_slots = at_slots * graph.mask[..., None]
    torch.testing.assert_close(
        (gather_neighbors(at_atoms, graph) * at_slots).sum(),
        (at_atoms * sum_reverse(at_slots, graph)).sum(),
    )


def test_derivatives_of_gather_and_sum():
    graph = AtomGraph.batch([graph_of(make()) for make in (structures.water, structures.lone_atom)])
    generator = torch.Generator().manual_seed(0)
    mask = graph.mask[..., None]
    at_atoms = torch.randn(4, 2, generator=generator).double().requires_grad_(True)
    at_slots = torch.randn(4, graph.n_slots, 2, generator=generator).double().requires_grad_(True)

    def gathered(values):  # what an unused slot holds is never used
        return gather_neighbors(values, graph).pow(2) * mask

    def summed(values):
        return sum_reverse(values, graph).pow(2)

    for function, values in ((gathered, at_atoms), (summed, at_slots)):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_values_in_unused_slots_do_not_matter():
    graph = AtomGraph.batch([graph_of(make()) for make in (structures.water, structures.lone_atom)])
    values = torch.ones(4, graph.n_slots, 1, dtype=torch.float64)
    other = torch.where(graph.mask[..., None], values, 7.0)
    assert torch.equal(sum_reverse(other, graph), sum_reverse(values, graph))
    assert sum_reverse(values, graph)[:, 0].tolist() == [2.0, 2.0, 2.0, 0.0]


def test_a_batch_of_one_is_the_graph_itself():
    graph = graph_of(structures.water())
    assert AtomGraph.batch([graph]) is graph


def test_batches_of_batches():
    graphs = [
        graph_of(make()) for make in (structures.water, structures.ice_cell, structures.ethanol)
    ]
    at_once = AtomGraph.batch(graphs)
    in_steps = AtomGraph.batch([AtomGraph.batch(graphs[:2]), graphs[2]])
    for name, value in vars(at_once).items():
        assert torch.equal(getattr(in_steps, name), value), name


def test_what_a_graph_reads():
    atoms = structures.copper_tetraaqua()
    graph = graph_of(atoms)
    assert graph.numbers.tolist() == atoms.numbers.tolist()
    assert graph.charge.item() == 2
    assert graph.unpaired.item() == 1
    assert graph.positions.dtype == torch.float64
    assert not graph.is_periodic.item()
    graph.positions[0] = 5.0
    assert atoms.positions[0, 0] == 0.0


@pytest.mark.parametrize(
    ("pbc", "cell", "expected"),
    [
        (True, [3, 3, 3], True),
        ((True, False, False), [3, 3, 3], True),
        ((True, False, False), [3, 0, 0], False),
        (False, [3, 3, 3], False),
    ],
)
def test_when_stress_is_defined(pbc, cell, expected):
    graph = graph_of(Atoms("H", cell=cell, pbc=pbc))
    assert graph.is_periodic.item() is expected


def test_sum_over_atoms():
    graph = AtomGraph.batch([graph_of(make()) for make in (structures.water, structures.lone_atom)])
    values = torch.arange(8.0).view(4, 2)
    assert graph.sum_over_atoms(values).tolist() == [[6.0, 9.0], [6.0, 7.0]]


def test_moving_keeps_everything():
    graph = graph_of(structures.ice_cell())
    moved = graph.to("cpu")
    assert all(torch.equal(getattr(moved, name), value) for name, value in vars(graph).items())


def test_an_impossible_spin():
    with pytest.raises(StructureError, match="impossible for 10 electrons"):
        graph_of(Atoms("OH2", positions=np.eye(3), info={"spin": 2}))


def test_parts_are_gathered_as_in_the_whole():
    graph = AtomGraph.batch(
        [
            AtomGraph.from_atoms(atoms, 4.0)
            for atoms in (structures.ethanol(), structures.ice_cell())
        ]
    )
    values = torch.randn(graph.n_atoms, 3, dtype=torch.float64, requires_grad=True)
    parts = graph.parts(4)
    assert [len(part.mask) for part in parts] == [4, 4, 4, 3]
    gathered = torch.cat([gather_neighbors(values, part) for part in parts])
    assert torch.equal(gathered, gather_neighbors(values, graph))
    weights = torch.randn(gathered.shape, dtype=torch.float64) * graph.mask[..., None]
    slopes = [
        torch.autograd.grad((found * weights).sum(), values)[0]
        for found in (gathered, gather_neighbors(values, graph))
    ]
    torch.testing.assert_close(*slopes)
