"""Numbers have the digits that mean something, whatever their size."""

import math

import pytest

from qwen3vl_convert.quantities import amount, apart, direction, duration, figure, share, size, speed

FIGURES = {
    0.0: "0",
    0.3141: "0.31",
    0.9: "0.90",
    3.14e-7: "3.1e-7",
    0.000999: "0.0010",
    3.1: "3.1",
    42.4: "42",
    999.7: "1,000",
    7891.0: "7,900",
    9951.0: "1.0e4",
    12345.0: "1.2e4",
    -0.5: "-0.50",
    1e300: "1.0e300",
    5e-324: "4.9e-324",
    -math.inf: "-∞",
}


@pytest.mark.parametrize(("value", "text"), FIGURES.items())
def test_a_measured_number_has_two_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_what_is_no_number_is_said() -> None:
    assert [figure(math.nan), share(math.nan), direction(math.nan)] == ["NaN"] * 3


APART = {
    (7.2e-7, 2.4e-6): ("7.2e-7", "2.4e-6"),
    (2.14e-6, 2.11e-6): ("2.14e-6", "2.11e-6"),
    (1.0004, 1.0): ("1.0004", "1.0000"),
    (1.0, 1.0): ("1.0", "1.0"),
    (math.nan, 2.4e-6): ("NaN", "2.4e-6"),
    (1 + 1e-15, 1.0): ("1.00000", "1.00000"),
}


@pytest.mark.parametrize(("pair", "texts"), APART.items())
def test_a_number_and_its_limit_are_told_apart(pair: tuple[float, float], texts: tuple[str, str]) -> None:
    assert apart(*pair) == texts


def test_shares_are_whole_only_where_they_are() -> None:
    values = (1.0, 1 - 1e-9, 0.5, 1e-7, 0.0)
    assert [share(value) for value in values] == ["100 %", "99.99 %", "50 %", "< 0.01 %", "0 %"]
    assert [share(value, 0) for value in values] == ["100 %", "99 %", "50 %", "< 1 %", "0 %"]
    assert all(share(number / 10_000) == f"{number / 100:g} %" for number in range(10_001))
    assert all(share(number / 100, 0) == f"{number} %" for number in range(101))


def test_directions_are_the_same_only_where_they_are() -> None:
    values = (1.0, 1 - 3e-9, 0.5, -1 + 3e-9, -1.0)
    assert [direction(value) for value in values] == ["1", "1 - 3.0e-9", "0.50", "-1 + 3.0e-9", "-1"]


DURATIONS = {
    0.0: "< 0.01 s",
    0.284: "0.28 s",
    0.9951: "1.0 s",
    8.02: "8.0 s",
    9.96: "10 s",
    38.2: "38 s",
    119.4: "119 s",
    119.6: "2 min 0 s",
    689.0: "11 min 29 s",
    7500.0: "2 h 5 min",
}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_a_time_is_known_to_a_few_percent(seconds: float, text: str) -> None:
    assert duration(seconds) == text


SIZES = {
    0: "0 B",
    999: "999 B",
    1000: "1 kB",
    1500: "1.5 kB",
    999_499: "999 kB",
    999_999: "1 MB",
    4_260_000_000: "4.26 GB",
    999_999_999_999: "1 TB",
    10**15: "1,000 TB",
}


@pytest.mark.parametrize(("nbytes", "text"), SIZES.items())
def test_a_size_has_three_digits(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_a_speed_has_two() -> None:
    assert [speed(23_400_000, 1.0), speed(1.234e9, 1.0), speed(5e6, 2e-3)] == ["23 MB/s", "1.2 GB/s", "2.5 GB/s"]
    assert speed(0, 0.0) == "0 B/s"


def test_one_is_not_many() -> None:
    assert [amount(1, "tensor"), amount(1024, "tensor"), amount(2, "entry", "entries")] == [
        "1 tensor",
        "1,024 tensors",
        "2 entries",
    ]
