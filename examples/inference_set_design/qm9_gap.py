"""Which molecules have a HOMO-LUMO gap above the median? QM9, fingerprints, a random forest.

    python examples/inference_set_design/qm9_gap.py --data DIR --out runs/qm9_gap.png

DIR holds ``qm9_b3lyp.npz`` with flat arrays: ``smiles``, ``props`` and ``prop_names`` (of them
``homo_Ha`` and ``lumo_Ha``), ``n_atoms``, ``Z`` and ``R`` (Å).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from experiment import report, run_design
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.feature_extraction.text import CountVectorizer

from orbcalc.config import CertificateConfig, SelectionConfig

ELEMENTS = (1, 6, 7, 8, 9)
SIZES = SelectionConfig(initial=500, batch=500, audit=400, diversity=1)
RULES = CertificateConfig(tolerance=0.5, accuracy=0.95, delta=0.05)


def read(path: Path, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return fingerprints and classes of n random molecules."""
    with np.load(path, allow_pickle=False) as data:
        names = data["prop_names"].tolist()
        homo, lumo = (data["props"][:, names.index(name)] for name in ("homo_Ha", "lumo_Ha"))
        chosen = np.random.default_rng(seed).permutation(len(homo))[:n]
        ends = np.cumsum(data["n_atoms"])
        numbers, positions = data["Z"], data["R"]  # each access reads the file
        pairs = np.array([_pairs(numbers, positions, ends, k) for k in chosen])
        smiles = data["smiles"][chosen].tolist()
    counts = np.array([np.cumsum(numbers == z)[ends - 1] for z in ELEMENTS]).T
    composition = np.diff(counts, axis=0, prepend=0)[chosen]
    gap = (lumo - homo)[chosen]
    grams = CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, min_df=0.01)
    features = np.hstack([composition, pairs, grams.fit_transform(smiles).toarray()])
    return features.astype(np.float32), (gap > np.median(gap)).astype(int)


def _pairs(numbers: np.ndarray, positions: np.ndarray, ends: np.ndarray, k: int) -> np.ndarray:
    """Count the pairs of heavy atoms of one molecule by distance: bonds, angles, further."""
    where = slice(ends[k - 1] if k else 0, ends[k])
    heavy = positions[where][numbers[where] > 1]
    i, j = np.triu_indices(len(heavy), 1)
    distances = np.linalg.norm(heavy[i] - heavy[j], axis=1)
    return np.histogram(distances, bins=[0, 1.18, 1.26, 1.36, 1.44, 1.6, 2.0, 2.4, 2.7, 3.5, 9])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/qm9_gap.png"))
    parser.add_argument("--molecules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    features, classes = read(options.data / "qm9_b3lyp.npz", options.molecules, options.seed)

    def fit_predict(labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = ExtraTreesClassifier(50, max_features=0.3, random_state=options.seed)
        model.fit(features[labelled], classes[labelled])
        probability = model.predict_proba(features)[:, 1]
        return (probability > 0.5).astype(int), -np.abs(probability - 0.5)

    runs = [
        run_design(
            classes,
            fit_predict,
            selection=SIZES.model_copy(update={"method": method}),
            certificate=RULES,
            seed=options.seed,
            name="QM9 gaps",
            objects="molecules",
        )
        for method in ("uncertainty", "random")
    ]
    title = f"QM9: gap above the median? {len(classes):,} molecules, 95 % to be proved right"
    report(runs, title, options.out)


if __name__ == "__main__":
    main()
