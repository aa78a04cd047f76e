"""What other programs wrote and publishers published, as the repository carries it: facts that tests are held to.

tests/golden/README.md says where each comes from.
"""

from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden"
HUGGINGFACE = GOLDEN / "huggingface"
"""Folders of four tiny models: dense, dense-tied, moe, moe-v5."""
MEGATRON = GOLDEN / "megatron"
"""What Megatron-Bridge made of those, in seven layouts: dense_tp2pp1, moe_tp1pp1ep2, ..."""
CONFIGS = GOLDEN / "configs"
"""config.json of the six published sizes; in variants/ those of three tiny models, by four releases of transformers."""
HEADERS = GOLDEN / "headers"
"""Names and shapes of all tensors of the six published models."""
