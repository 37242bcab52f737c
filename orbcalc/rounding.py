"""Bounds in decimal figures that still hold: nearest rounding could claim more than was proved."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

__all__ = ["at_least", "at_most"]


def at_least(bound: float, places: int, *, percent: bool = False) -> str:
    """Write a lower bound with so many decimal places, rounded down.

    Examples
    --------
    >>> at_least(0.9496, 3), at_least(0.9496, 1, percent=True)
    ('0.949', '94.9')
    """
    number = Decimal(repr(float(bound))).scaleb(2 if percent else 0)
    return str(number.quantize(Decimal(1).scaleb(-places), ROUND_FLOOR))


def at_most(bound: float, digits: int = 3) -> str:
    """Write an upper bound with so many significant digits, rounded up.

    Examples
    --------
    >>> at_most(0.000929185)
    '0.00093'
    """
    number = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(bound)))
    return f"{float(number):.{digits}g}"
