"""Reads and compares numbers in final answers, with or without a unit."""

import decimal as decimals
import fractions
import functools
import math
import re
from typing import NamedTuple

UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?"
QUANTITY = re.compile(rf"([-+]?{UNSIGNED})(\s*)([^\d\s].*)?")
POWER_OF_TEN = re.compile(
    r"(?<![\w.^{])(?:([\d.]+)\s*(?:\\times|\\cdot|×|\*|x)\s*)?10\s*\^\s*(?:\{\s*(-?\d+)\s*\}|(-?\d+))"
)
FRACTION = re.compile(  # with or without a whole number before it
    r"(?<![\w.^{}/])(?:(\d+)(?:\s+(?=\d)|\s*(?=\\)))?"
    r"(?:(\d+)\s*/\s*(\d+)(?![\w^/]|\.\d)|\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\})"
)
TOLERANCE = 1e-6  # relative, if one of two numbers has a decimal point
ROUNDING = 1e-14  # if neither has one
DIGITS = 4  # significant ones of a decimal, from which on it may stand for a fraction that never ends
DENOMINATOR = 10**6  # the largest of such a fraction
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# Letters directly after a number are a unit only if they are in this list: 5cm, but not 5x.
ATTACHED = re.compile(
    r"[mcdk]?m|in|ft|yd|mi|[mk]?g|lbs?|oz|m?[lL]|m?s|min|hr?s?|[kM]?Hz|k?[JWN]|kWh|k?Pa|k?V|mol|[KCF]"
    r"|[mk]ph|rad|deg|km/h|m/s"
)
# Words that may follow a number and are mathematics, not units.
NO_UNIT = re.compile(r"pi|sqrt|sin|cos|tan|log|ln|exp|and|or|mod|to|[xyzn]|times|plus|minus|over")
# Sizes of the units of each dimension, relative to the first unit; names without a plural s.
SIZES = {
    "length": {"m": 1, "meter": 1, "metre": 1, "km": 1e3, "kilometer": 1e3, "kilometre": 1e3}
    | {"cm": 1e-2, "centimeter": 1e-2, "centimetre": 1e-2, "mm": 1e-3, "millimeter": 1e-3, "millimetre": 1e-3}
    | {"in": 0.0254, "inch": 0.0254, "inches": 0.0254, "ft": 0.3048, "foot": 0.3048, "feet": 0.3048}
    | {"yd": 0.9144, "yard": 0.9144, "mi": 1609.344, "mile": 1609.344},
    "mass": {"g": 1, "gram": 1, "kg": 1e3, "kilogram": 1e3, "mg": 1e-3, "milligram": 1e-3}
    | {"lb": 453.59237, "pound": 453.59237, "oz": 28.349523125, "ounce": 28.349523125},
    "time": {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600}
    | {"ms": 1e-3, "millisecond": 1e-3, "day": 86400, "week": 604800},
    "volume": {"l": 1, "liter": 1, "litre": 1, "ml": 1e-3, "milliliter": 1e-3, "millilitre": 1e-3},
    "angle": {"rad": 1, "radian": 1, "deg": math.pi / 180, "degree": math.pi / 180},
    "money": {"dollar": 1, "cent": 0.01},
    "energy": {"j": 1, "joule": 1, "kj": 1e3, "kilojoule": 1e3},
    "power": {"w": 1, "watt": 1, "kw": 1e3, "kilowatt": 1e3},
    "force": {"n": 1, "newton": 1, "kn": 1e3, "kilonewton": 1e3},
    "frequency": {"hz": 1, "hertz": 1, "khz": 1e3, "kilohertz": 1e3},
}
UNITS = {name: (dimension, size) for dimension, sizes in SIZES.items() for name, size in sizes.items()}
FACTOR = re.compile(r"(square |cubic )?([a-z]+)(?:\s?\^\{?(-?\d)\}?| (squared|cubed))?")
EXPONENTS = {"square ": 2, "cubic ": 3, "squared": 2, "cubed": 3}


class Quantity(NamedTuple):
    """A number as it is written.

    Attributes:
      value: the number; per cents are not divided by 100.
      percent: a per cent sign or word follows it.
      unit: as written, or "".
      exact: an integer or a fraction: 1234567, not 1.234567e6.
    """

    value: float
    percent: bool = False
    unit: str = ""
    exact: bool = False


