"""Errors of predictions, as the certificate counts them."""

import math

import numpy as np
import pytest

from orbcalc.active.quantities import QUANTITIES, prediction_error
from orbcalc.config import CertificateConfig


def test_each_quantity_of_the_configuration_is_known() -> None:
    schema = CertificateConfig.model_json_schema()
    assert set(schema["properties"]["quantity"]["enum"]) == set(QUANTITIES)


def test_errors_have_the_unit_of_their_quantity() -> None:
    reference = {"energy": -10.0, "forces": np.zeros((4, 3))}
    predicted = {"energy": -9.0, "forces": [[3.0, 4.0, 0.0], [0, 0, -5.5], [0, 0, 0], [1, 0, 0]]}
    assert prediction_error("energy", predicted, reference, 4) == 1.0
    assert prediction_error("energy_per_atom", predicted, reference, 4) == 0.25
    assert prediction_error("forces", predicted, reference, 4) == 5.5


@pytest.mark.parametrize("quantity", sorted(QUANTITIES))
def test_what_is_missing_is_no_number(quantity: str) -> None:
    whole = {"energy": 1.0, "forces": np.zeros((2, 3))}
    for lacking in ({}, {"energy": math.nan, "forces": np.full((2, 3), math.nan)}):
        assert math.isnan(prediction_error(quantity, lacking, whole, 2))
        assert math.isnan(prediction_error(quantity, whole, lacking, 2))
    partly = {"energy": 1.0, "forces": np.array([[0.0, 0, 0], [0, math.nan, 0]])}
    if quantity == "forces":
        assert math.isnan(prediction_error(quantity, partly, whole, 2))
