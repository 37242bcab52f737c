"""A potential whose energy head reads the predicted charges of the shells (arms 9)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from orbcalc.graph import AtomGraph
from orbcalc.model.backbone import NodeFeatures, mlp
from orbcalc.model.checkpoint import potential_from
from orbcalc.model.potential import Potential, Prediction
from orbcalc.orbitals import SLOTS

__all__ = ["ReadingPotential", "states_of_reading_potentials"]


class ReadingHead(nn.Module):
    """The usual energy head, and a network that sees scalars and shell charges."""

    def __init__(self, head: nn.Module, channels: int) -> None:
        super().__init__()
        self.head = head
        self.network = mlp(channels + len(SLOTS), channels, 1, bias=False)
        self.shell_charges: Tensor | None = None
        """Of the batch that is evaluated, in units of their spread; zero for absent shells."""

    def forward(self, features: NodeFeatures) -> Tensor:
        """Evaluate the energies, and forget the charges."""
        charges, self.shell_charges = self.shell_charges, None
        assert charges is not None
        seen = torch.cat([features.updates[-1], charges.to(features.updates[-1].dtype)], 1)
        energy: Tensor = self.head(features) + self.network(seen).squeeze(-1)
        return energy


class ReadingPotential(Potential):
    """A potential with an equivariant charge head that its energy depends on."""

    energy_head: nn.Module

    @classmethod
    def of(cls, plain: Potential) -> ReadingPotential:
        """Make one of a plain potential; the new weights are random."""
        reading = cls.__new__(cls)
        reading.__dict__.update(plain.__dict__)
        head = ReadingHead(plain.energy_head, plain.config.channels)
        reading.energy_head = head.to(plain.dtype)
        return reading

    def forward(
        self,
        graph: AtomGraph,
        properties: Collection[str] = ("energy",),
        *,
        create_graph: bool = False,
    ) -> Prediction:
        """Evaluate; the charges are always needed."""
        return super().forward(graph, {*properties, "charges"}, create_graph=create_graph)

    def _charges(
        self, nodes: NodeFeatures, elements: Tensor, graph: AtomGraph
    ) -> dict[str, Tensor]:
        found = super()._charges(nodes, elements, graph)
        columns = [slot.columns.start for slot in SLOTS]
        shift = self.charge_head.get_buffer("shift")[elements]
        scale = self.charge_head.get_buffer("scale")[elements]
        scaled = (found["orbital_blocks"] - shift) / scale
        self.energy_head.shell_charges = torch.nan_to_num(scaled[:, columns])
        return found


@contextmanager
def states_of_reading_potentials() -> Iterator[None]:
    """Let saved states of a training be read as states of such potentials."""

    def build(content: Mapping[str, Any], dtype: torch.dtype) -> Potential:
        return ReadingPotential.of(potential_from(content, dtype))

    with patch("orbcalc.training.state.potential_from", build):
        yield
