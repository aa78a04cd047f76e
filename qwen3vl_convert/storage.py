"""What both checkpoint formats have in common: named tensors that lie in files, in one chunk or in many.

A Hugging Face tensor is one chunk; a Megatron tensor is tiled by the chunks that its ranks wrote. Nothing here reads
data: readers make these values from headers, writers from a plan.
"""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype under the names of the formats. `torch` is the attribute of the torch module, also the name that we
    print.
    """

    torch: str
    safetensors: str
    itemsize: int


DTYPES = {
    dtype.torch: dtype
    for dtype in (
        DType("float64", "F64", 8),
        DType("float32", "F32", 4),
        DType("float16", "F16", 2),
        DType("bfloat16", "BF16", 2),
        DType("float8_e4m3fn", "F8_E4M3", 1),
        DType("float8_e5m2", "F8_E5M2", 1),
        DType("int64", "I64", 8),
        DType("int32", "I32", 4),
        DType("int16", "I16", 2),
        DType("int8", "I8", 1),
        DType("uint8", "U8", 1),
        DType("bool", "BOOL", 1),
    )
}
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, stored contiguously (row major) in `file` from byte `start`.

    `offsets` and `sizes` are in elements of the whole tensor, one entry per dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint; its chunks tile it exactly (the readers see to that)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize
