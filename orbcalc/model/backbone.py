"""The equivariant network: from an `AtomGraph` to features of its atoms.

Each layer sums over neighbours once (`NeighborDensity`), then multiplies features on the atom
itself (`AtomUpdate`), so the many-body order costs nothing per edge. The picture::

    u_ij  = s_j + Σ_l R_l(r_ij) · (Y_l(r_ij) · h_jl)      what neighbour j shows towards i
    A_ilm = Σ_j Y_lm(r_ij) R_l(r_ij) u_ij  (+ Σ_j R_l h_jlm)         density of neighbours
    B     = A ⊕ (A ⊗ A) ⊕ (A ⊗ A ⊗ A)                     two-, three- and four-body features
    h_i  += f(B)

All features vanish for an atom without neighbours, except the embedding of its element and of
the total charge and spin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from orbcalc.config import PotentialConfig
from orbcalc.graph import AtomGraph, gather_neighbors
from orbcalc.model.basis import SphericalHarmonics, bessel_basis, polynomial_cutoff
from orbcalc.model.products import DegreeLinear, ProductBasis, degree_of_component

__all__ = ["AtomUpdate", "Backbone", "EdgeBasis", "NeighborDensity", "NodeFeatures"]


@dataclass(frozen=True)
class EdgeBasis:
    """Functions of the edge vectors, shared by all layers; zero in unused slots."""

    radial: Float[Tensor, "n_atoms n_slots n_radial"]
    envelope: Float[Tensor, "n_atoms n_slots 1"]
    harmonics: tuple[Float[Tensor, "n_atoms _ n_slots"], ...]
    """One contiguous tensor for each degree: batched products are slow on slices."""


@dataclass(frozen=True)
class NodeFeatures:
    """What the heads read."""

    embedding: Float[Tensor, "n_atoms channels"]
    """Of charge and spin only; zero for a neutral singlet."""
    updates: tuple[Float[Tensor, "n_atoms channels"], ...]
    """Scalar update of each layer; zero for an atom without neighbours."""
    hidden: Float[Tensor, "n_components n_atoms channels"]
    """Features after the last layer, up to the degree asked for."""


def mlp(
    n_in: int, n_hidden: int, n_out: int, *, bias: bool = True, gain: float = 1.6
) -> nn.Sequential:
    """Return a network of one hidden layer with SiLU.

    The default gain keeps the size of the input: SiLU of a unit normal has a size of 0.6.
    """
    first, last = nn.Linear(n_in, n_hidden, bias=bias), nn.Linear(n_hidden, n_out, bias=bias)
    for layer, size in ((first, 1.0), (last, gain)):
        nn.init.normal_(layer.weight, std=size / math.sqrt(layer.in_features))
        if bias:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), last)


class NeighborDensity(nn.Module):
    """Sum neighbours into the density A, ((l_max + 1)², n_atoms, channels)."""

    def __init__(self, config: PotentialConfig, l_in: int) -> None:
        super().__init__()
        self.l_max, self.l_in, self.channels = config.l_max, l_in, config.channels
        # Radial functions: one per degree of A, and two per degree > 0 of incoming features.
        self.n_filters = config.l_max + 1 + 2 * l_in
        self.radial = mlp(
            config.radial_functions,
            config.radial_hidden,
            self.n_filters * config.channels,
            gain=0.5,  # the nearest neighbours, which count most, see larger radial functions
        )
        self.scalars = nn.Linear(config.channels, config.channels, bias=False)
        nn.init.normal_(self.scalars.weight, std=1 / math.sqrt(config.channels))

    def forward(
        self, hidden: Float[Tensor, "m n channels"], edges: EdgeBasis, graph: AtomGraph
    ) -> Float[Tensor, "n_components n channels"]:
        """Sum over the neighbours of every atom."""
        filters = (self.radial(edges.radial) * edges.envelope).unflatten(
            -1, (self.n_filters, self.channels)
        )
        shown = gather_neighbors(self.scalars(hidden[0]), graph)  # (n, slots, channels)
        passed: list[Tensor] = []
        if self.l_in > 0:
            tensors = gather_neighbors(hidden[1:].transpose(0, 1).contiguous(), graph)
            for degree in range(1, self.l_in + 1):
                own = slice(degree**2 - 1, (degree + 1) ** 2 - 1)
                tensor = tensors[:, :, own]  # (n, slots, 2l + 1, channels)
                harmonics = edges.harmonics[degree].transpose(1, 2)[..., None]
                towards = (harmonics * tensor).sum(2) / math.sqrt(2 * degree + 1)
                shown = shown + towards * filters[:, :, self.l_max + degree]
                through = filters[:, :, self.l_max + self.l_in + degree, None]
                passed.append((through * tensor).sum(1))
        density = [
            harmonics @ (filters[:, :, degree] * shown)
            for degree, harmonics in enumerate(edges.harmonics)
        ]
        for degree, message in enumerate(passed, start=1):
            density[degree] = density[degree] + message
        return torch.cat(density, dim=1).transpose(0, 1).contiguous()


class AtomUpdate(nn.Module):
    """Multiply the density with itself and update the features of each atom."""

    degree_of_component: Tensor

    def __init__(self, config: PotentialConfig, l_in: int, l_out: int) -> None:
        super().__init__()
        channels, l_max = config.channels, config.l_max
        self.l_out, self.l_pair = l_out, max(l_out, min(2, l_max))
        self.mix = DegreeLinear(l_max, channels, channels)
        self.gate_density = nn.Linear(channels, (l_max + 1) * channels)
        nn.init.normal_(self.gate_density.weight, std=0.3 / math.sqrt(channels))
        nn.init.ones_(self.gate_density.bias)
        self.square = ProductBasis(l_max, l_max, self.l_pair, channels, symmetric=True, size=0.5)
        self.mix_square = DegreeLinear(self.l_pair, channels, channels)
        self.cube = ProductBasis(self.l_pair, l_max, l_out, channels, size=0.5)
        self.combine = DegreeLinear(l_out, 3 * channels, channels)
        self.shift = nn.Linear(channels, channels)
        self.scalars = nn.Linear(channels, channels, bias=False)
        nn.init.normal_(self.scalars.weight, std=1.6 / math.sqrt(channels))
        if l_out > 0:
            self.gate_tensors = nn.Linear(channels, l_out * channels)
            if l_in > 0:
                self.skip = DegreeLinear(l_in, channels, channels)
        self.register_buffer("degree_of_component", degree_of_component(l_max), persistent=False)

    def forward(
        self,
        hidden: Float[Tensor, "m n channels"],
        density: Float[Tensor, "n_components n channels"],
        l_out: int,
    ) -> tuple[Float[Tensor, "n channels"], Float[Tensor, "m2 n channels"]]:
        """Return the update of the scalars and the new features up to degree `l_out`."""
        gate = self.gate_density(hidden[0]).unflatten(-1, (-1, density.shape[-1]))
        density = self.mix(density) * gate.transpose(0, 1)[self.degree_of_component]
        n_out = (l_out + 1) ** 2
        square = self.square(density, density)
        cube = self.cube(self.mix_square(square), density, l_out)
        message = self.combine(torch.cat([density[:n_out], square[:n_out], cube], dim=-1))
        shift = self.shift(hidden[0])
        update = self.scalars(silu(message[0] + shift) - silu(shift))
        if l_out == 0:
            return update, (hidden[0] + update)[None]
        gate = self.gate_tensors(hidden[0] + update).unflatten(-1, (-1, density.shape[-1]))
        gate = torch.sigmoid(gate).transpose(0, 1)[self.degree_of_component[1:n_out] - 1]
        tensors = message[1:] * gate
        n_old = min(n_out, hidden.shape[0])
        if n_old > 1:
            old = self.skip(hidden)[1:n_old]
            tensors = torch.cat([tensors[: n_old - 1] + old, tensors[n_old - 1 :]])
        return update, torch.cat([(hidden[0] + update)[None], tensors])


class Backbone(nn.Module):
    """Embedding and layers.

    Parameters
    ----------
    config
        Sizes.
    n_elements
        Elements are passed as indices 0 ... n_elements - 1.
    neighbor_scale
        Root of the mean, over atoms, of the summed squares of the cutoff function: the size of
        a neighbour sum of random terms.
    """

    def __init__(self, config: PotentialConfig, n_elements: int, neighbor_scale: float) -> None:
        super().__init__()
        self.config, self.neighbor_scale = config, neighbor_scale
        self.harmonics = SphericalHarmonics(config.l_max)
        self.elements = nn.Embedding(n_elements, config.channels)
        self.electrons = mlp(2, config.channels, config.channels, bias=False)
        l_hidden = config.hidden_l_max
        self.densities = nn.ModuleList()
        self.updates = nn.ModuleList()
        for layer in range(config.layers):
            l_in = 0 if layer == 0 else l_hidden
            # Only an equivariant head reads more than scalars behind the last layer.
            is_read = layer < config.layers - 1 or config.charge_head == "equivariant"
            self.densities.append(NeighborDensity(config, l_in))
            self.updates.append(AtomUpdate(config, l_in, l_hidden if is_read else 0))

    def forward(
        self,
        vectors: Float[Tensor, "n_atoms n_slots 3"],
        elements: Tensor,
        graph: AtomGraph,
        l_out: int,
    ) -> NodeFeatures:
        """Compute the features of every atom; `l_out` is the highest degree the heads need."""
        edges = self.edge_basis(vectors, graph)
        electrons = torch.stack([graph.charge, graph.unpaired], -1).to(vectors.dtype)
        embedding = self.electrons(electrons)[graph.structure_index]
        hidden = (self.elements(elements) + embedding)[None]
        updates = []
        n_layers = len(self.densities)
        for layer, (density, update) in enumerate(zip(self.densities, self.updates, strict=True)):
            neighbors = density(hidden, edges, graph) / self.neighbor_scale
            degree = l_out if layer == n_layers - 1 else self.config.hidden_l_max
            scalars, hidden = update(hidden, neighbors, degree)
            updates.append(scalars)
        return NodeFeatures(embedding, tuple(updates), hidden)

    def edge_basis(
        self, vectors: Float[Tensor, "n_atoms n_slots 3"], graph: AtomGraph
    ) -> EdgeBasis:
        """Evaluate the functions of the edge vectors."""
        # Unused slots get a constant vector: norms have no derivative at zero, and masking the
        # result afterwards would leave NaN in the second derivatives.
        constant = vectors.new_tensor([self.config.cutoff, 0.0, 0.0])
        vectors = torch.where(graph.mask[..., None], vectors, constant)
        distances = vectors.norm(dim=-1)
        envelope = polynomial_cutoff(distances, self.config.cutoff)  # 0 at the cutoff, so unused
        return EdgeBasis(
            radial=bessel_basis(distances, self.config.cutoff, self.config.radial_functions),
            envelope=envelope[..., None],
            harmonics=tuple(
                part.transpose(1, 2).contiguous()
                for part in self.harmonics(vectors / distances[..., None])
            ),
        )
