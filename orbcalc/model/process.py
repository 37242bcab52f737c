"""The mean of a Gaussian process as energy head: fitted in closed form, not trained.

The energy of a structure beyond its reference energies is a sum over its atoms of a function of
their features and element, with a Gaussian process as prior. Its kernel compares atoms of the
same element::

    k(x, x') = exp(-|x - x'|² / 2w²) - what makes it vanish for a lone atom, a neutral singlet

and that of structures is the sum over all pairs of their atoms (Bartók 2010, 0910.1019). The
process is represented by few inducing atoms (subset of regressors, Quiñonero-Candela & Rasmussen
2005, JMLR 6, 1939), so the energy is linear in as many functions of an atom.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbcalc.graph import part_size
from orbcalc.model.backbone import NodeFeatures

__all__ = ["ProcessHead", "gaussian"]

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
        order = elements.argsort(stable=True)  # those of an element side by side
        self.centre, self.size = centre, size
        self.inducing, self.inducing_elements = ((inducing - centre) / size)[order], elements[order]
        n_inducing = len(elements)
        self.weights = inducing.new_zeros(n_inducing)
        self.factor = inducing.new_zeros(n_inducing, n_inducing)
        for columns in self._columns(elements).values():
            own = self.inducing[columns]
            kernel = gaussian(own, own)
            kernel.diagonal().add_(_JITTER)
            lower = torch.linalg.cholesky(kernel)
            identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            self.factor[columns, columns] = inverse.T

    def forward(
        self, nodes: NodeFeatures, elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, " n_atoms"]:
        """Evaluate the energies."""
        features = self.features(nodes)
        size = part_size(features)
        if len(features) <= size:
            return self._energies(features, elements)
        parts = zip(features.split(size), elements.split(size), strict=True)
        found = [checkpoint(self._energies, *part, use_reentrant=False) for part in parts]
        return torch.cat(found)

    def _energies(self, features: Tensor, elements: Tensor) -> Float[Tensor, " n_atoms"]:
        found = features.new_zeros(len(features))
        for rows, columns, kernel in self._kernels(features, elements):
            found = found.index_add(0, rows, kernel @ self.weights[columns])
        return found

    def functions(
        self, features: Float[Tensor, "n_atoms n_features"], elements: Int[Tensor, " n_atoms"]
    ) -> Float[Tensor, "n_atoms n_last"]:
        """Return what the energy is a linear function of, with equal weights a priori."""
        found = features.new_zeros(len(features), self.n_last)
        for rows, columns, kernel in self._kernels(features, elements):
            found[rows, columns] = kernel @ self.factor[columns, columns]
        return found

    def _kernels(
        self, features: Tensor, elements: Tensor
    ) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Compare atoms with inducing atoms, element by element; zero for lone neutral singlets."""
        alone = -self.centre / self.size
        for element, columns in self._columns(elements).items():
            rows = (elements == element).nonzero()[:, 0]
            own, others = (features[rows] - self.centre) / self.size, self.inducing[columns]
            yield rows, columns, gaussian(own, others) - gaussian(alone[None], others)

    def _columns(self, elements: Tensor) -> dict[int, slice]:
        """Return where the inducing atoms of each of these elements are, if there are any."""
        kinds = elements.unique()
        starts, ends = (
            torch.searchsorted(self.inducing_elements, kinds, right=right).tolist()
            for right in (False, True)
        )
        found = zip(kinds.tolist(), starts, ends, strict=True)
        return {kind: slice(start, end) for kind, start, end in found if end > start}


def gaussian(own: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the kernel of unit width."""
    squares = own.square().sum(1)[:, None] + others.square().sum(1)
    return (own @ others.T - squares / 2).exp()