def read(text: str) -> Quantity | None:
    """The number that a final answer consists of, with or without a unit; None for any other text."""
    text = re.sub(r"[$€£]", "", text.replace("¢", " cents")).strip()
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree", " degrees", text)
    text = re.split(r"(?<![<>!=])=(?!=)", text)[-1].strip()
    exact, match = "." not in text, QUANTITY.fullmatch(decimal(text))
    if not match or not any(c.isdigit() for c in match[1]):
        return None
    value, unit = float(match[1].replace(",", "")), (match[3] or "").strip()
    if unit.startswith("%") or re.match(r"per\s?cent", unit):
        return Quantity(value, True, exact=exact) if unit in ("%", "percent", "per cent") else None
    if math.isinf(value):
        return None
    scale, _, rest = unit.partition(" ")
    if scale.lower() in SCALES:
        value, unit = value * SCALES[scale.lower()], rest
    known = not unit or _is_unit(unit, attached=not match[2])
    return Quantity(value, unit=unit, exact=exact) if known else None


def decimal(text: str) -> str:
    """Writes the powers of ten, fractions and mixed numbers in a text as decimal numbers."""
    text = POWER_OF_TEN.sub(lambda match: f"{match[1] or 1}e{match[2] or match[3]}", text)
    return FRACTION.sub(_divided, text)


def _divided(match: re.Match) -> str:
    over, under = map(float, filter(None, match.groups()[1:]))
    return repr(float(match[1] or 0) + over / under) if under else match.group()


def same(said: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal.

    50% equals 50 and 0.5, but 0.5% does not equal 50%. Units of one dimension are converted: 5 m is 500 cm,
    not 5 cm. If one has no unit or the dimensions differ, only the numbers count: the problem gives the
    dimension. A decimal equals a fraction that it rounds, see `_rounds`.
    """
    close = functools.partial(math.isclose, rel_tol=ROUNDING if said.exact and answer.exact else TOLERANCE)
    rounds = said.percent == answer.percent and (_rounds(said, answer) or _rounds(answer, said))
    said_unit, unit = _size(said.unit), _size(answer.unit)
    if said_unit and unit and said_unit[1] == unit[1]:
        return close(said.value * said_unit[0], answer.value * unit[0]) or (
            rounds and said_unit[0] == unit[0]
        )
    if rounds or close(said.value, answer.value):
        return True
    if said.percent == answer.percent:
        return False
    return close(said.value / 100 if said.percent else said.value * 100, answer.value)


def _rounds(short: Quantity, whole: Quantity) -> bool:
    """Whether a decimal is a fraction rounded at the decimal's last digit: 0.045455 is 1/22.

    The decimal needs `DIGITS` significant digits: 0.33 is not 1/3. The fraction must be one that no decimal
    equals: 0.1235 is not 12345/100000.
    """
    if short.exact or not whole.exact or not math.isfinite(short.value):
        return False
    _, digits, place = decimals.Decimal(repr(short.value)).normalize().as_tuple()
    fraction = fractions.Fraction(whole.value).limit_denominator(DENOMINATOR)
    if len(digits) < DIGITS or not math.isclose(fraction, whole.value, rel_tol=ROUNDING):
        return False
    ends = 10 ** fraction.denominator.bit_length() % fraction.denominator == 0  # only 2 and 5 divide it
    error = abs(fractions.Fraction(repr(short.value)) - fraction)
    return not ends and 2 * error <= fractions.Fraction(10) ** int(place)


def _is_unit(unit: str, attached: bool) -> bool:
    words = re.findall(r"[^\W\d_]+", unit)
    if not re.fullmatch(r"[^\W\d_][\w^{}²³/·' .-]*", unit) or any(map(NO_UNIT.fullmatch, words)):
        return False
    if re.search(r"\d", re.sub(r"\^\{?-?\d\}?", "", unit)):  # more than an exponent
        return False
    bare = re.sub(r"\^\{?-?\d\}?|[²³]", "", unit).strip()
    return bool(ATTACHED.fullmatch(bare)) or (not attached and len(words[0]) > 1)


def _size(unit: str) -> tuple[float, frozenset] | None:
    """(size, powers of the dimensions) of a unit such as cm^2 or miles per hour; None if unknown."""
    unit = unit.replace("²", "^2").replace("³", "^3").strip().lower()
    unit = {"mph": "mi/h", "kph": "km/h"}.get(unit, unit)
    size, powers = 1.0, {}
    for place, part in enumerate(re.split(r"\s*/\s*|\s+per\s+", unit)):
        whole = FACTOR.fullmatch(part.strip())
        # "square meters" is one factor, "m s^-1" two.
        for match in [whole] if whole else map(FACTOR.fullmatch, re.split(r"[\s·]+", part.strip())):
            if not match:
                return None
            before, name, digit, after = match.groups()
            name = name if name in UNITS else name.removesuffix("s")
            if name not in UNITS:
                return None
            dimension, factor = UNITS[name]
            exponent = int(digit or EXPONENTS.get(before or after, 1)) * (-1 if place else 1)
            size *= factor**exponent
            powers[dimension] = powers.get(dimension, 0) + exponent
    return size, frozenset(powers.items())
