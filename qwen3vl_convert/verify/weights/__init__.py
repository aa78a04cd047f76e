"""Every element on disk: `compare` reads both checkpoints and measures what differs, `guess` says what happened to it.

`sides` aligns them by the equations. The hypotheses are in `orders` (axes), `elsewhere` (another tensor's weights),
`alternatives` (other equations on the same chunks), `entries` (rows and columns), `values` and `initialisation`.
"""

from qwen3vl_convert.verify.weights.compare import compare_weights
from qwen3vl_convert.verify.weights.sides import open_beside

__all__ = ["compare_weights", "open_beside"]
