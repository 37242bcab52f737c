"""Structures at the edge: what is refused and why, and the content hash."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import structures
from ase import Atoms

from orbcalc.errors import OrbcalcError, StructureError
from orbcalc.structures import (
    charge_and_multiplicity,
    check_structure,
    multiplicity_is_possible,
    read_structures,
    structure_key,
)


def changed(make, **attributes):
    atoms = make()
    for name, value in attributes.items():
        setattr(atoms, name, value)
    return atoms


def with_position(value):
    atoms = structures.water()
    atoms.positions[2, 1] = value
    return atoms


BAD = {
    "has no atoms": Atoms(),
    "atom 1 of .* atomic number 0: it is no element": Atoms("HX", positions=np.eye(3)[:2]),
    r"atom 2 of H2O has position \[.*nan.*\]: coordinates must be finite": with_position(np.nan),
    "atom 2 of H2O has position .*inf": with_position(np.inf),
    "has a cell that is not finite": changed(structures.water, cell=[np.nan, 1, 1]),
    r"is periodic along \[True, True, True\], but its cell spans no volume": changed(
        structures.water, pbc=True
    ),
    "spans no volume: .*Set the cell, or pbc=False": Atoms(
        "H", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True
    ),
    r"atoms 0 and 1 of H2 are 0\.200 Å apart: they overlap \(limit 0\.3 Å\)": Atoms(
        "H2", positions=[[0, 0, 0], [0, 0, 0.2]]
    ),
    "atoms 0 and 1 of H2 are 0.000 Å apart": Atoms("H2"),
    "atoms 0 and 0 of H are 0.200 Å apart": Atoms("H", cell=[0.2, 3, 3], pbc=True),
    r"atoms 0 and 0 of Cu are 0\.112 Å apart": Atoms(  # in a cell whose vectors are long
        "Cu", cell=[[10, 0, 0], [9.95, 0.1, 0], [0, 0, 10]], pbc=True
    ),
    r"atoms 0 and 1 of H2 are 0\.2\d\d Å apart": Atoms(
        "H2", positions=[[0, 0, 0], [6, 9.2, 0]], cell=[[4, 0, 0], [14, 9, 0], [0, 0, 5]], pbc=True
    ),
    r"H2 is 1e\+06 Å long \(limit 100000 Å\): has an atom flown away": Atoms(
        "H2", positions=[[0, 0, 0], [0, 0, 1e6]], cell=[4, 4, 20], pbc=(True, True, False)
    ),
    r"H is 2e\+05 Å long": Atoms("H", cell=[5, 5, 2e5], pbc=True),
    "atom 0 of a structure has atomic number 119": Atoms(numbers=[119]),
    r"info\['spin'\] = 2 is impossible for 10 electrons": Atoms(
        "OH2", positions=np.eye(3), info={"spin": 2}
    ),
    r"info\['charge'\] = 0.5 is not an integer": Atoms("H", info={"charge": 0.5}),
    r"info\['charge'\] = 'one' is not an integer": Atoms("H", info={"charge": "one"}),
    r"info\['spin'\] = nan is not an integer": Atoms("H", info={"spin": np.nan}),
    r"info\['charge'\] = None is not an integer": Atoms("H", info={"charge": None}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    with pytest.raises(StructureError, match=message) as caught:
        check_structure(BAD[message])
    assert isinstance(caught.value, OrbcalcError)
    assert isinstance(caught.value, ValueError)


def test_the_name_is_in_the_message():
    with pytest.raises(StructureError, match="structure 7 of pool has no atoms"):
        check_structure(Atoms(), "structure 7 of pool")
    with pytest.raises(StructureError, match=r"of structure 7 of pool \(H2\) are 0\.000 Å apart"):
        check_structure(Atoms("H2"), "structure 7 of pool")


@pytest.mark.parametrize(
    "atoms",
    [
        structures.water(),
        structures.ice_cell(),
        structures.salt_slab(),
        structures.lone_atom(),
        Atoms("H", cell=[1.0, 1, 1], pbc=True),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.31]]),
        Atoms("H", cell=[0, 0, 2.0], pbc=(False, False, True)),
        Atoms("H2", positions=[[0, 0, 0], [3e6, 0, 1]], cell=[5, 5, 5], pbc=True),  # not wrapped
    ],
    ids=str,
)
def test_what_is_not(atoms):
    check_structure(atoms)


@pytest.mark.parametrize(
    ("atoms", "info", "expected"),
    [
        (structures.water(), {}, (0, 1)),
        (Atoms("H"), {}, (0, 2)),
        (Atoms("H"), {"charge": 1}, (1, 1)),
        (structures.water(), {"charge": -1}, (-1, 2)),
        (structures.water(), {"spin": 3}, (0, 3)),
        (structures.water(), {"charge": 1.0, "spin": "2"}, (1, 2)),
        (Atoms("H", cell=[3, 3, 3], pbc=True), {}, (0, 1)),
        (Atoms("H", cell=[3, 3, 3], pbc=True), {"spin": 2}, (0, 2)),
        (structures.copper_tetraaqua(), {}, (2, 2)),
    ],
)
def test_charge_and_multiplicity(atoms, info, expected):
    atoms = atoms.copy()
    atoms.info.update(info)
    assert charge_and_multiplicity(atoms) == expected


@pytest.mark.parametrize(
    ("charge", "multiplicity", "possible"),
    [
        *((0, multiplicity, multiplicity in (1, 3, 5, 7, 9, 11)) for multiplicity in range(-1, 15)),
        *((1, multiplicity, multiplicity in (2, 4, 6, 8, 10)) for multiplicity in range(12)),
        (10, 1, True),
        (10, 3, False),
        (11, 1, False),
    ],
)
def test_possible_multiplicities_of_water(charge, multiplicity, possible):
    assert multiplicity_is_possible(structures.water(), charge, multiplicity) is possible


def test_the_key_is_the_content():
    atoms = structures.ice_cell()
    key = structure_key(atoms)
    assert key == structure_key(atoms.copy())
    assert len(key) == 32
    assert key[0] == "s"
    labelled = atoms.copy()
    labelled.info["REF_energy"] = -1.0
    labelled.arrays["tags"] = np.arange(6)
    assert structure_key(labelled) == key
    rounded = atoms.copy()
    rounded.positions = np.round(rounded.positions, 8)
    assert structure_key(rounded) == key


def test_a_structure_read_from_a_file_has_the_same_key(tmp_path):
    rng = np.random.default_rng(0)
    written = [
        Atoms("H50", positions=rng.uniform(-20, 20, (50, 3)), cell=rng.uniform(30, 40, 6), pbc=True)
        for _ in range(20)
    ]
    ase.io.write(tmp_path / "a.extxyz", written)
    read = ase.io.read(tmp_path / "a.extxyz", ":")
    assert [structure_key(atoms) for atoms in read] == [structure_key(atoms) for atoms in written]


def move(atoms):
    atoms.positions[0, 0] += 2e-6


def permute(atoms):
    atoms.positions[[0, 3]] = atoms.positions[[3, 0]]


def stretch(atoms):
    atoms.cell[0, 0] += 2e-6


def open_one_direction(atoms):
    atoms.pbc = (True, True, False)


def charge(atoms):
    atoms.info["charge"] = 1


def excite(atoms):
    atoms.info["spin"] = 3


def magnetise(atoms):
    atoms.set_initial_magnetic_moments([1.0, -1.0, 0, 0, 0, 0])


def magnetise_alike(atoms):
    atoms.set_initial_magnetic_moments([1.0, 1.0, 0, 0, 0, 0])


def shift_charge(atoms):
    atoms.set_initial_charges([1.0, -1.0, 0, 0, 0, 0])


def transmute(atoms):
    atoms.numbers[0] = 16


CHANGES = [
    move, permute, stretch, open_one_direction, charge, excite, magnetise, magnetise_alike,
    shift_charge, transmute,
]  # fmt: skip


def test_the_key_notices():
    """Each change has a key of its own."""
    keys = {structure_key(structures.ice_cell())}
    for change in CHANGES:
        atoms = structures.ice_cell()
        change(atoms)
        keys.add(structure_key(atoms))
    assert len(keys) == 1 + len(CHANGES)


def test_moments_of_zero_change_no_key():
    atoms = structures.ice_cell()
    atoms.set_initial_magnetic_moments(np.zeros(6))
    assert structure_key(atoms) == structure_key(structures.ice_cell())


def test_the_box_around_a_molecule_is_not_its_content():
    boxed = structures.water()
    boxed.cell = [10, 10, 10]
    assert structure_key(boxed) == structure_key(structures.water())


def test_files_are_read_in_order(tmp_path):
    made = [structures.water(), structures.ethanol(), structures.ice_cell()]
    ase.io.write(tmp_path / "two.extxyz", made[:2])
    ase.io.write(tmp_path / "one.cif", made[2])
    found = read_structures([tmp_path / "two.extxyz", tmp_path / "one.cif"])
    assert [len(atoms) for atoms in found] == [3, 9, 6]
    assert len(read_structures(str(tmp_path / "two.extxyz"))) == 2


def test_charge_and_spin_survive_a_file(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", structures.copper_tetraaqua())
    (found,) = read_structures(tmp_path / "a.extxyz")
    assert structure_key(found) == structure_key(structures.copper_tetraaqua())


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StructureError, match=r"cannot read structures from .*missing\.xyz"):
        read_structures(tmp_path / "missing.xyz")
    (tmp_path / "text.xyz").write_text("no number of atoms\n")
    with pytest.raises(StructureError, match=r"cannot read structures from .*text\.xyz"):
        read_structures(tmp_path / "text.xyz")
    (tmp_path / "empty.extxyz").write_text("")
    with pytest.raises(StructureError, match=r"empty\.extxyz"):
        read_structures(tmp_path / "empty.extxyz")
    overlapping = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.1]])
    ase.io.write(tmp_path / "bad.extxyz", [structures.water(), overlapping])
    with pytest.raises(
        StructureError, match=r"of structure 1 of .*bad\.extxyz \(H2\) are 0\.100 Å"
    ):
        read_structures([tmp_path / "bad.extxyz"])


@pytest.mark.parametrize(
    ("choice", "n"), [("", 6), ("@0", 1), ("@-1", 1), ("@:2", 2), ("@1:6:2", 3)]
)
def test_a_choice_of_structures(tmp_path, choice, n):
    frames = [structures.water() for _ in range(6)]
    for number, atoms in enumerate(frames):
        atoms.positions[0, 0] += 0.01 * number
    path = tmp_path / "md@300K.extxyz"
    ase.io.write(path, frames)
    found = read_structures(f"{path}{choice}")
    assert len(found) == n
    if choice == "@-1":
        np.testing.assert_allclose(found[0].positions, frames[-1].positions, atol=1e-7)


def test_a_choice_that_is_none_is_told(tmp_path):
    path = tmp_path / "a.extxyz"
    ase.io.write(path, structures.water())
    with pytest.raises(StructureError, match=r"cannot read structures from .*a\.extxyz@few"):
        read_structures(f"{path}@few")
