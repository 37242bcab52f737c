"""Orbital charge blocks: from the shells of GFN1-xTB to irreps in e3nn's basis, and back.

The on-site block of a shell is ``B``, the diagonal block of ``(P S + (P S)^T) / 2`` (density and
overlap matrix). With the reference occupation ``n0`` of the shell, its charge block is
``Q = n0 / (2l + 1) I - B``: the trace is the charge of the shell, the diagonal the charges of its
orbitals. A rotation R gives ``D(R) Q D(R)^T``, so the symmetric block splits into irreps
``L = 0, 2, .., 2l`` without remainder. Charges of single p and d orbitals have no such law: they
depend on the frame.

One atom is a row of 23 numbers (:data:`~orbcalc.properties.BLOCK_IRREPS`), four slots: first s,
second s, p, d. A shell that an atom does not have is NaN.

Two conventions meet here. Orbitals come in tblite's order, ``m = -l .. l`` of the standard real
harmonics ``S_lm`` (polar axis z): p is (y, z, x), d is (xy, yz, z2, xz, x2-y2). Irreps are e3nn's,
``E_lm(x, y, z) = S_lm(z, x, y)``: its polar axis is y, and l = 1 is (x, y, z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int
from numpy.polynomial.legendre import Legendre, leggauss

from orbcalc.errors import LabelError

__all__ = [
    "BLOCK_DIM",
    "SLOTS",
    "Block",
    "Slot",
    "atomic_charges",
    "decode_blocks",
    "diagonal_basis",
    "encode_blocks",
    "orbital_charges",
    "shell_charges",
    "shell_slots",
    "shell_table",
    "shells_from_table",
]

Array = Float[np.ndarray, "..."]

#: A symmetric (2l + 1, 2l + 1) block of one shell, and one number for each orbital or shell.
Block = Float[np.ndarray, "_ _"]
Row = Float[np.ndarray, " _"]


@dataclass(frozen=True)
class Slot:
    """Place of one shell in an atom's row of 23 numbers.

    ``columns`` are its irrep components there; ``orbitals`` its orbitals in the dense layout of
    1 + 1 + 3 + 5 = 10 orbitals an atom (see :func:`diagonal_basis`).
    """

    name: str
    l: int  # noqa: E741  (the angular momentum)
    columns: slice
    orbitals: slice


SLOTS: tuple[Slot, ...] = (
    Slot("s", 0, slice(0, 1), slice(0, 1)),
    Slot("s2", 0, slice(1, 2), slice(1, 2)),
    Slot("p", 1, slice(2, 8), slice(2, 5)),
    Slot("d", 2, slice(8, 23), slice(5, 10)),
)

#: Numbers that describe one atom.
BLOCK_DIM = SLOTS[-1].columns.stop

#: Shells that one GFN1-xTB atom has at most.
MAX_SHELLS = 3


def shell_slots(angular_momenta: Sequence[int]) -> tuple[int, ...]:
    """Assign the shells of one atom, in tblite's order, to slots.

    Raises
    ------
    LabelError
        If a shell has no slot: more than two s, one p or one d shell, or an f shell.

    Examples
    --------
    >>> shell_slots((2, 0, 1))  # iron: d, s, p
    (3, 0, 2)
    >>> shell_slots((0, 0))  # hydrogen
    (0, 1)
    """
    free = list(range(len(SLOTS)))
    chosen = []
    for angular_momentum in angular_momenta:
        fitting = [index for index in free if SLOTS[index].l == angular_momentum]
        if not fitting:
            raise LabelError(
                f"shells with angular momenta {tuple(map(int, angular_momenta))} do not fit the "
                f"slots {[slot.name for slot in SLOTS]} of an atom: this is no GFN1-xTB basis."
            )
        free.remove(fitting[0])
        chosen.append(fitting[0])
    return tuple(chosen)


def shell_table(shells: Sequence[Sequence[int]]) -> Int[np.ndarray, "n_atoms 3"]:
    """Write the shells of all atoms as an array, for files: missing ones are -1.

    Examples
    --------
    >>> shell_table([(2, 0, 1), (0, 0)]).tolist()
    [[2, 0, 1], [0, 0, -1]]
    """
    table = np.full((len(shells), MAX_SHELLS), -1)
    for row, momenta in zip(table, shells, strict=True):
        row[: len(momenta)] = momenta
    return table


def shells_from_table(table: Int[np.ndarray, "n_atoms 3"]) -> list[tuple[int, ...]]:
    """Read the shells of all atoms back; the inverse of :func:`shell_table`."""
    return [tuple(momentum for momentum in row if momentum >= 0) for row in table.tolist()]


def encode_blocks(
    blocks: Sequence[Sequence[Block]], shells: Sequence[Sequence[int]]
) -> Float[np.ndarray, "n_atoms 23"]:
    """Write charge blocks as irreps.

    Parameters
    ----------
    blocks
        For each atom the symmetric charge blocks of its shells in e, orbitals in tblite's order.
    shells
        For each atom the angular momenta of these shells.

    Raises
    ------
    LabelError
        If shells do not fit the slots, or a block has not the size of its shell.
    """
    encoded = np.full((len(shells), BLOCK_DIM), np.nan)
    for row, atom_blocks, atom_shells in zip(encoded, blocks, shells, strict=True):
        for index, block in zip(shell_slots(atom_shells), atom_blocks, strict=True):
            slot = SLOTS[index]
            size = 2 * slot.l + 1
            if block.shape != (size, size):
                raise LabelError(
                    f"the block of a {slot.name} shell is {size} x {size}, got {block.shape}"
                )
            row[slot.columns] = _coupling(slot.l).reshape(-1, size * size) @ block.ravel()
    return encoded


def decode_blocks(
    encoded: Float[np.ndarray, "n_atoms 23"], shells: Sequence[Sequence[int]]
) -> list[list[Block]]:
    """Read charge blocks back from irreps; the inverse of :func:`encode_blocks`."""
    return [
        [
            np.einsum("kab,k->ab", _coupling(SLOTS[index].l), row[SLOTS[index].columns])
            for index in shell_slots(atom_shells)
        ]
        for row, atom_shells in zip(encoded, shells, strict=True)
    ]


def orbital_charges(
    encoded: Float[np.ndarray, "n_atoms 23"], shells: Sequence[Sequence[int]]
) -> list[Row]:
    """Return the charges (e) of each atom's orbitals, in tblite's order; they depend on the frame.

    Examples
    --------
    >>> block = np.diag([0.1, 0.2, 0.3])  # p: y, z, x
    >>> encoded = encode_blocks([[np.array([[0.5]]), block]], [(0, 1)])
    >>> orbital_charges(encoded, [(0, 1)])[0].round(12).tolist()
    [0.5, 0.1, 0.2, 0.3]
    """
    return [
        np.concatenate([np.diagonal(block) for block in blocks])
        for blocks in decode_blocks(encoded, shells)
    ]


def shell_charges(
    encoded: Float[np.ndarray, "n_atoms 23"], shells: Sequence[Sequence[int]]
) -> list[Row]:
    """Return the charges (e) of each atom's shells, in tblite's order."""
    traces = _slot_charges(encoded)
    return [
        row[list(shell_slots(atom_shells))] for row, atom_shells in zip(traces, shells, strict=True)
    ]


def atomic_charges(encoded: Float[np.ndarray, "n_atoms 23"]) -> Float[np.ndarray, " n_atoms"]:
    """Return the charge (e) of each atom: the sum over the shells it has; NaN if it has none."""
    charges = _slot_charges(encoded)
    absent = np.isnan(charges)
    return np.where(absent.all(axis=1), np.nan, np.where(absent, 0.0, charges).sum(axis=1))


def diagonal_basis() -> Float[np.ndarray, "23 10"]:
    """Return the matrix that reads orbital charges off the irreps: ``encoded @ matrix``.

    Its ten columns are the orbitals of all slots (s; s2; p: y, z, x; d: xy, yz, z2, xz, x2-y2).
    Set absent shells to zero before the product and mask them after it: NaN times 0 is NaN.
    """
    matrix = np.zeros((BLOCK_DIM, SLOTS[-1].orbitals.stop))
    for slot in SLOTS:
        matrix[slot.columns, slot.orbitals] = np.einsum("kaa->ka", _coupling(slot.l))
    return matrix


def _slot_charges(encoded: Float[np.ndarray, "n_atoms 23"]) -> Float[np.ndarray, "n_atoms 4"]:
    """Return the trace of every slot; L = 0 comes first in each and is trace / sqrt(2l + 1)."""
    scale = np.sqrt([2 * slot.l + 1 for slot in SLOTS])
    charges: Array = encoded[:, [slot.columns.start for slot in SLOTS]] * scale
    return charges


@cache
def _coupling(l: int) -> Float[np.ndarray, "n_components m m"]:  # noqa: E741
    """Return the orthonormal map from a symmetric block of shell l to L = 0, 2, .., 2l.

    The component (L, M) is ``C = c_L int S_la S_lb E_LM dOmega``, a Gaunt integral between two
    orbitals and one harmonic of e3nn, normalised to ``sum_ab C^2 = 1``: as the coupling to each
    even L is unique, this is the isometry up to the sign, which the integral fixes. The sphere
    quadrature is exact for these polynomials of degree 4l <= 8.
    """
    xyz, weights = _sphere_quadrature(degree=4 * l)
    orbitals = _real_harmonics(l, xyz)
    rows = []
    for degree in range(0, 2 * l + 1, 2):
        harmonics = _real_harmonics(degree, xyz[:, [2, 0, 1]])
        gaunt = np.einsum("am,bm,km,m->kab", orbitals, orbitals, harmonics, weights)
        rows.append(gaunt / np.linalg.norm(gaunt, axis=(1, 2), keepdims=True))
    coupling: Array = np.concatenate(rows)
    coupling.setflags(write=False)  # it is shared through the cache
    return coupling


def _real_harmonics(l: int, xyz: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "m n"]:  # noqa: E741
    """Evaluate the orthonormal standard real harmonics on unit vectors, m = -l .. l.

    ``S_lm = N d^|m| P_l(z)/dz^|m| * (Im or Re)(x + iy)^|m|``, Im for m < 0; no Condon-Shortley
    sign, so that l = 1 is proportional to +(y, z, x).
    """
    x, y, z = xyz.T
    rows = []
    for m in range(-l, l + 1):
        n = abs(m)
        norm = (2 * l + 1) / (4 * math.pi) * math.factorial(l - n) / math.factorial(l + n)
        polar = math.sqrt(norm * (2 if n else 1)) * Legendre.basis(l).deriv(n)(z)
        azimuthal = (x + 1j * y) ** n
        rows.append(polar * (azimuthal.imag if m < 0 else azimuthal.real))
    return np.array(rows)


def _sphere_quadrature(
    degree: int,
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Return points and weights that integrate polynomials up to a degree over the unit sphere."""
    z, polar_weights = leggauss(degree // 2 + 1)
    n_azimuths = degree + 1
    phi = 2 * np.pi * np.arange(n_azimuths) / n_azimuths
    radius = np.sqrt(1 - z**2)
    xyz = np.stack(
        [
            np.outer(radius, np.cos(phi)).ravel(),
            np.outer(radius, np.sin(phi)).ravel(),
            np.repeat(z, n_azimuths),
        ],
        axis=1,
    )
    return xyz, np.repeat(polar_weights, n_azimuths) * 2 * np.pi / n_azimuths
