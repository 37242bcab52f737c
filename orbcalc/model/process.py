"""The mean of a Gaussian process as energy head: fitted in closed form, not trained.

The energy of a structure beyond its reference energies is a sum over its atoms of a function of
their features and element, with a Gaussian process as prior. Its kernel compares atoms of the
same element::

    k(x, x') = exp(-|x - x'|² / 2w²) - what makes it vanish for an atom without neighbours

and that of structures is the sum over all pairs of their atoms (Bartók 2010, 0910.1019). The
process is represented by few inducing atoms (subset of regressors, Quiñonero-Candela & Rasmussen
2005, JMLR 6, 1939), so the energy is linear in as many functions of an atom.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbcalc.model.backbone import PART_ATOMS, NodeFeatures

__all__ = ["ProcessHead"]

#: Of the kernel between inducing atoms, so that near twins do no harm.
_JITTER = 1e-6


class ProcessHead(nn.Module):
    """Energy of each atom beyond its reference energy, in units of the energy scale.

    Everything is float64, as its sums over inducing atoms cancel. Without inducing atoms the
    energy is zero.

    Parameters
    ----------
    channels, n_layers
        Of the backbone.
    n_inducing
        Atoms that others are compared with.
    """

    centre: Tensor
    size: Tensor
    inducing: Tensor
    inducing_elements: Tensor
    factor: Tensor
    weights: Tensor

    def __init__(self, channels: int, n_layers: int, n_inducing: int = 0) -> None:
        super().__init__()
        n_features = (n_layers + 1) * channels
        for name, shape in (
            ("centre", (n_features,)),
            ("size", (n_features,)),
            ("inducing", (n_inducing, n_features)),
            ("factor", (n_inducing, n_inducing)),
            ("weights", (n_inducing,)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("inducing_elements", torch.zeros(n_inducing, dtype=torch.int64))

    @property
    def n_last(self) -> int:
        """Number of functions of an atom that the energy is a linear combination of."""
        return len(self.weights)

    @staticmethod
    def features(nodes: NodeFeatures) -> Float[Tensor, "n_atoms n_features"]:
        """Return what atoms are compared by: scalars of all layers, and charge and spin."""
        return torch.cat([*nodes.updates, nodes.embedding], dim=-1).double()

    def place(
        self,
        centre: Float[Tensor, " n_features"],
        size: Float[Tensor, " n_features"],
        inducing: Float[Tensor, "n_inducing n_features"],
        elements: Int[Tensor, " n_inducing"],
    ) -> None:
        """Take other inducing atoms; all weights become zero.

        Parameters
        ----------
        centre, size
            Of the features; widths of the kernel are part of their size.
        inducing
            Features of the inducing atoms.
        elements
            Their elements, by index.
        """
        self.centre, self.size = centre, size
        self.inducing, self.inducing_elements = (inducing - centre) / size, elements
        kernel = self._kernel(inducing, elements)
        kernel.diagonal().add_(_JITTER)
        lower = torch.linalg.cholesky(kernel)
        identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        self.factor = torch.linalg.solve_triangular(lower, identity, upper=False).T.contiguous()
        self.weights = kernel.new_zeros(len(kernel))

    def forward(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, " n_atoms"]:
        """Evaluate the energies."""
        features, weights = self.features(nodes), self.factor @ self.weights
        if len(features) <= 2 * PART_ATOMS:
            return self.compared(features, elements) @ weights

        def energies(features: Tensor, elements: Tensor) -> Tensor:
            return self.compared(features, elements) @ weights

        parts = zip(features.split(PART_ATOMS), elements.split(PART_ATOMS), strict=True)
        return torch.cat([checkpoint(energies, *part, use_reentrant=False) for part in parts])

    def last_layer(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, "n_atoms n_last"]:
        """Return what the energy is a linear function of, with equal weights a priori."""
        return self.compared(self.features(nodes), elements) @ self.factor

    def compared(
        self, features: Float[Tensor, "n_atoms n_features"], elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, "n_atoms n_inducing"]:
        """Return kernels of atoms with the inducing atoms, zero for neutral lone atoms."""
        alone, kinds = torch.zeros_like(features[:1]), elements.unique()
        lone = self._kernel(alone.expand(len(kinds), -1), kinds)
        kernel = self._kernel(features, elements)
        return kernel - lone[torch.searchsorted(kinds, elements)]

    def _kernel(self, features: Tensor, elements: Tensor) -> Float[Tensor, "n_atoms n_inducing"]:
        own, others = (features - self.centre) / self.size, self.inducing
        squares = own.square().sum(1)[:, None] + others.square().sum(1)
        kernel = (own @ others.T - squares / 2).exp()
        return torch.where(elements[:, None] == self.inducing_elements, kernel, 0.0)
