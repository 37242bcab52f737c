"""Linear maps and products of equivariant features on one atom.

Features are tensors ((l_max + 1)², n_atoms, channels), degree by degree in e3nn's order, of
parity (-1)^l. With the components first, each degree is one contiguous block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from jaxtyping import Float
from scipy.integrate import lebedev_rule
from torch import Tensor, nn

__all__ = ["DegreeLinear", "SphereProduct", "degree_of_component"]

#: Degrees of the polynomials that Lebedev's rules integrate exactly.
_LEBEDEV = (*range(3, 33, 2), *range(35, 132, 6))


def degree_of_component(l_max: int) -> Tensor:
    """Return the degree l of each of the (l_max + 1)² components."""
    degrees = torch.arange(l_max + 1)
    return degrees.repeat_interleave(2 * degrees + 1)


class DegreeLinear(nn.Module):
    """Mix the channels of each degree with a matrix of its own.

    Parameters
    ----------
    l_max
        Highest degree.
    n_in, n_out
        Channels.
    l_min
        Degree of the first component.
    size
        Of the output at the start, for an input of unit size.
    """

    def __init__(
        self, l_max: int, n_in: int, n_out: int, *, l_min: int = 0, size: float = 1.0
    ) -> None:
        super().__init__()
        self.l_min, self.fan_in = l_min, n_in
        n_degrees = l_max - l_min + 1
        self.weight = nn.Parameter(torch.randn(n_degrees, n_in, n_out) * (size / math.sqrt(n_in)))

    def forward(self, features: Float[Tensor, "m n n_in"]) -> Float[Tensor, "m n n_out"]:
        """Mix the channels of as many degrees as the features hold."""
        sizes: list[int] = []
        while sum(sizes) < features.shape[0]:
            sizes.append(2 * (self.l_min + len(sizes)) + 1)
        blocks = zip(features.split(sizes), self.weight.unbind(), strict=False)
        return torch.cat([block @ weight for block, weight in blocks])


class SphereProduct(nn.Module):
    """Multiply features as functions on the sphere, ``f(r) = Σ_lm f_lm Y_lm(r)``.

    The product of two such functions holds every coupling (l1, l2 -> l3) with l1 + l2 + l3 even
    (Gaunt coefficients), and costs one multiplication for each point of a grid. The grid is a
    Lebedev rule that integrates the products exactly, so the result is exactly equivariant.

    Parameters
    ----------
    l_max
        Highest degree of the factors.
    l_out
        Highest degree of the products that is kept.
    order
        Largest number of factors.
    """

    to_grid: Tensor
    from_grid: Tensor

    def __init__(self, l_max: int, l_out: int, order: int) -> None:
        super().__init__()
        exact = next(d for d in _LEBEDEV if d >= order * l_max + l_out)
        points, weights = lebedev_rule(exact)
        harmonics = o3.spherical_harmonics(
            list(range(max(l_max, l_out) + 1)),
            torch.as_tensor(points.T),
            normalize=True,
            normalization="component",
        )
        n_in, n_out = (l_max + 1) ** 2, (l_out + 1) ** 2
        mean = torch.as_tensor(weights / weights.sum())[:, None]
        # Components of unit size give values of unit size, and products likewise.
        size = math.sqrt(n_in)
        self.register_buffer("to_grid", harmonics[:, :n_in] / size, persistent=False)
        self.register_buffer(
            "from_grid", (harmonics[:, :n_out] * mean).T.contiguous() * size, persistent=False
        )

    def forward(
        self, factors: Sequence[Float[Tensor, "m n channels"]], l_out: int
    ) -> list[Float[Tensor, "m2 n channels"]]:
        """Return the products of the first two, three, ... factors, up to degree `l_out`."""
        shape = factors[0].shape[1:]
        first, *others = ((self.to_grid @ factor.flatten(1)) for factor in factors)
        from_grid = self.from_grid[: (l_out + 1) ** 2]
        products, value = [], first
        for other in others:
            value = value * other
            products.append((from_grid @ value).unflatten(1, shape))
        return products
