"""The inference engine beside transformers' `generate`, as `benchmarks/inference.py` measures it."""

from collections.abc import Iterator

import inference

from gpu.checks import Run, give_back
from gpu.page import Row

BATCHES = {"2b": (1, 8, 32), "8b": (1,), "tiny": (1, 4)}
"""By size: the larger one is slow to fill."""
REPEAT = 2


def beside_generate(run: Run) -> Iterator[Row]:
    """Batch by batch. There is nothing to pass but that graphs were captured."""
    assert run.shape is not None
    dtype = "fp32" if run.small else "bf16"
    for batch in BATCHES[run.shape.size]:
        shape = inference.Shape(batch, prompt=32 if run.small else 256, tokens=8 if run.small else 32)
        found = inference.measure(run.shape.size, run.shape.layers, shape, run.device, dtype, REPEAT)
        yield Row("generated", found.cells(), found.graphs > 0 or run.small)
        give_back(run.device)  # of two models, before the next two


CHECKS = (beside_generate,)
