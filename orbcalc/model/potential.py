"""The potential: backbone, heads and derivatives behind one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from ase.data import chemical_symbols
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from orbcalc.config import PotentialConfig
from orbcalc.errors import UnsupportedElementError
from orbcalc.graph import AtomGraph, part_size
from orbcalc.model.backbone import Backbone, NodeFeatures
from orbcalc.model.derivatives import forces_and_stress
from orbcalc.model.heads import (
    EnergyHead,
    InvariantChargeHead,
    OrbitalBlockHead,
    slot_of_each,
)
from orbcalc.model.process import ProcessHead
from orbcalc.orbitals import SLOTS, diagonal_basis, shell_slots

__all__ = ["Potential", "Prediction", "Statistics"]

Shells = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Statistics:
    """What the training set tells a potential before training; see `training.statistics`."""

    reference_energies: Float[Tensor, " n_elements"]
    """Energy of each lone atom, eV."""
    energy_scale: float
    """Size of one atom's energy beyond that, eV; with `xtb_head: baseline`, of the difference."""
    neighbor_scale: float
    charge_shift: Float[Tensor, "n_elements n_components"]
    charge_scale: Float[Tensor, "n_elements n_components"]
    """Mean and spread of the charge head's labels, e; without labels 0 and 1."""
    xtb_reference_energies: Float[Tensor, " n_elements"] | None = None
    """The same in GFN1-xTB, eV; None without a head for its energy."""
    xtb_energy_scale: float = 1.0
    """Size of one atom's GFN1-xTB energy beyond that, eV."""
    told: Bool[Tensor, " n_elements"] | None = None
    """Whose reference energies are known, from labels or as given; None for all."""
    n_inducing: int = 0
    """Atoms that the process of `energy_head: process` is represented by, once it is fitted."""


@dataclass(frozen=True)
class Prediction:
    """What a potential says about a batch; what was not asked for is None."""

    energy: Float[Tensor, " n_structures"]
    """eV, float64."""
    forces: Float[Tensor, "n_atoms 3"] | None = None
    """eV/Å."""
    stress: Float[Tensor, "n_structures 3 3"] | None = None
    """eV/Å³; NaN for a structure without a volume."""
    orbital_blocks: Float[Tensor, "n_atoms 23"] | None = None
    """Charge blocks as irreps, e; NaN for absent shells and from an invariant head."""
    orbital_charges: Float[Tensor, "n_atoms 10"] | None = None
    """AO charges in slot order, e; NaN for absent shells."""
    charges: Float[Tensor, " n_atoms"] | None = None
    """Atomic charges, e; NaN for an element that had no charge labels."""
    xtb_energy: Float[Tensor, " n_structures"] | None = None
    """What GFN1-xTB would give, eV, float64."""
    xtb_forces: Float[Tensor, "n_atoms 3"] | None = None
    """eV/Å."""
    energy_rigidity: Float[Tensor, " n_structures"] | None = None
    atom_rigidity: Float[Tensor, " n_atoms"] | None = None
    """How far the last layer of a structure, and of each atom, is from those of the training set:
    uncertainties up to a factor. See `training.calibration`."""
    reference_uncertainty: Float[Tensor, " n_structures"] | None = None
    """What unknown reference energies may come to, eV; comes with the rigidities."""
    last_layer: Float[Tensor, "n_atoms n_last"] | None = None
    """What the energy of each atom is a linear function of: the last layer of the energy head, and
    1 for its element."""
    features: Float[Tensor, "n_structures channels"] | None = None
    """Mean over atoms of the last scalar update: where a structure lies in the latent space."""


