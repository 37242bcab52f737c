"""How well a score ranks errors, and how often errors are within uncertainties.

Every statistic takes weights, so that a bootstrap over structures draws counts only.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import rankdata

__all__ = [
    "bootstrap_weights",
    "ideal_spearman",
    "nearest_distances",
    "share_within",
    "sparsification",
    "sparsification_area",
    "spearman",
]

Array = np.ndarray


def spearman(scores: Array, errors: Array, weights: Array | None = None) -> Array:
    """Return the rank correlation of scores and absolute errors.

    Parameters
    ----------
    scores, errors
        (n,).
    weights
        (..., n), how often each counts; ranks are those of the sample, each counted once.

    Returns
    -------
    (...)
    """
    weights = np.ones(len(scores)) if weights is None else weights
    total = weights.sum(-1)
    x, y = (rankdata(values) - (len(scores) + 1) / 2 for values in (scores, errors))
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variances = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
    return covariance / np.sqrt(variances)


def ideal_spearman(scores: Array, width: int, repeats: int = 100, seed: int = 0) -> Array:
    """Return the rank correlation that a perfectly calibrated Gaussian score would have.

    An error is random even where its size is known, so that no score of this spread ranks much
    better than this.

    Parameters
    ----------
    scores
        (n,), taken for the standard deviations of the errors.
    width
        Components of each error, whose length is ranked.
    repeats, seed
        Of the draws of errors.

    Returns
    -------
    (1 + repeats,)
        The mean, and each draw.
    """
    rng = np.random.default_rng(seed)
    found = [
        spearman(scores, scores * np.linalg.norm(rng.normal(size=(len(scores), width)), axis=1))
        for _ in range(repeats)
    ]
    return np.array([np.mean(found), *found])


def sparsification(scores: Array, errors: Array, weights: Array | None = None) -> Array:
    """Return the mean error of what is left when the highest scores are taken away.

    Returns
    -------
    (..., n)
        Of the lowest 1, 2, ..., n scores, in units of the mean of all; NaN where weights are zero.
    """
    order = np.argsort(scores, kind="stable")
    kept = np.ones(len(scores)) if weights is None else weights[..., order]
    with np.errstate(invalid="ignore"):
        means = np.cumsum(kept * errors[order], -1) / np.cumsum(kept, -1)
    return means / means[..., -1:]


def sparsification_area(scores: Array, errors: Array, weights: Array | None = None) -> Array:
    """Return the area under that curve: 1 for a score that means nothing; less is better."""
    curve = np.nan_to_num(sparsification(scores, errors, weights))
    kept = np.ones(len(scores)) if weights is None else weights
    kept = kept[..., np.argsort(scores, kind="stable")]
    return (kept * curve).sum(-1) / kept.sum(-1)


def share_within(errors: Array, limits: Array, weights: Array | None = None) -> Array:
    """Return the share of errors of at most their limits; NaN is beyond."""
    weights = np.ones(len(errors)) if weights is None else weights
    return weights @ (np.abs(errors) <= limits) / weights.sum(-1)


def bootstrap_weights(n: int, repeats: int = 300, seed: int = 0) -> Array:
    """Return how often each of n structures is drawn, (repeats, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), repeats).astype(float)


def nearest_distances(
    features: Array, known: Array, kinds: Array | None = None, known_kinds: Array | None = None
) -> Array:
    """Return the distance of each row to the nearest known row, of its own kind if there are some.

    Features are measured in their spreads over the known rows. Infinite for an unknown kind.
    """
    kinds = np.zeros(len(features)) if kinds is None else kinds
    known_kinds = np.zeros(len(known)) if known_kinds is None else known_kinds
    found = np.full(len(features), np.inf)
    for kind in np.unique(kinds):
        own, here = known[known_kinds == kind], kinds == kind
        if len(own):
            spread = np.maximum(own.std(0), 1e-12)
            found[here] = cKDTree(own / spread).query(features[here] / spread)[0]
    return found
