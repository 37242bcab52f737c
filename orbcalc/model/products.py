"""Products of equivariant features on one atom, channel by channel.

Features are tensors ((l_max + 1)², n_atoms, channels), degree by degree in e3nn's order, of
parity (-1)^l. With the components first, each degree is one contiguous block, and a product is
one multiplication of components and one large multiplication by a constant matrix.
"""

from __future__ import annotations

import math

import torch
from e3nn import o3
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["DegreeLinear", "ProductBasis", "degree_of_component"]


def degree_of_component(l_max: int) -> Tensor:
    """Return the degree l of each of the (l_max + 1)² components."""
    degrees = torch.arange(l_max + 1)
    return degrees.repeat_interleave(2 * degrees + 1)


class DegreeLinear(nn.Module):
    """Mix the channels of each degree with a matrix of its own."""

    degree: Tensor

    def __init__(self, l_max: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(l_max + 1, n_in, n_out) / math.sqrt(n_in))
        self.register_buffer("degree", degree_of_component(l_max), persistent=False)

    def forward(self, features: Float[Tensor, "m n n_in"]) -> Float[Tensor, "m n n_out"]:
        """Mix the channels of as many degrees as the features hold."""
        return torch.bmm(features, self.weight.index_select(0, self.degree[: features.shape[0]]))


class ProductBasis(nn.Module):
    """Couple two features to all degrees up to `l_out`, with a weight per path and channel.

    A path is (l1, l2 -> l3) with l1 + l2 + l3 even, so parity stays (-1)^l. The product of a
    feature with itself has half of the paths (`symmetric`). `size` is that of the weights at the
    start: below one it keeps high powers of a feature from growing.
    """

    coupling: Tensor
    path_of_row: Tensor
    gather: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        l_left: int,
        l_right: int,
        l_out: int,
        channels: int,
        *,
        symmetric: bool = False,
        size: float = 1.0,
    ) -> None:
        super().__init__()
        self.l_out = l_out
        left, right = _component_pairs(l_left, l_right, symmetric)
        rows, path_of_row, paths = _coupling_rows(l_left, l_right, l_out, left, right, symmetric)
        # Row r holds component m3 of its path: this matrix adds up the paths of each component.
        gather = torch.zeros((l_out + 1) ** 2, len(rows), dtype=torch.float64)
        for degree, start in paths:
            n_paths = sum(other == degree for other, _ in paths)
            for m in range(2 * degree + 1):
                gather[degree**2 + m, start + m] = 1 / math.sqrt(n_paths)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.register_buffer("coupling", rows, persistent=False)
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("path_of_row", path_of_row, persistent=False)
        self.n_rows = [int((gather[: (k + 1) ** 2] != 0).any(0).sum()) for k in range(l_out + 1)]
        self.weight = nn.Parameter(size * torch.randn(len(paths), channels))

    def forward(
        self,
        left: Float[Tensor, "m1 n channels"],
        right: Float[Tensor, "m2 n channels"],
        l_out: int | None = None,
    ) -> Float[Tensor, "m3 n channels"]:
        """Multiply and couple, up to the degree asked for."""
        l_out = self.l_out if l_out is None else l_out
        n_rows, n_out = self.n_rows[l_out], (l_out + 1) ** 2
        pairs = left.index_select(0, self.left) * right.index_select(0, self.right)
        coupled = (self.coupling[:n_rows] @ pairs.flatten(1)).unflatten(1, pairs.shape[1:])
        weighted = coupled * self.weight.index_select(0, self.path_of_row[:n_rows])[:, None]
        summed = self.gather[:n_out, :n_rows] @ weighted.flatten(1)
        components: Tensor = summed.unflatten(1, pairs.shape[1:])
        return components


def _component_pairs(l_left: int, l_right: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    n_left, n_right = (l_left + 1) ** 2, (l_right + 1) ** 2
    left, right = torch.meshgrid(torch.arange(n_left), torch.arange(n_right), indexing="ij")
    keep = left <= right if symmetric else torch.ones_like(left, dtype=torch.bool)
    return left[keep], right[keep]


def _coupling_rows(
    l_left: int, l_right: int, l_out: int, left: Tensor, right: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return the constant matrix, the path of each of its rows, and (degree, first row) of paths.

    Rows are scaled so that independent inputs of unit variance give outputs of unit variance.
    """
    rows: list[Tensor] = []
    path_of_row: list[int] = []
    paths: list[tuple[int, int]] = []
    for l3 in range(l_out + 1):
        for l1 in range(l_left + 1):
            for l2 in range(l1 if symmetric else 0, l_right + 1):
                if (l1 + l2 + l3) % 2 or not abs(l1 - l2) <= l3 <= l1 + l2:
                    continue
                dense = torch.zeros(2 * l3 + 1, (l_left + 1) ** 2, (l_right + 1) ** 2).double()
                block = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
                dense[:, l1**2 : (l1 + 1) ** 2, l2**2 : (l2 + 1) ** 2] = block.permute(2, 0, 1)
                if symmetric:  # keep pairs with left <= right, the others folded onto them
                    folded = dense + dense.transpose(1, 2)
                    dense = torch.where(torch.eye(dense.shape[1]).bool(), dense, folded)
                paths.append((l3, len(path_of_row)))
                path_of_row += [len(paths) - 1] * (2 * l3 + 1)
                rows.append(dense[:, left, right])
    return torch.cat(rows), torch.tensor(path_of_row), paths
