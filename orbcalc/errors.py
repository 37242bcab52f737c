"""Every error that orbcalc raises on purpose.

Each class derives from :class:`OrbcalcError` and from the builtin that a caller would
expect, so both ``except OrbcalcError`` and ``except ValueError`` do the obvious thing::

    OrbcalcError
    ├── ConfigError (ValueError)             a configuration that cannot be run
    ├── StructureError (ValueError)          atoms that cannot be computed
    │   └── UnsupportedElementError          an element outside a potential or a method
    ├── LabelError (RuntimeError)            labels that cannot be made or used
    │   ├── LabelConflictError               another method, version or setting in this store
    │   └── MissingLabelError                a quantity is asked for, but not there
    ├── CheckpointError (RuntimeError)       a model or training file that cannot be trusted
    └── WorkersLostError (RuntimeError)      no worker is left to run what remains

Failures of chemistry (an SCF that does not converge) are data, not errors: see
:class:`orbcalc.labels.label.LabelStatus`.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "LabelConflictError",
    "LabelError",
    "MissingLabelError",
    "OrbcalcError",
    "StructureError",
    "UnsupportedElementError",
    "WorkersLostError",
]


class OrbcalcError(Exception):
    """Base class of all errors raised by orbcalc."""


class ConfigError(OrbcalcError, ValueError):
    """A configuration file or object is malformed or contradicts itself."""


class StructureError(OrbcalcError, ValueError):
    """A structure cannot be computed: NaN positions, overlapping atoms, impossible spin."""


class UnsupportedElementError(StructureError):
    """A structure holds an element that the potential or the method does not cover."""


class LabelError(OrbcalcError, RuntimeError):
    """A label could not be produced, stored or read."""


class LabelConflictError(LabelError):
    """A label of another method, program version or setting would be mixed into a store."""


class MissingLabelError(LabelError):
    """A quantity is needed (by a task with weight, say) but no structure carries it."""


class CheckpointError(OrbcalcError, RuntimeError):
    """A model file or training state is corrupt, hostile, or of an unknown format."""


class WorkersLostError(OrbcalcError, RuntimeError):
    """No Dask worker has been there for too long; what was computed is kept."""
