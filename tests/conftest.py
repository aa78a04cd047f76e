"""What all tests and the processes that they start share: the machine as they see it, and real checkpoints."""

import os
import signal
from pathlib import Path

import pytest

from recorded import HUGGINGFACE, MEGATRON

# Before torch is imported. The tests run side by side already; threads of one would wait for those of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor is there a GPU: a model would be built on it and fed from the CPU. What is for one is in benchmarks/gpu_check.py.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell's job in the background ignores Ctrl-C, and so would every process that is started here to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_huggingface() -> Path:
    """Tiny Hugging Face folders: dense, dense-tied, moe, moe-v5."""
    return HUGGINGFACE


@pytest.fixture(scope="session")
def golden_megatron() -> Path:
    """What Megatron-Bridge made of those, in seven layouts: dense_tp2pp1, moe_tp1pp1ep2, ..."""
    return MEGATRON
