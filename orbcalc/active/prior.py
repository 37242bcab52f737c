"""Which structures to label first, before any label: by what a Gaussian process says beforehand.

Arrays in, indices out; nothing here knows what the candidates are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from orbcalc.active.selection import as_count, as_numbers, check_generator
from orbcalc.errors import ConfigError

__all__ = ["process_columns", "select_informative"]

#: Variance of the noise, and of the energy of an element, in units of that of the process.
_NOISE, _ELEMENT = 1e-2, 1e2


def process_columns(
    functions: npt.ArrayLike, counts: npt.ArrayLike
) -> Float[np.ndarray, "n n_columns"]:
    """Scale what energies are linear in so that all weights have a variance of 1 beforehand.

    Energies are divided by the root of the number of atoms, as errors of larger structures are
    larger, and by the mean size of the process.

    Parameters
    ----------
    functions
        (n, m) of a process, summed over the atoms of each candidate.
    counts
        (n, n_elements) numbers of atoms.

    Examples
    --------
    >>> process_columns([[2.0], [2.0]], [[4], [4]])
    array([[ 1., 20.],
           [ 1., 20.]])
    """
    sums = as_numbers(functions, "functions", n_axes=2)
    numbers = as_numbers(counts, "counts", n_axes=2)
    roots = np.sqrt(numbers.sum(axis=1, keepdims=True))
    scaled = sums / roots
    known = scaled[np.isfinite(scaled).all(axis=1)]
    unit = np.sqrt((known**2).sum(axis=1).mean()) if len(known) else 0.0
    return np.hstack([scaled / (unit or 1.0), np.sqrt(_ELEMENT) * numbers / roots])


def select_informative(
    columns: npt.ArrayLike, size: int, *, rng: np.random.Generator, noise: float = _NOISE
) -> Int[np.ndarray, " n_selected"]:
    """Select, before anything is labelled, what would tell most about all candidates.

    What is to be learned is taken for linear in the columns, with weights of unit variance and
    noise. Each step takes the candidate whose label would lower the sum of the variances of all
    candidates most (greedy A-optimal design; Seo, Wallat, Graepel & Obermayer 2000, "Gaussian
    process regression: active data selection and test point rejection"); O(n m size).

    Parameters
    ----------
    columns
        (n, m) array. A candidate with a number that is not finite is not selected before others.
    size
        How many to select; a size beyond the pool means the whole pool.
    rng
        Breaks ties.
    noise
        Variance of the noise, positive.

    Returns
    -------
    indices
        Distinct positions, in the order of choice.

    Raises
    ------
    ConfigError
        If a shape, the size or the noise is wrong, or ``rng`` is no Generator.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> select_informative([[1, 0], [1, 0], [1, 0], [0, 1]], 2, noise=0.1, rng=rng)[1].item()
    3
    """
    values = as_numbers(columns, "columns", n_axes=2)
    check_generator(rng)
    size = min(as_count(size, "size"), len(values))
    if not (np.isfinite(noise) and noise > 0):
        raise ConfigError(f"noise is {noise}, expected a finite and positive number")
    order: Int[np.ndarray, " n"] = rng.permutation(len(values))
    values = values[order]
    is_known = np.isfinite(values).all(axis=1)
    values = np.where(is_known[:, None], values, 0.0)
    # Of the posterior covariance K of all candidates: its diagonal, and that of K².
    variances = (values**2).sum(axis=1)
    squares = ((values @ (values.T @ values)) * values).sum(axis=1)
    told = np.zeros((size, len(values)))  # K is that of the prior less toldᵀ told
    chosen = np.zeros(size, dtype=np.intp)
    is_open = np.ones(len(values), dtype=bool)
    for step in range(size):
        gain = np.where(is_known, squares / (variances + noise), -1.0)
        best = chosen[step] = int(np.argmax(np.where(is_open, gain, -np.inf)))
        is_open[best] = False
        column = values @ values[best] - told[:step, best] @ told[:step]
        product = values @ (column @ values) - (told[:step] @ column) @ told[:step]
        pivot = variances[best] + noise
        squares += column * (column * (column @ column) / pivot - 2 * product) / pivot
        variances -= column**2 / pivot
        told[step] = column / np.sqrt(pivot)
    return np.take(order, chosen)
