"""The Gaussian process above a learned GFN1-xTB energy: its head, and its fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from conftest import MakePotential

from orbcalc.errors import CheckpointError, ConfigError, MissingLabelError
from orbcalc.graph import PART_ATOMS, AtomGraph
from orbcalc.model.archive import read_archive, write_archive
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.model.process import ProcessHead
from orbcalc.properties import REF_ENERGY, XTB_ENERGY
from orbcalc.testing import assert_consistent, assert_derivatives, assert_equivariant
from orbcalc.training import process as fit_module
from orbcalc.training.calibration import calibrate
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.process import fit_process, left_out, place_process

CUTOFF = 4.0
OPTIONS = {"xtb_head": "baseline", "energy_head": "process"}


def waters(n: int, seed: int = 0) -> list[Atoms]:
    """Return bent and stretched molecules of water with both energies, eV."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        atoms = structures.water()
        atoms.positions += rng.normal(scale=0.08, size=(3, 3))
        atoms.info[XTB_ENERGY] = -150.0
        atoms.info[REF_ENERGY] = -2000.0 + difference(atoms)
        found.append(atoms)
    return found


def difference(atoms: Atoms) -> float:
    """Return a smooth function of the bond lengths, eV."""
    return float(np.sum(3.0 * (atoms.get_distances(0, [1, 2]) - 1.0) ** 2)) - 150.0


def data(atoms: list[Atoms], potential: Potential) -> LabelDataset:
    """Return structures of some of the elements of a potential."""
    return LabelDataset(atoms, CUTOFF).with_elements(potential.elements)


def energies(potential: Potential, dataset: LabelDataset) -> torch.Tensor:
    with torch.no_grad():
        return potential(AtomGraph.batch(dataset.graphs)).energy


def labels(dataset: LabelDataset) -> torch.Tensor:
    return torch.cat([targets.energy for targets in dataset.targets])


def quiet_baseline(potential: Potential) -> Potential:
    """Let the learned GFN1-xTB energy be that of the labels of `waters`."""
    assert potential.xtb_head is not None
    potential.xtb_head.readout.weight.data.zero_()
    potential._xtb_reference_energies.zero_()
    potential._xtb_reference_energies[list(potential.elements).index(8)] = -150.0
    return potential


@pytest.fixture
def unfitted(make_potential: MakePotential) -> Potential:
    """A potential whose process is still to be fitted."""
    return quiet_baseline(make_potential(**OPTIONS))


@pytest.fixture(scope="module")
def fitted(make_potential: MakePotential, labelled: list[Atoms]) -> Potential:
    """One that was fitted to everything labelled: molecules, ions, radicals, crystals."""
    potential = make_potential(**OPTIONS)
    fit_process(potential, LabelDataset(labelled, CUTOFF))
    assert potential.n_inducing > 20
    return potential


@pytest.mark.parametrize(
    "make",
    [structures.chiral, structures.ammonium, structures.nitric_oxide, structures.ice_cell],
)
def test_it_has_the_symmetries_and_derivatives_of_a_potential(
    fitted: Potential, make: Callable[[], Atoms]
) -> None:
    atoms = make()
    atoms.rattle(0.05, seed=3)
    assert_equivariant(fitted, atoms)
    assert_derivatives(fitted, atoms)


def test_a_batch_and_a_supercell_change_nothing(fitted: Potential) -> None:
    assert_consistent(fitted, [structures.rock_salt(), structures.water(), structures.ice_cell()])


def test_before_the_fit_the_energy_is_the_learned_gfn1_energy(unfitted: Potential) -> None:
    graph = AtomGraph.from_atoms(structures.water(), CUTOFF)
    found = unfitted(graph, ("energy", "xtb_energy"))
    above = unfitted.reference_energies - unfitted.xtb_reference_energies
    shift = above[unfitted.element_index[graph.numbers]].sum()
    torch.testing.assert_close(found.energy, found.xtb_energy + shift)


def test_lone_atoms_keep_their_reference_energies(fitted: Potential) -> None:
    lone = structures.lone_atom("O")
    energy = fitted(AtomGraph.from_atoms(lone, CUTOFF)).energy
    expected = fitted.reference_energies[fitted.element_index[8]]
    torch.testing.assert_close(energy, expected[None], rtol=0, atol=1e-9)


