"""The equivariant network: from an `AtomGraph` to features of its atoms.

Each layer sums over neighbours once (`NeighborDensity`), then multiplies features on the atom
itself (`AtomUpdate`), so the many-body order costs nothing per edge. The picture::

    u_ij   = s_j ⊕ (Y_l(r_ij) · h_jl) for each l         what neighbour j shows towards i
    A_iklm = Σ_j φ_k(r_ij) Y_lm(r_ij) u_ij               one product of matrices for each atom
    A_ilm  = W_l A_ilm ⊕ V_l Σ_j φ_k(r_ij) h_jlm         density of neighbours, channels mixed
    B      = A1 ⊕ A1·A2 ⊕ A1·A2·A3                       products of functions on the sphere
    h_i   += f(B)

`φ` are few learned radial functions, and `u` has few channels (in the first layer, of the
elements); the many channels of `A` are made per atom. `A1`, `A2`, `A3` are `A` with other weights.

All features vanish for an atom without neighbours, except the embedding of its element and of
charge and spin. The latter are taken per atom of the structure, so that n copies with n times the
charge have n times the energy, and one charge does not change each of many atoms as it does few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from orbcalc.config import PotentialConfig
from orbcalc.graph import AtomGraph, Neighborhood, gather_neighbors, part_size
from orbcalc.model.basis import SphericalHarmonics, bessel_basis, polynomial_cutoff
from orbcalc.model.products import DegreeLinear, SphereProduct, degree_of_component

__all__ = ["AtomUpdate", "Backbone", "EdgeBasis", "NeighborDensity", "NodeFeatures"]

#: SiLU of a unit normal has a size of 0.6.
SILU_GAIN = 1.6

#: Up to products of three densities, which hold the positions of three neighbours and the atom.
BODY_ORDER = 4

#: Of the neighbours of the first layer.
ELEMENT_CHANNELS = 8

#: Charge and spin per this many atoms are what the network reads: numbers near one.
ELECTRON_ATOMS = 10


@dataclass(frozen=True)
class EdgeBasis:
    """Functions of the edge vectors, shared by all layers; an edge is a slot, used or not."""

    radial: Float[Tensor, "n_radial n_edges"]
    envelope: Float[Tensor, " n_edges"]
    harmonics: Float[Tensor, "n_atoms n_components n_slots"]


@dataclass(frozen=True)
class NodeFeatures:
    """What the heads read."""

    embedding: Float[Tensor, "n_atoms channels"]
    """Of charge and spin only; zero for a neutral singlet."""
    updates: tuple[Float[Tensor, "n_atoms channels"], ...]
    """Scalar update of each layer; zero for an atom without neighbours."""
    hidden: Float[Tensor, "n_components n_atoms channels"]
    """Features after the last layer, up to the degree asked for."""

    def of(self, atoms: slice) -> NodeFeatures:
        """Return those of some atoms."""
        updates = tuple(update[atoms] for update in self.updates)
        return NodeFeatures(self.embedding[atoms], updates, self.hidden[:, atoms])


def mlp(n_in: int, n_hidden: int, n_out: int, *, bias: bool = True) -> nn.Sequential:
    """Return a network of one hidden layer with SiLU.

    It keeps the size of its input.
    """
    first, last = nn.Linear(n_in, n_hidden, bias=bias), nn.Linear(n_hidden, n_out, bias=bias)
    for layer, size in ((first, 1.0), (last, SILU_GAIN)):
        nn.init.normal_(layer.weight, std=size / math.sqrt(layer.in_features))
        if bias:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), last)


class RadialNetwork(nn.Module):
    """Learned radial functions, made of the basis functions by a network of one hidden layer."""

    def __init__(self, n_functions: int, n_hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(n_functions, n_hidden)
        self.last = nn.Linear(n_hidden, n_functions)
        for layer, size in ((self.first, 1.0), (self.last, SILU_GAIN)):
            nn.init.normal_(layer.weight, std=size / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(
        self, radial: Float[Tensor, "n_functions n_edges"]
    ) -> Float[Tensor, "n_functions n_edges"]:
        """Evaluate; edges come last, as everywhere among functions of edges."""
        hidden = silu(torch.addmm(self.first.bias[:, None], self.first.weight, radial))
        functions: Tensor = torch.addmm(self.last.bias[:, None], self.last.weight, hidden)
        return functions


class NeighborDensity(nn.Module):
    """Sum neighbours into the density A, ((l_max + 1)², n_atoms, channels).

    The sums over neighbours are batched products of matrices, one for each atom, of functions
    of the edges with features of the neighbours; radial weights are applied behind them.

    Parameters
    ----------
    config
        Sizes.
    l_in
        Degree of the neighbours' features.
    n_in
        Channels of the neighbours' features.
    """

    def __init__(self, config: PotentialConfig, l_in: int, n_in: int) -> None:
        super().__init__()
        n_radial, channels = config.radial_functions, config.channels
        self.l_max, self.l_in = config.l_max, l_in
        self.radial = RadialNetwork(n_radial, config.radial_hidden)
        self.mix = DegreeLinear(config.l_max, (l_in + 1) * n_radial * n_in, channels, size=0.5)
        if l_in > 0:
            self.mix_passed = DegreeLinear(l_in, n_radial * n_in, channels, l_min=1, size=0.5)

    def forward(
        self,
        shown: Float[Tensor, "m n_all n_in"],
        edges: EdgeBasis,
        graph: AtomGraph | Neighborhood,
    ) -> Float[Tensor, "n_components n channels"]:
        """Sum over the neighbours of every atom."""
        n_atoms, _, n_slots = edges.harmonics.shape
        radial = self.radial(edges.radial) * edges.envelope
        radial = radial.unflatten(1, (n_atoms, n_slots)).transpose(0, 1).contiguous()
        functions = (edges.harmonics[:, :, None] * radial[:, None]).flatten(1, 2)
        neighbors = gather_neighbors(shown.transpose(0, 1).flatten(1), graph)
        neighbors = neighbors.unflatten(-1, (shown.shape[0], -1))  # (n, slots, m, n_in)
        scalars, tensors = neighbors.split([1, shown.shape[0] - 1], dim=2)
        seen = scalars.squeeze(2)
        if self.l_in > 0:
            # What a neighbour's tensors look like from here: their part along the edge.
            parts = edges.harmonics[:, 1 : shown.shape[0]].transpose(1, 2)[..., None] * tensors
            sizes = [2 * degree + 1 for degree in range(1, self.l_in + 1)]
            along = [part.sum(2) / math.sqrt(part.shape[2]) for part in parts.split(sizes, 2)]
            seen = torch.cat([seen, *along], dim=-1)
        density = torch.bmm(functions, seen)
        density = density.unflatten(1, (-1, radial.shape[1])).transpose(0, 1).flatten(2)
        mixed: Tensor = self.mix(density)
        if self.l_in == 0:
            return mixed
        passed = torch.bmm(radial, tensors.flatten(2))
        passed = passed.unflatten(-1, (tensors.shape[2], -1)).permute(2, 0, 1, 3).flatten(2)
        passed = self.mix_passed(passed)
        n_passed = passed.shape[0]
        scalar, lower, higher = mixed.split([1, n_passed, mixed.shape[0] - n_passed - 1])
        return torch.cat([scalar, lower + passed, higher])


class AtomUpdate(nn.Module):
    """Multiply the density with itself and update the features of each atom.

    The factors of a product are the same density, each weighted by degree and channel in a way
    of its own, which the atom's scalars decide.
    """

    degree: Tensor

    def __init__(self, config: PotentialConfig, l_out: int, *, keep_tensors: bool) -> None:
        super().__init__()
        channels, l_max, order = config.channels, config.l_max, BODY_ORDER - 1
        self.order = order
        self.weigh = nn.Linear(channels, order * (l_max + 1) * channels)
        nn.init.normal_(self.weigh.weight, std=0.1 / math.sqrt(channels))
        nn.init.normal_(self.weigh.bias, mean=1.0, std=0.5)
        self.product = SphereProduct(l_max, l_out, order)
        self.combine = DegreeLinear(l_out, order * channels, channels)
        self.shift = nn.Linear(channels, channels)
        self.scalars = nn.Linear(channels, channels, bias=False)
        nn.init.normal_(self.scalars.weight, std=0.8 / math.sqrt(channels))
        if l_out > 0:
            self.gate_tensors = nn.Linear(channels, l_out * channels)
            self.skip = DegreeLinear(l_out, channels, channels, l_min=1) if keep_tensors else None
        self.register_buffer("degree", degree_of_component(l_max), persistent=False)

    def forward(
        self,
        hidden: Float[Tensor, "m n channels"],
        density: Float[Tensor, "n_components n channels"],
        l_out: int,
    ) -> tuple[Float[Tensor, "n channels"], Float[Tensor, "m2 n channels"]]:
        """Return the update of the scalars and the new features up to degree `l_out`."""
        n_out, channels = (l_out + 1) ** 2, density.shape[-1]
        old, old_tensors = hidden.split([1, hidden.shape[0] - 1])
        old = old.squeeze(0)
        weights = self.weigh(old).unflatten(-1, (self.order, -1, channels)).permute(1, 2, 0, 3)
        factors = [density * w.index_select(0, self.degree) for w in weights.unbind()]
        powers = [factors[0][:n_out], *self.product(factors, l_out)]
        message = self.combine(torch.cat(powers, dim=-1))
        scalars, tensors = message.split([1, n_out - 1])
        shift = self.shift(old)
        update = self.scalars(silu(scalars.squeeze(0) + shift) - silu(shift))
        new = old + update
        if l_out == 0:
            return update, new[None]
        gates = self.gate_tensors(new).unflatten(-1, (-1, channels)).transpose(0, 1)
        tensors = tensors * (2 * torch.sigmoid(gates)).index_select(0, self.degree[1:n_out] - 1)
        if self.skip is not None:
            tensors = tensors + self.skip(old_tensors)
        return update, torch.cat([new[None], tensors])


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
        channels, l_message = config.channels, config.message_l_max
        self.harmonics = SphericalHarmonics(config.l_max)
        self.elements = nn.Embedding(n_elements, channels)
        self.electrons = mlp(2, channels, channels, bias=False)
        # Charge and spin do nothing before training, and nothing after it if it shows none.
        nn.init.zeros_(self.electrons.get_parameter("2.weight"))
        # The first layer tells elements apart; many of them share a few channels.
        n_kinds = min(n_elements, ELEMENT_CHANNELS)
        self.kinds = nn.Embedding(n_elements, n_kinds)
        if n_elements == n_kinds:
            self.kinds.weight.data = math.sqrt(n_kinds) * torch.eye(n_kinds)
        self.shown = nn.ModuleList()
        self.densities = nn.ModuleList()
        self.updates = nn.ModuleList()
        for layer in range(config.layers):
            l_in, n_in = (l_message, config.message_channels) if layer else (0, n_kinds)
            keep_tensors, l_out = layer > 0, l_message
            if layer == config.layers - 1:
                # Only the equivariant charge head reads tensors, and only new ones of degree 2.
                keep_tensors, l_out = False, 2 if config.charge_head == "equivariant" else 0
            if layer:
                self.shown.append(DegreeLinear(l_in, channels, n_in))
            self.densities.append(NeighborDensity(config, l_in, n_in))
            self.updates.append(AtomUpdate(config, l_out, keep_tensors=keep_tensors))

    def forward(
        self,
        vectors: Float[Tensor, "n_atoms n_slots 3"],
        elements: Tensor,
        graph: AtomGraph,
        l_out: int,
        *,
        in_parts: bool = False,
    ) -> NodeFeatures:
        """Compute the features of every atom.

        Parameters
        ----------
        vectors
            From every atom to its neighbours, Å.
        elements
            Index of each atom's element.
        graph
            Their batch of structures.
        l_out
            Highest degree that the heads need.
        in_parts
            Save memory: work on parts of the atoms, and once more when derivatives are taken.
        """
        parts: Sequence[AtomGraph | Neighborhood] = [graph]
        if in_parts:
            parts = graph.parts(part_size(elements))
        sizes = [len(part.mask) for part in parts]
        edges = [
            self.edge_basis(own, part.mask)
            for own, part in zip(vectors.split(sizes), parts, strict=True)
        ]
        electrons = torch.stack([graph.charge, graph.unpaired], -1)
        electrons = electrons * (ELECTRON_ATOMS / graph.n_atoms_of_structure[:, None])
        embedding = self.electrons(electrons.to(vectors.dtype))[graph.structure_index]
        hidden = (self.elements(elements) + embedding)[None]
        shown = self.kinds(elements)[None]
        updates = []
        for layer in range(self.config.layers):
            if layer:
                shown = self.shown[layer - 1](hidden)
            degree = l_out if layer == self.config.layers - 1 else self.config.message_l_max
            step = partial(self._layer, layer, degree)
            if in_parts:
                step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
            found = [
                step(own, shown, own_edges, part)
                for own, own_edges, part in zip(
                    hidden.split(sizes, dim=1), edges, parts, strict=True
                )
            ]
            updates.append(torch.cat([scalars for scalars, _ in found]))
            hidden = torch.cat([features for _, features in found], dim=1)
        return NodeFeatures(embedding, tuple(updates), hidden)

    def _layer(
        self,
        layer: int,
        l_out: int,
        own: Float[Tensor, "m n channels"],
        shown: Float[Tensor, "m n_all n_in"],
        edges: EdgeBasis,
        part: AtomGraph | Neighborhood,
    ) -> tuple[Tensor, Tensor]:
        """Update some atoms; `shown` is what all atoms show to their neighbours."""
        density = self.densities[layer](shown, edges, part) / self.neighbor_scale
        updated: tuple[Tensor, Tensor] = self.updates[layer](own, density, l_out)
        return updated

    def edge_basis(
        self,
        vectors: Float[Tensor, "n_atoms n_slots 3"],
        mask: Bool[Tensor, "n_atoms n_slots"],
    ) -> EdgeBasis:
        """Evaluate the functions of the edge vectors."""
        # Unused slots get a constant vector: norms have no derivative at zero, and masking the
        # result afterwards would leave NaN in the second derivatives.
        constant = nn.functional.pad(vectors.new_full((1,), self.config.cutoff), (0, 2))
        vectors = torch.where(mask[..., None], vectors, constant)
        vectors = vectors.flatten(0, 1).T.contiguous()
        distances = vectors.norm(dim=0)
        harmonics = torch.cat(self.harmonics(vectors / distances))
        return EdgeBasis(
            radial=bessel_basis(distances, self.config.cutoff, self.config.radial_functions),
            envelope=polynomial_cutoff(distances, self.config.cutoff),  # 0 at the cutoff
            harmonics=harmonics.unflatten(1, mask.shape).transpose(0, 1).contiguous(),
        )
