"""Compiled networks predict the same, and their failure harms nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import structures
import torch
from ase.build import molecule
from conftest import MakePotential

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.graph import AtomGraph
from orbcalc.model.checkpoint import save_model
from orbcalc.model.committee import Committee
from orbcalc.model.compiled import compiled


@pytest.fixture(scope="module")
def plain(make_potential: MakePotential) -> Committee:
    """One potential, with messages of degree 1."""
    potential = make_potential("none", message_l_max=1)
    return Committee([potential.requires_grad_(False)])


#: In a process of its own: the checks of array shapes that tests add do not compile.
COMPARE = """
import sys, ase.io
import numpy as np
from orbcalc.calculator import OrbcalcCalculator
model, structures, device = sys.argv[1:]
options = {"dtype": "float64", "device": device}
fast, slow = (OrbcalcCalculator(model, compile=c, **options) for c in (True, False))
for atoms in ase.io.iread(structures):
    for name in ("energy", "forces", *(["stress"] if atoms.pbc.all() else [])):
        for calculator in (fast, slow):
            calculator.calculate(atoms, [name])
        np.testing.assert_allclose(fast.results[name], slow.results[name], rtol=1e-9, atol=1e-9)
assert fast._compiled is not slow.model
assert fast._compiled.first.compiled_backbone is not None
assert fast.model.first.compiled_backbone is None
"""


NEEDS_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_A_GPU)])
def test_a_compiled_potential_predicts_the_same(
    plain: Committee, tmp_path: Path, device: str
) -> None:
    """For sizes that it was not compiled for, with and without a cell, along a trajectory."""
    walk = [structures.ethanol() for _ in range(3)]
    for seed, atoms in enumerate(walk):
        atoms.rattle(0.05, seed=seed)
    others = [structures.water(), structures.ice_cell(), structures.rock_salt()]
    save_model(tmp_path / "a.orbcalc", plain)
    ase.io.write(tmp_path / "a.extxyz", [*walk, *others])
    files = [str(tmp_path / name) for name in ("a.orbcalc", "a.extxyz")]
    subprocess.run([sys.executable, "-c", COMPARE, *files, device], check=True)


def test_without_a_compiler_it_is_used_as_it_is(
    plain: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function, **options):
        def fail(*arguments, **named):
            raise RuntimeError("no C++ compiler found\nwith many more lines")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    atoms = molecule("H2O")
    atoms.calc = OrbcalcCalculator(plain, compile=True)
    with pytest.warns(UserWarning, match=r"RuntimeError: no C\+\+ compiler found$"):
        energy = atoms.get_potential_energy()
    assert energy == OrbcalcCalculator(plain).get_potential_energy(molecule("H2O"))
    atoms.rattle(0.1)
    atoms.get_potential_energy()  # without another warning, which would be an error


def test_one_that_predicts_something_else_is_not_used(
    plain: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(function, **options):
        def shifted(vectors, *arguments, **named):
            return function(1.01 * vectors, *arguments, **named)

        return shifted

    monkeypatch.setattr(torch, "compile", wrong)
    graph = AtomGraph.from_atoms(structures.ethanol(), plain.cutoff)
    with pytest.warns(UserWarning, match="predicts something else"):
        assert compiled(plain, graph) is plain


def test_a_calculator_may_be_pickled_and_copied_afterwards(
    plain: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapped(function, **options):
        return lambda *arguments, **named: function(*arguments, **named)  # no pickle takes it

    monkeypatch.setattr(torch, "compile", wrapped)
    calculator = OrbcalcCalculator(plain, compile=True)
    energy = calculator.get_potential_energy(molecule("H2O"))
    for found in (pickle.loads(pickle.dumps(calculator)), copy.deepcopy(calculator)):
        assert found._compiled.first.compiled_backbone is not None
        found.reset()
        assert found.get_potential_energy(molecule("H2O")) == energy
