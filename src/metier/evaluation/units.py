"""How numbers are written for people: shares, points, durations, sizes, prices, p-values.

Nothing is rounded to a claim it does not support: a share just below one is `> 99.9 %`, not
`100.0 %`, and a number that is missing or not finite is a dash, not a zero.
"""

from __future__ import annotations

import math

MISSING = "–"
_SPACE = "\u00a0"
_MINUS = "\u2212"


def percent(share: float | None) -> str:
    """A share as percent with one decimal: 0.8734 is `87.3 %`."""
    if share is None or not math.isfinite(share):
        return MISSING
    text = f"{share * 100:.1f}"
    if text == "100.0" and share < 1:
        return f">{_SPACE}99.9{_SPACE}%"
    if text == "0.0" and share > 0:
        return f"<{_SPACE}0.1{_SPACE}%"
    return f"{_signed(text, plus=False)}{_SPACE}%"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign: 0.032 is `+3.2`."""
    if difference is None or not math.isfinite(difference):
        return MISSING
    return _signed(f"{difference * 100:.1f}", plus=True)


def plain(value: float | None) -> str:
    """A number of unknown unit with three significant digits; whole numbers stay whole."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == round(value):
        return _signed(f"{value:,.0f}", plus=False)
    rounded = abs(float(f"{value:.3g}"))  # 0.9999 has the digits of 1.00
    decimals = min(max(2 - math.floor(math.log10(rounded)), 0), 12)
    return _signed(f"{value:,.{decimals}f}", plus=False)


def decimal(value: float | None) -> str:
    """A loss or bits per byte: always three decimals, so that a column lines up."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _signed(f"{value:.3f}", plus=False)


def count(value: float | None) -> str:
    """A number of things with thousands separated: 12400 is `12,400`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}"


def tokens(value: float) -> str:
    """A mean number of tokens: `12.4`, from a thousand on without decimals."""
    return count(value) if value == round(value) or value >= 1000 else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """A duration: `2.1 ms`, `340 ms`, `1.42 s`, `2 min 5 s`, `1 h 12 min`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 59.95:
        return _long_duration(value)
    if value >= 0.9995 or value == 0:
        return f"{plain(value)}{_SPACE}s"
    return f"{plain(value * 1000)}{_SPACE}ms"


def _long_duration(value: float) -> str:
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{_SPACE}h" + (f" {minutes}{_SPACE}min" if minutes else "")
    return f"{minutes}{_SPACE}min" + (f" {rest}{_SPACE}s" if rest else "")


def size(number_of_bytes: float) -> str:
    """A size in decimal units: `640 MB`, `1.23 GB`; zero means it was not measured."""
    if number_of_bytes <= 0:
        return MISSING
    if number_of_bytes >= 999.5e6:
        return f"{plain(number_of_bytes / 1e9)}{_SPACE}GB"
    return f"{plain(number_of_bytes / 1e6)}{_SPACE}MB"


def money(value: float, currency: str) -> str:
    """A price: cents from one unit on, three significant digits below: `USD 0.0123`."""
    if not math.isfinite(value):
        return MISSING
    text = f"{value:,.2f}" if value >= 1 or value == 0 else plain(value)
    return f"{currency}{_SPACE}{text}"


def probability(value: float | None) -> str:
    """A p-value with two significant digits; below 0.0001 only that it is below."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 0.0001:
        return f"<{_SPACE}0.0001"
    text = f"{value:.{max(2, 1 - math.floor(math.log10(value)))}f}"
    return f">{_SPACE}0.99" if text == "1.00" and value < 1 else text


def _signed(text: str, *, plus: bool) -> str:
    """Use a real minus sign, add a plus where wanted, and give a rounded zero no sign."""
    if not any(digit in text for digit in "123456789"):
        return text.removeprefix("-")
    if text.startswith("-"):
        return _MINUS + text[1:]
    return f"+{text}" if plus else text
