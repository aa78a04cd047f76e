"""Strided copies at the speed of memory: a weight of 2 bytes is a uint16 here, so that NaN payloads pass untouched."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_convert.errors import CorruptFile, OutputError
from qwen3vl_convert.plan import Copy
from qwen3vl_convert.rounding import cast
from qwen3vl_convert.storage import DTYPES

Array = NDArray[Any]

_TILE_ROWS, _TILE_COLUMNS, _TILE_PITCH = 384, 256, 264
"""Tile of a transposition: it fits the second-level cache, and its pitch is no power of two, so that a column of it
does not
fall into one cache set (which costs a factor of two to five on matrices of 2048 or 4096 columns)."""

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def raw(buffer: Any, dtype: str) -> Array:
    """A buffer as a flat array of unsigned integers as wide as the dtype."""
    return np.frombuffer(buffer, dtype=_RAW[DTYPES[dtype].itemsize])


def view(array: Array, first: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A strided view of a flat array; `first` and `strides` in elements."""
    size = array.itemsize
    return np.ndarray(
        sizes, array.dtype, array, first * size, tuple(stride * size for stride in strides)
    )  # checks bounds


def carry(copy: Copy, source: Array, target: Array, target_dtype: str, name: str) -> None:
    """Do one copy: from the flat elements of its source (from the first that it needs) into the flat target box."""
    theirs = view(source, 0, copy.sizes, copy.source_strides)
    ours = view(target, copy.target_first, copy.sizes, copy.target_strides)
    if copy.dtype == target_dtype:
        move(ours, theirs)
    else:
        ours[...] = cast(np.ascontiguousarray(theirs), copy.dtype, target_dtype, name)


def move(ours: Array, theirs: Array) -> None:
    """`ours[...] = theirs`, tile by tile where the one runs along rows and the other along columns."""
    if not _transposed(ours, theirs):
        np.copyto(ours, theirs)
        return
    scratch = np.empty((_TILE_ROWS, _TILE_PITCH), ours.dtype)
    for index in np.ndindex(ours.shape[:-2]):
        _transpose(ours[index], theirs[index], scratch)


def _transposed(ours: Array, theirs: Array) -> bool:
    """Whether the innermost two dimensions are rows of one side and columns of the other, and worth the tiles."""
    if ours.ndim < 2 or min(ours.shape[-2:]) < 32:
        return False
    (a, b), (c, d) = ours.strides[-2:], theirs.strides[-2:]
    return (a < b and c > d) or (a > b and c < d)


def _transpose(ours: Array, theirs: Array, scratch: Array) -> None:
    if theirs.strides[0] < theirs.strides[1]:
        ours, theirs = ours.T, theirs.T
    rows, columns = theirs.shape
    for row in range(0, rows, _TILE_ROWS):
        for column in range(0, columns, _TILE_COLUMNS):
            part = np.s_[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            tile = scratch[: min(_TILE_ROWS, rows - row), : min(_TILE_COLUMNS, columns - column)]
            tile[...] = theirs[part]
            ours[part] = tile


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from a file position. Raises `CorruptFile` when the file cannot be read or ends before."""
    try:
        while buffer:
            count = os.preadv(fd, [buffer], offset)
            if count == 0:
                raise CorruptFile(f"{path}: ends at byte {offset}. Was it changed while it was read?")
            buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read: {error.strerror}. Is the disk sound?") from error


def write_from(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Write a whole buffer at a file position. Raises `OutputError`."""
    try:
        while buffer:
            count = os.pwrite(fd, buffer, offset)
            buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}.") from error
