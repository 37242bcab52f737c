"""Functions of one edge vector: radial basis, cutoff, spherical harmonics.

Edges come last: all edges of one function are contiguous, so every operation is a long one.
"""

from __future__ import annotations

import math

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["SphericalHarmonics", "bessel_basis", "polynomial_cutoff"]


def bessel_basis(
    distances: Float[Tensor, " n_edges"], cutoff: float, n_functions: int
) -> Float[Tensor, "n_functions n_edges"]:
    """Evaluate ``sin(n pi x) / (sqrt(2) x)``, x = r / rc, for n = 1, 2, ... (2003.03123, eq. 7).

    Distances in Å, not zero. The factor, free in the source, makes typical values of order one.
    """
    n = torch.arange(1, n_functions + 1, dtype=distances.dtype, device=distances.device)
    x = distances / cutoff
    return torch.sin(math.pi * n[:, None] * x) / (math.sqrt(2.0) * x)


def polynomial_cutoff(
    distances: Float[Tensor, " *edges"], cutoff: float, p: int = 6
) -> Float[Tensor, " *edges"]:
    """Evaluate a polynomial that falls from 1 to 0 at the cutoff (2003.03123, eq. 8).

    Value, first and second derivative vanish at the cutoff; beyond it the value is 0.
    """
    x = distances / cutoff
    envelope = (
        1.0
        - (p + 1) * (p + 2) / 2 * x**p
        + p * (p + 2) * x ** (p + 1)
        - p * (p + 1) / 2 * x ** (p + 2)
    )
    return torch.where(x < 1.0, envelope, 0.0)


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of unit vectors in e3nn's basis, component normalised.

    Each degree is the top coupling of the one before with the vector itself, so all degrees
    cost `l_max` - 1 small matrix products: ``Y_{l+1} = c_l (Y_l ⊗ Y_1)_{l+1}``.

    Parameters
    ----------
    l_max
        Highest degree.
    """

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.l_max = l_max
        probe = torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64)
        for degree in range(1, l_max):
            coupling = o3.wigner_3j(degree, 1, degree + 1, dtype=torch.float64)
            lower, vector, upper = (
                o3.spherical_harmonics(k, probe, normalize=True, normalization="component")
                for k in (degree, 1, degree + 1)
            )
            raw = torch.einsum("abc,a,b->c", coupling, lower, vector)
            coupling = coupling * (upper @ raw) / (raw @ raw)
            matrix = coupling.flatten(0, 1).T.contiguous()
            self.register_buffer(f"coupling_{degree}", matrix, persistent=False)

    def forward(
        self, directions: Float[Tensor, "3 n_edges"]
    ) -> list[Float[Tensor, "n_components n_edges"]]:
        """Evaluate the 2l + 1 harmonics of each degree l = 0 ... l_max."""
        harmonics = [torch.ones_like(directions[:1])]
        if self.l_max > 0:
            vector = math.sqrt(3.0) * directions
            harmonics.append(vector)
        for degree in range(1, self.l_max):
            product = (harmonics[-1][:, None] * vector).flatten(0, 1)
            harmonics.append(self.get_buffer(f"coupling_{degree}") @ product)
        return harmonics
