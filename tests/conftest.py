"""Shared fixtures: labelled structures, and tiny potentials made from their statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import structures
import torch
from ase import Atoms
from hypothesis import settings

from orbcalc.config import LabelConfig, PotentialConfig
from orbcalc.labels.process import WorkerProcess, label_structures
from orbcalc.labels.store import LabelStore
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.structures import structure_key
from orbcalc.testing import in_dtype
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.statistics import fit_statistics

HEADS = ("equivariant", "invariant", "none")
DTYPES = (torch.float64, torch.float32)

# Machines that share their cores stall now and then: no deadline. Examples come from the test
# itself, so that a run can be repeated.
settings.register_profile("orbcalc", deadline=None, derandomize=True, database=None)
settings.load_profile("orbcalc")

MakePotential = Callable[..., Potential]


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[Atoms]:
    """Small molecules and crystals with GFN1 charges and GFN2 energies, forces and stress."""
    molecules = [
        structures.water(),
        structures.ethanol(),
        structures.ammonium(),
        structures.oxygen(),
        structures.nitric_oxide(),
        structures.sulfur_hexafluoride(),
        structures.iron_pentacarbonyl(),
    ]
    for seed, atoms in enumerate(molecules):
        atoms.rattle(0.05, seed=seed)
    everything = [*molecules, structures.rock_salt(), structures.ice_cell()]
    store = LabelStore(tmp_path_factory.mktemp("labels") / "labels.db")
    with WorkerProcess() as process:
        labels = label_structures(process, everything, LabelConfig(stress=True))
        store.add_many(zip(everything, labels, strict=True))
    result = store.labelled_atoms([structure_key(atoms) for atoms in everything])
    assert len(result) == len(everything)
    return result


@pytest.fixture(scope="session")
def make_potential(labelled: list[Atoms]) -> MakePotential:
    """Return a maker of small untrained potentials with the statistics of `labelled`."""

    def make(
        head: str = "equivariant",
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 0,
        **options: object,
    ) -> Potential:
        sizes = {"cutoff": 4.0, "channels": 6, "layers": 2, "radial_functions": 4}
        sizes |= {"radial_hidden": 8, "charge_head": head}
        config = PotentialConfig.model_validate(sizes | options)
        dataset = LabelDataset(labelled, config.cutoff)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            potential = Potential(
                config,
                dataset.elements,
                dataset.shells,
                fit_statistics(dataset, config),
                torch.float64,
            )
            # As after a training on several charges and spins.
            torch.nn.init.normal_(potential.backbone.electrons.get_parameter("2.weight"), std=0.5)
        return in_dtype(potential, dtype)

    return make


@pytest.fixture(scope="session", params=HEADS)
def head(request: pytest.FixtureRequest) -> str:
    """Each kind of charge head."""
    return str(request.param)


@pytest.fixture(scope="session", params=DTYPES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each precision."""
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="session")
def potential(make_potential: MakePotential, head: str) -> Potential:
    """A small potential in float64, with each charge head."""
    return make_potential(head)


@pytest.fixture(scope="session")
def potential_of_dtype(make_potential: MakePotential, head: str, dtype: torch.dtype) -> Potential:
    """A small potential with each charge head, in each precision."""
    return make_potential(head, dtype)


@pytest.fixture(scope="session")
def committee(make_potential: MakePotential) -> Committee:
    """Two members in float64."""
    return Committee([make_potential(seed=seed) for seed in (1, 2)])
