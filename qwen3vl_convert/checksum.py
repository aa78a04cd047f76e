"""CRC-32 (the one of zip files), with the fastest implementation at hand, and the CRC of two pieces put together."""

from functools import lru_cache

try:
    from isal.isal_zlib import crc32
except ImportError:  # a platform without wheels: the same numbers, more slowly
    from zlib import crc32

__all__ = ["combine", "crc32"]

_POLYNOMIAL = 0xEDB88320


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo the CRC's, bits reversed (bit 31 is x^0)."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=256)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial."""
    power, square = 1 << 31, 1 << 23  # x^0, and x^8: one byte
    while nbytes:
        if nbytes & 1:
            power = _times(power, square)
        square, nbytes = _times(square, square), nbytes >> 1
    return power


def combine(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces end to end, from the CRC of each and the length of the second."""
    return _times(_shift(second_bytes), first) ^ second
