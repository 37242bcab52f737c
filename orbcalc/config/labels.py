"""Configuration of labels: the reference method, and how labels are computed."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from orbcalc.config.base import StrictModel

__all__ = ["LabelConfig", "ReferenceConfig"]


class ReferenceConfig(StrictModel):
    """The expensive method: where reference energies and forces come from."""

    calculator: str = Field(
        default="GFN2-xTB",
        description="'GFN2-xTB' (built in), 'pyscf' (DFT, needs the extra), 'file' (REF_ keys of "
        "the structures themselves), or the import path of any ASE calculator class or factory, "
        "'package.module:Name', which takes a charge or a spin from atoms.info itself; each worker "
        "has a directory of its own below the calculator's",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the calculator"
    )
    version: str | None = Field(
        default=None, description="version string of the external program, recorded with each label"
    )


class LabelConfig(StrictModel):
    """How labels are computed."""

    reference: ReferenceConfig = ReferenceConfig()
    forces: bool = Field(default=True, description="ask the reference for forces as well")
    stress: bool = Field(default=False, description="ask the reference for stress as well")
    charges: bool = Field(
        default=True,
        description="compute GFN1-xTB orbital charges (of crystals at the Gamma point)",
    )
    timeout_s: float = Field(
        default=600.0, gt=0, description="wall time after which one label is given up"
    )
    chunk_s: float = Field(
        default=1.0, gt=0, description="wall time that one task should gather from small structures"
    )
