"""Charge blocks and irreps: against e3nn, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import e3nn_representation, random_rotation

from orbcalc.errors import LabelError
from orbcalc.orbitals import (
    BLOCK_DIM,
    SLOTS,
    atomic_charges,
    decode_blocks,
    diagonal_basis,
    encode_blocks,
    orbital_charges,
    shell_charges,
    shell_slots,
    shell_table,
    shells_from_table,
)
from orbcalc.properties import BLOCK_IRREPS

SHELLS = [(0, 0), (0,), (0, 1), (0, 1, 2), (2, 0, 1)]


def random_blocks(shells, rng):
    blocks = []
    for momenta in shells:
        raw = [rng.normal(size=(2 * l + 1, 2 * l + 1)) for l in momenta]  # noqa: E741
        blocks.append([(block + block.T) / 2 for block in raw])
    return blocks


def standard_rotation(momentum, rotation):
    """Representation of a shell in tblite's order, from e3nn's by a change of axes.

    e3nn's harmonics are the standard ones at (z, x, y), so the standard ones are e3nn's at
    (y, z, x): take these axes, rotate, and take the old axes again.
    """
    axes = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    parity = "e" if momentum % 2 == 0 else "o"
    return e3nn_representation(f"{momentum}{parity}", axes @ rotation @ axes.T)


def test_slots_are_the_irreps_of_the_properties_page():
    irreps = o3.Irreps(BLOCK_IRREPS)
    assert irreps.dim == BLOCK_DIM
    degrees = [degree for slot in SLOTS for degree in range(0, 2 * slot.l + 1, 2)]
    assert degrees == [irrep.l for _, irrep in irreps]
    assert [slot.columns.stop - slot.columns.start for slot in SLOTS] == [1, 1, 6, 15]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("improper", [False, True])
def test_rotated_blocks_are_rotated_irreps(seed, improper):
    blocks = random_blocks(SHELLS, np.random.default_rng(seed))
    rotation = random_rotation(seed, improper=improper)
    rotated = []
    for atom_blocks, momenta in zip(blocks, SHELLS, strict=True):
        matrices = [standard_rotation(momentum, rotation) for momentum in momenta]
        rotated.append([d @ b @ d.T for d, b in zip(matrices, atom_blocks, strict=True)])
    d_matrix = e3nn_representation(BLOCK_IRREPS, rotation)
    before = np.nan_to_num(encode_blocks(blocks, SHELLS))
    after = np.nan_to_num(encode_blocks(rotated, SHELLS))
    np.testing.assert_allclose(after, before @ d_matrix.T, atol=1e-12)
    assert np.abs(after - before).max() > 0.1


def test_p_shell_is_in_tblite_order():
    """A block that points along x is a 2e that points along x."""
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    along_x = np.diag([0.0, 0.0, 1.0])  # (y, z, x)
    encoded = encode_blocks([[along_x]], [(1,)])[0, SLOTS[2].columns]
    expected = o3.spherical_harmonics(2, x, normalize=True, normalization="norm").numpy()
    np.testing.assert_allclose(encoded[1:], np.sqrt(2 / 3) * expected, atol=1e-12)


def test_d_shell_is_in_tblite_order():
    """A block on d(z2) has L = 4 and L = 2 parts that are symmetric about z."""
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    encoded = encode_blocks([[np.diag([0.0, 0, 1, 0, 0])]], [(2,)])[0, SLOTS[3].columns]
    for degree, part in ((2, encoded[1:6]), (4, encoded[6:])):
        axis = o3.spherical_harmonics(degree, z, normalize=True, normalization="norm").numpy()
        np.testing.assert_allclose(part, (part @ axis) * axis, atol=1e-12)
        assert part @ axis > 0.3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SHELLS), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_round_trip_norm_and_charges(shells, seed):
    blocks = random_blocks(shells, np.random.default_rng(seed))
    encoded = encode_blocks(blocks, shells)
    for atom, (old, new) in enumerate(zip(blocks, decode_blocks(encoded, shells), strict=True)):
        for a, b in zip(old, new, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
        norm = sum(np.sum(block**2) for block in old)
        np.testing.assert_allclose(np.nansum(encoded[atom] ** 2), norm, rtol=1e-12)
        traces = [np.trace(block) for block in old]
        np.testing.assert_allclose(shell_charges(encoded, shells)[atom], traces, atol=1e-12)
        np.testing.assert_allclose(atomic_charges(encoded)[atom], sum(traces), atol=1e-12)
        diagonal = np.concatenate([np.diagonal(block) for block in old])
        np.testing.assert_allclose(orbital_charges(encoded, shells)[atom], diagonal, atol=1e-12)


def test_diagonal_basis_reads_orbital_charges():
    shells = [(0, 0), (2, 0, 1)]
    encoded = encode_blocks(random_blocks(shells, np.random.default_rng(3)), shells)
    dense = np.nan_to_num(encoded) @ diagonal_basis()
    hydrogen, iron = orbital_charges(encoded, shells)
    np.testing.assert_allclose(dense[0, :2], hydrogen, atol=1e-12)
    d, s, p = iron[:5], iron[5:6], iron[6:]
    np.testing.assert_allclose(dense[1, [0, *range(2, 10)]], np.concatenate([s, p, d]), atol=1e-12)


def test_shells_survive_a_file():
    assert shells_from_table(shell_table(SHELLS)) == SHELLS


def test_absent_shells_are_nan_and_an_empty_atom_has_no_charge():
    encoded = encode_blocks([[np.array([[0.5]])], []], [(0,), ()])
    assert np.isnan(encoded[0, 1:]).all()
    assert encoded[0, 0] == 0.5
    charges = atomic_charges(encoded)
    assert charges[0] == 0.5
    assert np.isnan(charges[1])


@pytest.mark.parametrize("momenta", [(0, 0, 0), (1, 1), (2, 0, 2), (0, 3)])
def test_shells_that_do_not_fit(momenta):
    with pytest.raises(LabelError, match="do not fit the slots"):
        shell_slots(momenta)


def test_wrong_block_size():
    with pytest.raises(LabelError, match="block of a p shell is 3 x 3"):
        encode_blocks([[np.eye(5)]], [(1,)])
