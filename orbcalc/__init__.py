"""orbcalc: machine-learned interatomic potentials taught by orbital charges.

The public names below are loaded when they are first used (PEP 562), so that ``import orbcalc``
costs nothing and label workers, which must not load torch, can import any label module.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orbcalc.active.labelling import label
    from orbcalc.active.loop import run
    from orbcalc.calculator import OrbcalcCalculator
    from orbcalc.prediction import predict
    from orbcalc.results import results_of, with_results
    from orbcalc.training.run import train

__all__ = [
    "OrbcalcCalculator",
    "__version__",
    "label",
    "predict",
    "results_of",
    "run",
    "train",
    "with_results",
]

__version__ = "0.1.0"

_HOME = {
    "OrbcalcCalculator": "orbcalc.calculator",
    "label": "orbcalc.active.labelling",
    "predict": "orbcalc.prediction",
    "results_of": "orbcalc.results",
    "run": "orbcalc.active.loop",
    "train": "orbcalc.training.run",
    "with_results": "orbcalc.results",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'orbcalc' has no attribute '{name}'")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
