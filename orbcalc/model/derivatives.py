"""Forces and stress from an energy that depends on positions only through edge vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orbcalc.graph import AtomGraph, sum_reverse

__all__ = ["forces_and_stress"]


def forces_and_stress(
    energy: Float[Tensor, " n_structures"],
    vectors: Float[Tensor, "n_atoms n_slots 3"],
    graph: AtomGraph,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> tuple[Float[Tensor, "n_atoms 3"], Float[Tensor, "n_structures 3 3"]]:
    """Differentiate an energy with respect to positions and strain.

    With ``g_ij = dE/dr_ij`` for the edge vectors ``r_ij = r_j - r_i``, one backward pass gives
    both ``F_i = Σ_j (g_ij - g_ji)`` and ``dE/dε = Σ_ij r_ij ⊗ g_ij``, because a strain acts on
    an edge vector as ``(1 + ε) r_ij``.

    Parameters
    ----------
    energy
        eV.
    vectors
        The edge vectors that the energy was computed from, Å; they must require a gradient.
    graph
        Their batch of structures.
    create_graph
        Keep the derivatives differentiable, as the force loss needs.
    retain_graph
        Another energy of the same network will be differentiated.

    Returns
    -------
    forces
        eV/Å.
    stress
        ``(1/V) dE/dε``, eV/Å³, positive under tension; NaN for a structure without a volume.
    """
    if not energy.requires_grad:  # no structure has a neighbour that the energy depends on
        energy = energy + 0.0 * vectors.sum()
    (gradient,) = torch.autograd.grad(
        energy.sum(), vectors, create_graph=create_graph, retain_graph=create_graph or retain_graph
    )
    gradient = torch.where(graph.mask[..., None], gradient, 0.0)
    forces = gradient.sum(1) - sum_reverse(gradient, graph)
    lengths = vectors if create_graph else vectors.detach()
    virial = graph.sum_over_atoms(torch.einsum("nka,nkb->nab", lengths, gradient))
    virial = (virial + virial.transpose(1, 2)) / 2
    has_volume = graph.is_periodic[:, None, None]
    # NaN is put in after the division: its derivative would be NaN for every weight.
    a, b, c = graph.cell.unbind(1)
    volumes = (torch.linalg.cross(a, b) * c).sum(1).abs()
    volume = torch.where(has_volume, volumes[:, None, None], 1.0)
    return forces, torch.where(has_volume, virial / volume, torch.nan)
