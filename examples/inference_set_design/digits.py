"""Label as few handwritten digits as a certificate allows: 97 % of 1,797 images right.

    python examples/inference_set_design/digits.py --out runs/digits.png

The model is a support vector machine, hard images are those whose two best classes are close.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from experiment import report, run_design
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from orbcalc.config import CertificateConfig, SelectionConfig

SIZES = SelectionConfig(initial=60, batch=40, diversity=1)
RULES = CertificateConfig(tolerance=0.5, accuracy=0.97, delta=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits.png"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    images, digits = load_digits(return_X_y=True)

    def fit_predict(labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = SVC(gamma=0.001, C=10).fit(images[labelled], digits[labelled])
        margins = np.sort(model.decision_function(images), axis=1)
        return model.predict(images), margins[:, -2] - margins[:, -1]

    runs = [
        run_design(
            digits,
            fit_predict,
            selection=SIZES.model_copy(update={"method": method}),
            certificate=RULES,
            seed=seed,
            name="digits",
            objects="images",
        )
        for method in ("uncertainty", "random")
        for seed in range(options.seeds)
    ]
    report(runs, "Handwritten digits: images labelled until 97 % are proved right", options.out)


if __name__ == "__main__":
    main()
