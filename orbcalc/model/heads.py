"""Heads: from the features of the atoms to one quantity each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from orbcalc.graph import AtomGraph
from orbcalc.model.backbone import NodeFeatures, mlp
from orbcalc.orbitals import SLOTS

__all__ = ["EnergyHead", "InvariantChargeHead", "OrbitalBlockHead", "slot_of_each"]


class EnergyHead(nn.Module):
    """Energy of each atom beyond its reference energy, in units of the energy scale.

    A linear readout of the scalars of all layers, of a hidden layer on top of the last ones, and
    of charge and spin. All of them vanish for an atom that has no neighbours in a neutral singlet,
    so that such an atom has exactly its reference energy.
    """

    def __init__(self, channels: int, n_layers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels, bias=False)
        self.readout = nn.Linear((n_layers + 2) * channels, 1, bias=False)
        nn.init.normal_(self.hidden.weight, std=1 / math.sqrt(channels))
        nn.init.normal_(self.readout.weight, std=0.3 / math.sqrt(channels))

    @property
    def n_last(self) -> int:
        """Number of components of an atom's last layer."""
        return self.readout.in_features

    def forward(self, features: NodeFeatures) -> Float[Tensor, " n_atoms"]:
        """Evaluate the energies."""
        energy: Tensor = self.readout(self.last_layer(features)).squeeze(-1)
        return energy

    def last_layer(self, features: NodeFeatures) -> Float[Tensor, "n_atoms n_last"]:
        """Return what the energy is a linear function of."""
        hidden = nn.functional.silu(self.hidden(features.updates[-1]))
        return torch.cat([*features.updates, hidden, features.embedding], dim=-1)


class OrbitalBlockHead(nn.Module):
    """On-site charge blocks of all GFN1 shells, (n_atoms, 23), as equivariant irreps in e.

    The components of degree 4 are made here, by coupling two features of degree 2. The scalars
    are shifted so that the charges of a structure add up to its total charge; learned weights
    say where the shift goes.

    Parameters
    ----------
    channels
        Of the features.
    present
        (n_elements, n_slots): which shells each element has; the others are NaN.
    shift, scale
        (n_elements, 23): mean and spread of the training labels.
    """

    l_out = 2

    def __init__(
        self,
        channels: int,
        present: Bool[Tensor, "n_elements n_slots"],
        shift: Float[Tensor, "n_elements 23"],
        scale: Float[Tensor, "n_elements 23"],
    ) -> None:
        super().__init__()
        self.scalars = mlp(channels, channels, 2 * len(SLOTS))
        self.tensors = nn.Linear(channels, 2, bias=False)
        self.left = nn.Linear(channels, channels, bias=False)
        self.right = nn.Linear(channels, channels, bias=False)
        for layer in (self.tensors, self.left, self.right):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(channels))
        coupling = o3.wigner_3j(2, 2, 4, dtype=torch.float64) * 3 / math.sqrt(channels)
        self.register_buffer("coupling", coupling, persistent=False)
        degrees = torch.tensor([slot.l for slot in SLOTS], dtype=torch.float64)
        self.register_buffer("roots", (2 * degrees + 1).sqrt(), persistent=False)
        columns = torch.tensor([slot.columns.start for slot in SLOTS])
        self.register_buffer("scalar_of_slot", columns, persistent=False)
        sizes = [(2 * slot.l + 1) * (slot.l + 1) for slot in SLOTS]
        self.register_buffer("slot_of_column", slot_of_each(sizes), persistent=False)
        _register_labels(self, present, shift, scale)

    def forward(
        self, features: NodeFeatures, elements: Int[Tensor, " n_atoms"], graph: AtomGraph
    ) -> Float[Tensor, "n_atoms 23"]:
        """Evaluate the blocks."""
        s0, s1, p0, d0, *weights = self.scalars(features.hidden[0]).unbind(-1)
        quadrupoles = features.hidden[4:9].transpose(0, 1)  # (n_atoms, 5, channels)
        p2, d2 = self.tensors(quadrupoles).unbind(-1)
        d4 = torch.einsum(
            "nac,nbc,abm->nm",
            self.left(quadrupoles),
            self.right(quadrupoles),
            self.get_buffer("coupling"),
        )
        raw = torch.cat([torch.stack([s0, s1, p0], -1), p2, d0[:, None], d2, d4], dim=-1)
        blocks = raw * self.get_buffer("scale")[elements] + self.get_buffer("shift")[elements]
        present = self.get_buffer("present")[elements]
        columns, roots = self.get_buffer("scalar_of_slot"), self.get_buffer("roots")
        charges = torch.where(present, blocks[:, columns] * roots, 0.0)
        missing = _distribute(charges, torch.stack(weights, -1), present, graph) / roots
        blocks = blocks.index_add(1, columns, missing)
        return torch.where(present[:, self.get_buffer("slot_of_column")], blocks, torch.nan)


