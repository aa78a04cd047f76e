"""Read a box of a stored tensor, whichever chunks it lies in."""

import math
import mmap
import os
from collections.abc import Iterator

import numpy as np

from qwen3vl_convert.errors import CorruptFile
from qwen3vl_convert.plan import Box
from qwen3vl_convert.storage import DTYPES, Chunk, StoredTensor
from qwen3vl_convert.strided import Array, raw


def read_box(tensor: StoredTensor, box: Box) -> Array:
    """The elements of a box, as unsigned integers of the dtype's width, in the shape of the box."""
    out = raw(bytearray(math.prod(box[1]) * DTYPES[tensor.dtype].itemsize), tensor.dtype).reshape(box[1])
    for chunk in tensor.chunks:
        shared = _shared(box, (chunk.offsets, chunk.sizes))
        if shared is not None:
            out[_slices(shared, box[0])] = _mapped(chunk, tensor.dtype)[_slices(shared, chunk.offsets)]
    return out


def rows(tensor: StoredTensor, first: int, stop: int, block: int = 4096) -> Iterator[Array]:
    """Rows first..stop along the first dimension, in blocks of at most `block` rows."""
    rest = tensor.shape[1:]
    for at in range(first, stop, block):
        count = min(block, stop - at)
        yield read_box(tensor, ((at, *(0 for _ in rest)), (count, *rest)))


def _shared(a: Box, b: Box) -> Box | None:
    """The box that two boxes have in common."""
    offsets = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stops = tuple(min(x + s, y + t) for x, s, y, t in zip(a[0], a[1], b[0], b[1], strict=True))
    sizes = tuple(stop - offset for stop, offset in zip(stops, offsets, strict=True))
    return (offsets, sizes) if all(size > 0 for size in sizes) else None


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o - start, o - start + s) for o, s, start in zip(*box, origin, strict=True))


def _mapped(chunk: Chunk, dtype: str) -> Array:
    """A chunk's data, mapped: pages are read as they are touched, and dropped with the array."""
    nbytes = chunk.numel * DTYPES[dtype].itemsize
    lead = chunk.start % mmap.ALLOCATIONGRANULARITY
    fd = os.open(chunk.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(fd, lead + nbytes, prot=mmap.PROT_READ, offset=chunk.start - lead)
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{chunk.file}: cannot be read: {error}. Was it changed while it was read?") from error
    finally:
        os.close(fd)
    return raw(memoryview(mapped)[lead:], dtype).reshape(chunk.sizes)


def is_padding(tensor: StoredTensor, first: int) -> bool:
    """Whether all rows from `first` on are one and the same row, zeros for example."""
    model: Array | None = None
    for block in rows(tensor, first, tensor.shape[0]):
        model = block[0] if model is None else model
        if not np.array_equal(block, np.broadcast_to(model, block.shape)):
            return False
    return True


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(rows(one, 0, one.shape[0]), rows(other, 0, other.shape[0]), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
