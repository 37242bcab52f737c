"""Every quantity of orbcalc on one page: shape, unit, behaviour, names.

This page is the single place where file keys and ASE names are written down; all other
modules import them from here. Units are eV, Å, e; stress is ``+1/V dE/dstrain`` in eV/Å³ in
Voigt order xx yy zz yz xz xy, as in ASE.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BLOCK_IRREPS",
    "CHARGE_KEY",
    "ENERGY_INTERVAL_95",
    "ENERGY_UNCERTAINTY",
    "FORCES_INTERVAL_95",
    "FORCES_UNCERTAINTY",
    "OWN_LABELS",
    "POOL_CERTIFIED",
    "POOL_FAILURE",
    "POOL_MODEL",
    "POOL_SOURCE",
    "PROPERTIES",
    "REF_ENERGY",
    "REF_FORCES",
    "REF_METHOD",
    "REF_STRESS",
    "SPIN_KEY",
    "XTB_BLOCKS",
    "XTB_ENERGY",
    "XTB_FORCES",
    "XTB_METHOD",
    "XTB_SHELLS",
    "PropertySpec",
]

#: Keys of ``atoms.info`` with the total charge (e) and the spin multiplicity 2S + 1.
CHARGE_KEY = "charge"
SPIN_KEY = "spin"

#: Expensive labels, in the keys that MACE users already have in their files.
REF_ENERGY = "REF_energy"
REF_FORCES = "REF_forces"
REF_STRESS = "REF_stress"

#: What errors say where these are missing: ASE puts plain names into a calculator.
OWN_LABELS = (
    "Labels that files have under other names must be renamed: for `energy` and `forces` set "
    f"atoms.info['{REF_ENERGY}'] = atoms.get_potential_energy() and "
    f"atoms.arrays['{REF_FORCES}'] = atoms.get_forces(apply_constraint=False), and write the "
    "structures again."
)

#: Cheap labels (GFN1-xTB).
XTB_ENERGY = "GFN1_energy"
XTB_FORCES = "GFN1_forces"
XTB_BLOCKS = "GFN1_orbital_blocks"
XTB_SHELLS = "GFN1_shells"

#: Results that ASE has no name for; see :mod:`orbcalc.results`.
ENERGY_UNCERTAINTY = "energy_uncertainty"
FORCES_UNCERTAINTY = "forces_uncertainty"
ENERGY_INTERVAL_95 = "energy_interval_95"
FORCES_INTERVAL_95 = "forces_interval_95"

#: Method, program, version and settings behind the labels of a structure, in words.
REF_METHOD = "REF_method"
XTB_METHOD = "GFN1_method"

#: What the output of a run says of each structure; see :mod:`orbcalc.active.output`.
POOL_SOURCE = "orbcalc_source"
POOL_CERTIFIED = "orbcalc_certified"
POOL_MODEL = "orbcalc_model"
POOL_FAILURE = "orbcalc_failure"

#: Irreps (e3nn order) of the orbital charge blocks of one atom. The four slots are the first
#: s, second s, p and d shell; see :mod:`orbcalc.orbitals`.
BLOCK_IRREPS = "0e + 0e + 0e+2e + 0e+2e+4e"


@dataclass(frozen=True)
class PropertySpec:
    """Name, shape, unit and behaviour of one quantity."""

    name: str
    shape: str
    unit: str
    irreps: str
    meaning: str
    file_key: str | None = None
    ase_name: str | None = None


PROPERTIES: tuple[PropertySpec, ...] = (
    PropertySpec("energy", "()", "eV", "0e", "potential energy", REF_ENERGY, "energy"),
    PropertySpec("forces", "(n_atoms, 3)", "eV/Å", "1o", "-dE/dr", REF_FORCES, "forces"),
    PropertySpec(
        "stress",
        "(6,)",
        "eV/Å³",
        "0e+2e",
        "+1/V dE/dstrain, Voigt xx yy zz yz xz xy",
        REF_STRESS,
        "stress",
    ),
    PropertySpec("xtb_energy", "()", "eV", "0e", "GFN1-xTB energy", XTB_ENERGY),
    PropertySpec("xtb_forces", "(n_atoms, 3)", "eV/Å", "1o", "GFN1-xTB forces", XTB_FORCES),
    PropertySpec(
        "orbital_blocks",
        "(n_atoms, 23)",
        "e",
        BLOCK_IRREPS,
        "on-site charge blocks of all GFN1 shells, as irreps; absent shells are NaN",
        XTB_BLOCKS,
    ),
    PropertySpec(
        "shells",
        "(n_atoms, 3)",
        "1",
        "none: the same in every frame",
        "angular momenta of each atom's GFN1 shells in tblite's order, filled up with -1",
        XTB_SHELLS,
    ),
    PropertySpec(
        "orbital_charges",
        "list of (n_orbitals of the atom,)",
        "e",
        "none: the diagonal of the blocks depends on the frame",
        "reference occupation minus Mulliken population of every GFN1 AO, tblite's AO order",
        None,
        "orbital_charges",
    ),
    PropertySpec(
        "charges",
        "(n_atoms,)",
        "e",
        "0e",
        "atomic charges: sum of the traces of the charge blocks",
        None,
        "charges",
    ),
    PropertySpec(
        "energy_uncertainty",
        "()",
        "eV",
        "0e",
        "one standard deviation: 68 % of errors are smaller",
        ENERGY_UNCERTAINTY,
    ),
    PropertySpec(
        "forces_uncertainty",
        "(n_atoms,)",
        "eV/Å",
        "0e",
        "one standard deviation of the force vector's components",
        FORCES_UNCERTAINTY,
    ),
    PropertySpec(
        "energy_interval_95", "()", "eV", "0e", "95 % of errors are smaller", ENERGY_INTERVAL_95
    ),
    PropertySpec(
        "forces_interval_95",
        "(n_atoms,)",
        "eV/Å",
        "0e",
        "95 % of the errors of the force vector's components are smaller",
        FORCES_INTERVAL_95,
    ),
)