class InvariantChargeHead(nn.Module):
    """AO charges (n_atoms, 10) from scalars alone, in e: the baseline that the paper compares.

    The charges of single p and d orbitals depend on the frame, so scalars cannot represent
    them: only shell sums can become exact.
    """

    l_out = 0

    def __init__(
        self,
        channels: int,
        present: Bool[Tensor, "n_elements n_slots"],
        shift: Float[Tensor, "n_elements 10"],
        scale: Float[Tensor, "n_elements 10"],
    ) -> None:
        super().__init__()
        self.n_orbitals = shift.shape[1]
        self.scalars = mlp(channels, channels, self.n_orbitals + len(SLOTS))
        sizes = torch.tensor([2 * slot.l + 1 for slot in SLOTS])
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("slot_of_orbital", slot_of_each(sizes.tolist()), persistent=False)
        _register_labels(self, present, shift, scale)

    def forward(
        self, features: NodeFeatures, elements: Int[Tensor, " n_atoms"], graph: AtomGraph
    ) -> Float[Tensor, "n_atoms 10"]:
        """Evaluate the charges."""
        raw, weights = self.scalars(features.hidden[0]).split([self.n_orbitals, len(SLOTS)], -1)
        charges = raw * self.get_buffer("scale")[elements] + self.get_buffer("shift")[elements]
        present = self.get_buffer("present")[elements]
        slot_of_orbital = self.get_buffer("slot_of_orbital")
        everywhere = present[:, slot_of_orbital]
        shells = charges.new_zeros(present.shape).index_add(
            1, slot_of_orbital, torch.where(everywhere, charges, 0.0)
        )
        missing = _distribute(shells, weights, present, graph) / self.get_buffer("sizes")
        return torch.where(everywhere, charges + missing[:, slot_of_orbital], torch.nan)


def slot_of_each(sizes: Sequence[int]) -> Int[Tensor, " n_components"]:
    """Return the slot that each component belongs to, if a slot has so many of them."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _register_labels(head: nn.Module, present: Tensor, shift: Tensor, scale: Tensor) -> None:
    head.register_buffer("present", present.clone())
    head.register_buffer("shift", shift.clone())
    head.register_buffer("scale", scale.clone())


def _distribute(
    charges: Float[Tensor, "n_atoms n_slots"],
    logits: Float[Tensor, "n_atoms n_slots"],
    present: Bool[Tensor, "n_atoms n_slots"],
    graph: AtomGraph,
) -> Float[Tensor, "n_atoms n_slots"]:
    """Share what is missing of the total charge among the shells of each structure."""
    missing = graph.charge.to(charges.dtype) - graph.sum_over_atoms(charges.sum(1))
    weights = torch.where(present, nn.functional.softplus(logits) + 1e-3, 0.0)
    share = missing / graph.sum_over_atoms(weights.sum(1))
    return weights * share[graph.structure_index, None]
