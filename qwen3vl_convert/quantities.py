"""How numbers are written for people: one function for each kind of number, with the digits that mean something.

A difference is told by its size, not its value: two digits. A time is no better known than to a few percent, and is
another in the next run. Sizes of files are exact, and three digits tell most of them apart.
"""

import math

_DIGITS, _MOST_DIGITS = 2, 6


def figure(value: float, digits: int = _DIGITS) -> str:
    """A measured number: `0`, `0.31`, `3.1e-7`, `7,900`, `NaN`, `-∞`."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if value and not -3 <= int(exponent) < 4:
        return f"{mantissa}e{int(exponent)}"
    rounded = float(f"{mantissa}e{exponent}")
    return f"{rounded:,.{max(digits - 1 - int(exponent), 0)}f}" if value else "0"


def apart(value: float, limit: float) -> tuple[str, str]:
    """Two figures that are held against each other, with as many digits as tell them apart."""
    for digits in range(_DIGITS, _MOST_DIGITS):
        shown = figure(value, digits), figure(limit, digits)
        if value == limit or shown[0] != shown[1]:
            return shown
    return figure(value, _MOST_DIGITS), figure(limit, _MOST_DIGITS)


def share(value: float, digits: int = 2) -> str:
    """`99.98 %`, rounded down: 100 % is all of them, and 0 % none."""
    if not math.isfinite(value):
        return figure(value)
    units = 10**digits  # in a percent
    return f"< {1 / units:g} %" if 0 < value < 0.01 / units else f"{math.floor(value * 100 * units + 1e-9) / units:g} %"


def direction(cosine: float) -> str:
    """A cosine, of which what is missing to 1 matters: `1 - 3.1e-7`."""
    if 0.999 < abs(cosine) <= 1:
        sign = "-" if cosine < 0 else ""
        return f"{sign}1" if abs(cosine) == 1 else f"{sign}1 {'+' if sign else '-'} {figure(1 - abs(cosine))}"
    return figure(cosine)


def amount(count: int, one: str, many: str = "") -> str:
    """`1 tensor`, `1,024 tensors`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """`0.28 s`, `8.0 s`, `38 s`, `11 min 29 s`, `2 h 5 min`."""
    if seconds < 0.005:
        return "< 0.01 s"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(nbytes: float) -> str:
    """`4.26 GB`; decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def speed(nbytes: float, seconds: float) -> str:
    """`23 MB/s`, `1.2 GB/s`."""
    return f"{size(float(f'{nbytes / max(seconds, 1e-9):.1e}'))}/s"