class Potential(nn.Module):
    """An equivariant multitask potential for a fixed set of elements.

    Parameters
    ----------
    config
        Architecture.
    elements
        Atomic numbers it covers.
    shells
        Angular momenta of each element's GFN1 shells, in tblite's order; empty without charges.
    statistics
        From the training set.
    dtype
        Type of the weights. Choose it here: a later `.double()` keeps float32 constants.
    """

    element_index: Tensor
    told: Tensor

    def __init__(
        self,
        config: PotentialConfig,
        elements: Sequence[int],
        shells: Shells,
        statistics: Statistics,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.elements = tuple(sorted(elements))
        self.shells = {z: tuple(shells[z]) for z in self.elements if z in shells}
        index = torch.full((119,), -1, dtype=torch.int64)
        index[list(self.elements)] = torch.arange(len(self.elements))
        self.register_buffer("element_index", index, persistent=False)
        self.energy_scale = statistics.energy_scale
        self.backbone = Backbone(config, len(self.elements), statistics.neighbor_scale)
        #: What is called in its place for systems that are not worked on in parts.
        self.compiled_backbone: Callable[..., NodeFeatures] | None = None
        self.energy_head: EnergyHead | ProcessHead = EnergyHead(config.channels, config.layers)
        self.xtb_energy_scale = statistics.xtb_energy_scale
        self.xtb_head = None
        if config.learns_xtb_energy:
            self.xtb_head = EnergyHead(config.channels, config.layers)
        self.charge_head: OrbitalBlockHead | InvariantChargeHead | None = None
        if config.charge_head != "none" and self.shells:
            head = OrbitalBlockHead if config.charge_head == "equivariant" else InvariantChargeHead
            self.charge_head = head(
                config.channels,
                _present_slots(self.elements, self.shells),
                statistics.charge_shift,
                statistics.charge_scale,
            )
        told = torch.ones(len(self.elements), dtype=torch.bool)
        self.register_buffer("told", told if statistics.told is None else statistics.told)
        diagonal = torch.as_tensor(diagonal_basis(), dtype=torch.float64)
        self.register_buffer("diagonal", diagonal, persistent=False)
        orbitals = slot_of_each([2 * slot.l + 1 for slot in SLOTS])
        self.register_buffer("slot_of_orbital", orbitals, persistent=False)
        self.to(dtype)
        if config.energy_head == "process":  # float64 always
            sizes = config.channels, config.layers
            self.energy_head = ProcessHead(*sizes, statistics.n_inducing)
        self.forget_rigidity()
        # Total energies of heavy atoms take more digits than float32 has.
        self._reference_energies = statistics.reference_energies.double()
        xtb = statistics.xtb_reference_energies
        self._xtb_reference_energies = (
            torch.zeros_like(self._reference_energies) if xtb is None else xtb.double()
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.backbone.elements.weight.dtype

    def forget_process(self) -> None:
        """Take the process back to what it is before it is fitted: features can be trained."""
        head = ProcessHead(self.config.channels, self.config.layers)
        self.energy_head = head.to(self.element_index.device)
        self.told = torch.zeros_like(self.told)
        self.forget_rigidity()

    def forget_rigidity(self) -> None:
        """Make room for the whitenings of the last layer as it is now; they are zero."""
        n_last = self.energy_head.n_last + len(self.elements)
        like = self.backbone.elements.weight
        for name in ("whitening", "atom_whitening"):
            self.register_buffer(name, like.new_zeros(n_last, n_last))

    @property
    def knows_rigidity(self) -> bool:
        """Whether the potential can tell how sure it is; see `training.calibration`."""
        return bool(self.get_buffer("whitening").any())

    @property
    def n_charge_components(self) -> int:
        """Number of components that the charge head predicts for an atom; 0 without one."""
        return 0 if self.charge_head is None else self.charge_head.get_buffer("shift").shape[1]

    @property
    def n_inducing(self) -> int:
        """Number of atoms that the process is represented by; 0 before it is fitted."""
        head = self.energy_head
        return head.n_last if isinstance(head, ProcessHead) else 0

    @property
    def has_energies(self) -> bool:
        """Whether its energies are those of labels; not before a process is fitted to some."""
        is_process = isinstance(self.energy_head, ProcessHead)
        return not is_process or (self.n_inducing > 0 and bool(self.told.any()))

    @property
    def reference_energies(self) -> Float[Tensor, " n_elements"]:
        """Energy of each lone atom, eV, float64."""
        if self._reference_energies.device != self.element_index.device:
            self._reference_energies = self._reference_energies.to(self.element_index.device)
        return self._reference_energies

    @reference_energies.setter
    def reference_energies(self, energies: Float[Tensor, " n_elements"]) -> None:
        self._reference_energies = energies.detach().to(self.element_index.device, torch.float64)

    @property
    def xtb_reference_energies(self) -> Float[Tensor, " n_elements"]:
        """Energy of each lone atom in GFN1-xTB, eV, float64; zero without a head for it."""
        if self._xtb_reference_energies.device != self.element_index.device:
            self._xtb_reference_energies = self._xtb_reference_energies.to(
                self.element_index.device
            )
        return self._xtb_reference_energies

    def forward(
        self,
        graph: AtomGraph,
        properties: Collection[str] = ("energy",),
        *,
        create_graph: bool = False,
    ) -> Prediction:
        """Evaluate the properties asked for.

        Parameters
        ----------
        graph
            A batch; pairs beyond the cutoff may be present.
        properties
            Any of energy (always given), forces, stress, charges, features, last_layer,
            rigidity, xtb_energy, xtb_forces. Charges cost nothing unless asked for.
        create_graph
            Keep forces and stress differentiable, for training on them.

        Raises
        ------
        UnsupportedElementError
            If an atom is of an element that the potential does not cover.
        """
        elements = self.element_index[graph.numbers]
        if bool((elements < 0).any()):
            self.check_elements(graph.numbers.tolist())
        with_charges = "charges" in properties and self.charge_head is not None
        l_out = self.charge_head.l_out if with_charges and self.charge_head is not None else 0
        derivatives = "forces" in properties or "stress" in properties
        xtb_forces = "xtb_forces" in properties and self.xtb_head is not None
        differentiated = derivatives or xtb_forces
        with torch.set_grad_enabled(differentiated or torch.is_grad_enabled()):
            vectors = graph.edge_vectors()
            if differentiated and not vectors.requires_grad:
                vectors.requires_grad_(True)
            in_parts = part_size(elements) < graph.n_atoms and not create_graph
            backbone = None if in_parts or create_graph else self.compiled_backbone
            nodes = (backbone or self.backbone)(
                vectors.to(self.dtype), elements, graph, l_out, in_parts=in_parts
            )
            found = self._charges(nodes, elements, graph) if with_charges else {}
            if "rigidity" in properties:
                found |= self._rigidity(nodes, elements, graph)
            atomic = self._own_energies(nodes, elements) * self.energy_scale
            wants_xtb = self.config.xtb_head == "baseline" or "xtb_energy" in properties
            if self.xtb_head is not None and (wants_xtb or xtb_forces):
                xtb = self.xtb_head(nodes).double() * self.xtb_energy_scale
                xtb_energy = graph.sum_over_atoms(xtb + self.xtb_reference_energies[elements])
                if self.config.xtb_head == "baseline":
                    atomic = atomic + xtb
                if "xtb_energy" in properties:
                    found["xtb_energy"] = xtb_energy
                if xtb_forces:
                    found["xtb_forces"], _ = forces_and_stress(
                        xtb_energy, vectors, graph, create_graph=create_graph, retain_graph=True
                    )
            energy = graph.sum_over_atoms(atomic + self.reference_energies[elements])
            if derivatives:
                forces, stress = forces_and_stress(
                    energy, vectors, graph, create_graph=create_graph
                )
                found |= {"forces": forces, "stress": stress}
        if "last_layer" in properties:
            found["last_layer"] = self._last_layer(nodes, elements)
        if "features" in properties:
            count = graph.n_atoms_of_structure[:, None]
            found["features"] = graph.sum_over_atoms(nodes.updates[-1]) / count
        if differentiated and not create_graph:
            return Prediction(energy.detach(), **{k: v.detach() for k, v in found.items()})
        return Prediction(energy, **found)

    def check_elements(self, numbers: Iterable[int], name: str = "") -> None:
        """Refuse atomic numbers that the potential does not cover.

        Parameters
        ----------
        numbers
            Of the atoms of a structure.
        name
            What to call the structure in the error.

        Raises
        ------
        UnsupportedElementError
            Naming the first one.
        """
        covered = set(self.elements)
        for index, number in enumerate(numbers):
            if int(number) not in covered:
                symbol, place = chemical_symbols[int(number)], f"{name}: " if name else ""
                known = " ".join(chemical_symbols[z] for z in self.elements)
                raise UnsupportedElementError(
                    f"{place}atom {index} is {symbol}, but this potential covers {known}. "
                    f"Use a potential that was trained on {symbol}."
                )

    def _own_energies(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, " n_atoms"]:
        head = self.energy_head
        found: Tensor = head(nodes, elements) if isinstance(head, ProcessHead) else head(nodes)
        return found.double()

    def _last_layer(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, "n_atoms n_last"]:
        head = self.energy_head
        if isinstance(head, ProcessHead):
            with torch.no_grad():  # they say how sure it is
                last = head.functions(head.features(nodes), elements)
        else:
            last = head.last_layer(nodes)
        kinds = nn.functional.one_hot(elements, len(self.elements)).to(last)
        return torch.cat([last, kinds], dim=-1).to(self.dtype)

    def _rigidity(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"], graph: AtomGraph
    ) -> dict[str, Tensor]:
        """Return rigidities from the whitened last layer, and what it knows nothing of.

        Errors of energies of a network grow faster than the last layer moves away from the training
        set, as other layers leave it, too: so the root of how new its atoms are is a factor. A
        reference energy that nothing has told may be as large as the others are.
        """
        whitening, of_atom = (self.get_buffer(f"{name}whitening") for name in ("", "atom_"))
        # In float64: what rounding leaves of a large sum, the whitening enlarges.
        total = whitening.new_zeros(graph.n_structures, len(whitening), dtype=torch.float64)
        of_atoms = []
        size = part_size(elements)
        for start in range(0, graph.n_atoms, size):  # many at once would not fit
            part = slice(start, start + size)
            last = self._last_layer(nodes.of(part), elements[part]).detach()
            total.index_add_(0, graph.structure_index[part], last.double())
            of_atoms.append((last @ of_atom).norm(dim=-1))
        energy = (total.to(self.dtype) @ whitening).norm(dim=-1)
        novelty = torch.cat(of_atoms)
        if not isinstance(self.energy_head, ProcessHead):
            mean_square = graph.sum_over_atoms(novelty.square()) / graph.n_atoms_of_structure
            energy = energy * mean_square**0.25
        return {
            "energy_rigidity": energy,
            "atom_rigidity": torch.where(graph.mask.any(1), novelty, 0.0),  # no force if alone
            "reference_uncertainty": self._size_of_references
            * graph.sum_over_atoms((~self.told[elements]).double()),
        }

    @property
    def _size_of_references(self) -> Float[Tensor, ""]:
        """RMS of the known reference energies, or of their differences from GFN1-xTB, eV."""
        above = self.config.xtb_head == "baseline"
        own = self.reference_energies - (self.xtb_reference_energies if above else 0.0)
        mean_square = (self.told * own.square()).sum() / self.told.sum().clamp_min(1)
        return mean_square.sqrt().clamp_min(self.energy_scale)

    def _charges(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"], graph: AtomGraph
    ) -> dict[str, Tensor]:
        assert self.charge_head is not None
        output = self.charge_head(nodes, elements, graph)
        blocks = None
        if isinstance(self.charge_head, OrbitalBlockHead):
            blocks = output
            diagonal = self.get_buffer("diagonal").to(output.dtype)
            present = self.charge_head.get_buffer("present")[elements]
            is_there = present[:, self.get_buffer("slot_of_orbital")]
            output = torch.where(is_there, torch.nan_to_num(output) @ diagonal, torch.nan)
        unknown = torch.isnan(output).all(1)  # of an element that had no charge labels
        found = {
            "orbital_charges": output,
            "charges": torch.where(unknown, torch.nan, output.nansum(1)),
        }
        return found if blocks is None else {"orbital_blocks": blocks, **found}


def _present_slots(elements: Sequence[int], shells: Shells) -> Bool[Tensor, "n_elements n_slots"]:
    present = torch.zeros(len(elements), len(SLOTS), dtype=torch.bool)
    for row, number in enumerate(elements):
        present[row, list(shell_slots(shells.get(number, ())))] = True
    return present