def test_large_systems_are_worked_on_in_parts(
    fitted: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = AtomGraph.from_atoms(structures.ice_cell(), CUTOFF)
    fitted.get_buffer("whitening").copy_(torch.eye(fitted.n_inducing + len(fitted.elements)))
    fitted.get_buffer("atom_whitening").copy_(fitted.get_buffer("whitening"))
    wanted = ("energy", "forces", "energy_rigidity", "atom_rigidity")
    whole = fitted(graph, ("energy", "forces", "rigidity"))
    monkeypatch.setitem(PART_ATOMS, "cpu", 2)
    parts = fitted(graph, ("energy", "forces", "rigidity"))
    for name in wanted:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_it_learns_what_few_labels_tell(unfitted: Potential) -> None:
    fit_process(unfitted, data(waters(60), unfitted))
    others = data(waters(40, seed=1), unfitted)
    errors = energies(unfitted, others) - labels(others)
    assert errors.square().mean().sqrt() < 0.5 * labels(others).std()


def test_it_is_the_mean_of_the_gaussian_process(
    unfitted: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all atoms inducing, against the textbook's formula with the kernel of structures."""
    noise = 1e-3
    monkeypatch.setattr(fit_module, "_NOISES", (noise,))
    monkeypatch.setattr(fit_module, "_KNOWN", 0.0)
    dataset = data(waters(8), unfitted)
    fit_process(unfitted, dataset)
    head = unfitted.energy_head
    assert isinstance(head, ProcessHead)
    assert head.n_last == 24
    graph = AtomGraph.batch(dataset.graphs)
    kinds = unfitted.element_index[graph.numbers]
    with torch.no_grad():
        nodes = unfitted.backbone(graph.edge_vectors(), kinds, graph, 0)
    features = (head.features(nodes) - head.centre) / head.size
    lone = (-head.centre / head.size).expand_as(features)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-torch.cdist(a, b).square() / 2).exp() * (kinds[:, None] == kinds)

    atoms = kernel(features, features) - kernel(features, lone)
    atoms = atoms - kernel(lone, features) + kernel(lone, lone)
    k = atoms.reshape(8, 3, 8, 3).sum((1, 3)) / 3  # of structures, over roots of their sizes
    k = k / k.diagonal().mean()
    constant = 1e4 * torch.full_like(k, (2**2 + 1) / 3)  # two hydrogen atoms and an oxygen atom
    y = (labels(dataset) - labels(dataset).mean()) / 3**0.5
    mean = (k + constant) @ torch.linalg.solve(k + constant + noise * torch.eye(8), y)
    found = (energies(unfitted, dataset) - labels(dataset).mean()) / 3**0.5
    torch.testing.assert_close(found, mean, rtol=0, atol=2e-3 * float(y.abs().max()))


def test_before_any_energy_it_is_placed_on_the_atoms_of_all(unfitted: Potential) -> None:
    bare = waters(20)
    for atoms in bare:
        del atoms.info[REF_ENERGY]
    place_process(unfitted, LabelDataset(bare, CUTOFF))  # of some of its elements
    assert unfitted.n_inducing > 10
    graph = AtomGraph.batch(data(waters(5, seed=1), unfitted).graphs)
    found = unfitted(graph, ("energy", "xtb_energy", "last_layer"))
    torch.testing.assert_close(found.energy, found.xtb_energy)
    assert not unfitted.told.any()
    assert found.last_layer.shape == (15, unfitted.n_inducing + len(unfitted.elements))
    # Kernels of structures, which the functions stand for: those of twins are alike.
    functions = graph.sum_over_atoms(found.last_layer[:, : unfitted.n_inducing])
    assert (functions @ functions.T).diagonal().min() > 0
    fit_process(unfitted, LabelDataset(waters(60), CUTOFF))
    others = data(waters(40, seed=1), unfitted)
    errors = energies(unfitted, others) - labels(others)
    assert errors.square().mean().sqrt() < 0.5 * labels(others).std()


def test_it_is_placed_on_every_element(
    make_potential: MakePotential, labelled: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "_PLACES", 1)
    potential = make_potential(**OPTIONS)
    place_process(potential, LabelDataset(labelled, CUTOFF))
    head = potential.energy_head
    assert isinstance(head, ProcessHead)
    present = {int(z) for atoms in labelled for z in atoms.numbers}
    kinds = {int(potential.element_index[z]) for z in present}
    assert set(head.inducing_elements.tolist()) == kinds


def test_a_committee_has_no_last_layer_of_its_own(fitted: Potential) -> None:
    graph = AtomGraph.from_atoms(structures.water(), CUTOFF)
    assert Committee([fitted])(graph, ["last_layer"]).last_layer is not None
    with pytest.raises(ConfigError, match="ask one of its members"):
        Committee([fitted, fitted])(graph, ["last_layer"])


def test_features_do_not_depend_on_what_it_is_fitted_to(unfitted: Potential) -> None:
    before = {name: value.clone() for name, value in unfitted.backbone.state_dict().items()}
    fit_process(unfitted, data(waters(10), unfitted))
    for name, value in unfitted.backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_wrong_energy_is_left_out(unfitted: Potential, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    wrong = waters(60)
    wrong[7].info[REF_ENERGY] += 1000.0
    fit_process(unfitted, data(wrong, unfitted))
    assert "structure 7" in caplog.text
    others = data(waters(40, seed=1), unfitted)
    errors = energies(unfitted, others) - labels(others)
    assert errors.square().mean().sqrt() < 0.5 * labels(others).std()


def test_energies_of_lone_atoms_change_nothing(
    make_potential: MakePotential, caplog: pytest.LogCaptureFixture
) -> None:
    """Were they kept, the process would have to be what lies between lone and bound atoms."""
    caplog.set_level(logging.WARNING)
    oxygen = structures.lone_atom("O")
    oxygen.info |= {REF_ENERGY: -1990.0, XTB_ENERGY: -100.0}
    found = []
    for more in ([], [oxygen]):
        potential = quiet_baseline(make_potential(**OPTIONS))
        fit_process(potential, data([*waters(20), *more], potential))
        found.append(energies(potential, data(waters(5, seed=1), potential)))
    torch.testing.assert_close(*found)
    assert "1 lone atoms are not learned" in caplog.text


def test_cheap_structures_do_not_change_which_energies_are_wild(unfitted: Potential) -> None:
    """Nine labels, of which some are alone in their composition, among many without any."""
    rare = [Atoms("OH", [[0, 0, 0], [0, 0, 0.97]]), structures.ice_cell()]
    for atoms, energy in zip(rare, (-1500.0, -9000.0), strict=True):
        atoms.info |= {XTB_ENERGY: -140.0, REF_ENERGY: energy}
    labelled = [*waters(7), *rare]
    cheap = waters(300, seed=2)
    for atoms in cheap:
        del atoms.info[REF_ENERGY]
    expected = fit_of(unfitted, labelled)
    torch.testing.assert_close(fit_of(unfitted, [*labelled, *cheap]), expected)


def fit_of(potential: Potential, atoms: list[Atoms]) -> torch.Tensor:
    fit_process(potential, data(atoms, potential))
    return energies(potential, data(waters(5, seed=1), potential))


@pytest.mark.parametrize("charge", [-1, 1])
def test_a_charge_that_all_have_is_not_blown_up(unfitted: Potential, charge: int) -> None:
    """Their embedding varies by rounding alone."""
    ions = waters(60)
    for atoms in ions:
        atoms.info |= {"charge": charge, "spin": 2}
    dataset = data(ions, unfitted)
    fit_process(unfitted, dataset)
    alone = torch.cat([energies(unfitted, data([atoms], unfitted)) for atoms in ions])
    torch.testing.assert_close(alone, energies(unfitted, dataset), rtol=0, atol=1e-6)


def test_rare_elements_are_among_the_inducing_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_CANDIDATES", 20)
    elements = torch.zeros(500, dtype=torch.int64)
    elements[[17, 333]] = 1
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()
    chosen = fit_module._inducing(features, elements)
    assert len(chosen) == 20
    assert {17, 333} <= set(chosen.tolist())


def test_atoms_far_from_each_other_leave_nothing_to_fit(unfitted: Potential) -> None:
    torn = [Atoms("OO", [[0, 0, 0], [0, 0, 9.0 + i]]) for i in range(3)]
    for atoms in torn:
        atoms.info |= {REF_ENERGY: -4000.0, XTB_ENERGY: -300.0}
    assert fit_of(unfitted, torn).isfinite().all()


def test_without_a_gfn1_label_the_learned_energy_is_below(unfitted: Potential) -> None:
    bare = waters(20)
    for atoms in bare[::2]:
        del atoms.info[XTB_ENERGY]
    fit_process(unfitted, data(bare, unfitted))
    dataset = data(waters(20), unfitted)
    errors = energies(unfitted, dataset) - labels(dataset)
    assert errors.abs().max() < 0.3 * labels(dataset).std()


@pytest.mark.parametrize("left", [[], [structures.lone_atom("O")]])
def test_nothing_to_fit_to_is_refused(unfitted: Potential, left: list[Atoms]) -> None:
    bare = waters(3)
    for atoms in bare:
        del atoms.info[REF_ENERGY]
    for atoms in left:
        atoms.info |= {REF_ENERGY: -1990.0, XTB_ENERGY: -100.0}
    with pytest.raises(MissingLabelError, match="nothing to be fitted to"):
        fit_process(unfitted, data([*bare, *left], unfitted))


def test_leaving_out_is_fitting_without(
    unfitted: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = data(waters(12), unfitted)
    noise = 1e-3
    monkeypatch.setattr(fit_module, "_NOISES", (noise,))
    fit_process(unfitted, known)
    within = energies(unfitted, known) - labels(known)
    found = energies(unfitted, known) - labels(left_out(unfitted, known))
    head = unfitted.energy_head
    assert isinstance(head, ProcessHead)
    # The same inducing atoms, and the same size of the process, without each structure in turn.
    unit = fit_module._Fit.of(head, fit_module._known(unfitted, known)).unit
    monkeypatch.setattr(fit_module, "_placed", lambda *_: head)
    for index in range(len(known)):
        rest = [
            e if i != index else torch.full((1,), torch.nan)
            for i, e in enumerate(labels(known)[:, None])
        ]
        others = known.with_energies(rest)
        own = fit_module._Fit.of(head, fit_module._known(unfitted, others)).unit
        monkeypatch.setattr(fit_module, "_NOISES", (noise * (unit / own) ** 2,))
        fit_process(unfitted, others)
        error = (energies(unfitted, known) - labels(known))[index]
        assert error == pytest.approx(float(found[index]), rel=0.02, abs=1e-5)
    assert found.square().mean() > 4 * within.square().mean()


def test_what_alone_tells_of_an_element_cannot_be_left_out(unfitted: Potential) -> None:
    ammonia = structures.ammonium()
    ammonia.info |= {REF_ENERGY: -1500.0, XTB_ENERGY: -120.0}
    wild = structures.water()
    wild.info |= {REF_ENERGY: 1e6, XTB_ENERGY: -150.0}
    known = data([*waters(12), ammonia, wild, *waters(2, seed=1)], unfitted)
    bare = known.with_energies([*labels(known)[:-2, None], *torch.full((2, 1), torch.nan)])
    fit_process(unfitted, bare)
    found = labels(left_out(unfitted, bare))
    assert found[:12].isfinite().all()
    assert found[12].isnan()
    assert found[13] == 1e6  # it was not fitted to
    assert found[14:].isnan().all()


def test_intervals_of_left_out_structures_hold_for_others(unfitted: Potential) -> None:
    train, others = data(waters(60), unfitted), data(waters(400, seed=5), unfitted)
    fit_process(unfitted, train)
    judged = left_out(unfitted, train)
    model = calibrate(Committee([unfitted]), train, judged, in_turn=True)
    found = model(AtomGraph.batch(others.graphs))
    errors = (found.energy - labels(others)).abs()
    assert found.energy_uncertainty is not None
    assert found.energy_interval_95 is not None
    assert float((errors <= found.energy_uncertainty).double().mean()) == pytest.approx(
        0.68, abs=0.13
    )
    assert float((errors <= found.energy_interval_95).double().mean()) == pytest.approx(
        0.95, abs=0.05
    )


def test_a_calibrated_model_survives_its_file(unfitted: Potential, tmp_path: Path) -> None:
    train, valid = data(waters(40), unfitted), data(waters(40, seed=1), unfitted)
    fit_process(unfitted, train)
    committee = calibrate(Committee([unfitted]), train, valid)
    path = tmp_path / "model.orbcalc"
    save_model(path, committee)
    again, _ = load_model(path, dtype=torch.float64)
    graph = AtomGraph.batch(data(waters(30, seed=2), unfitted).graphs)
    before, after = (model(graph, ("energy", "forces")) for model in (committee, again))
    for name in ("energy", "forces", "energy_uncertainty"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))
    single, _ = load_model(path)
    torch.testing.assert_close(single(graph).energy, before.energy, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("n_inducing", "size", "message"),
    [
        (10**9, 1.0, r"energy_head\.factor has shape"),
        (None, 0.0, r"energy_head\.size must be above zero"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    fitted: Potential, tmp_path: Path, n_inducing: int | None, size: float, message: str
) -> None:
    path = tmp_path / "model.orbcalc"
    save_model(path, Committee([fitted]))
    content, tensors = read_archive(path, kind="model", version=4)
    content["members"][0]["n_inducing"] = n_inducing or fitted.n_inducing
    tensors["0.energy_head.size"] *= size
    write_archive(path, kind="model", version=4, content=content, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)
