"""Is it the same model? `weights` compares two checkpoints on disk, bit for bit, without building either model."""

from qwen3vl_convert.verify.weights import Difference, Verdict, verify

__all__ = ["Difference", "Verdict", "verify"]
