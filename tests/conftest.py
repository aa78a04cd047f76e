"""What all tests and the processes that they start share: the machine as they see it, and real checkpoints."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from recorded import HUGGINGFACE, MEGATRON
from without_torch import (
    pytest_ignore_collect,
    pytest_make_collect_report,
    pytest_report_header,
    pytest_runtest_call,
    pytest_runtest_setup,
)

__all__ = [
    "pytest_ignore_collect",
    "pytest_make_collect_report",
    "pytest_report_header",
    "pytest_runtest_call",
    "pytest_runtest_setup",
]

TESTS = Path(__file__).resolve().parent
LONGEST = (
    "verify/test_parallel.py",
    "verify/test_correct.py",
    "verify/test_faults.py",
    "models/test_training.py",
    "oracles/test_megatron_core.py",
    "models/test_bridge.py",
    "models/test_parallel.py",
    "test_robust.py",
    "test_gpu_check.py",
    "test_property.py",
    "verify/test_commands.py",
    "oracles/test_megatron_world.py",
    "verify/test_streaming.py",
    "oracles/test_megatron_core_golden.py",
    "test_cli.py",
    "test_docs.py",
)
"""The files that take most of the time, about in order. One that is missing here costs time and nothing else."""

# Before torch is imported. The tests run side by side already; threads of one would wait for those of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor is there a GPU: a model would be built on it and fed from the CPU. What is for one is in benchmarks/gpu_check.py.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# How long an example takes depends on what else the machine does, and says nothing of the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
# Servers of processes find the tests' own modules: multiprocessing does not tell them where those are.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
# A shell's job in the background ignores Ctrl-C, and so would every process that is started here to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first that take long (the Makefile keeps the order): no worker is left alone with one at the end."""
    order = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def golden_huggingface() -> Path:
    """Tiny Hugging Face folders: dense, dense-tied, moe, moe-v5."""
    return HUGGINGFACE


@pytest.fixture(scope="session")
def golden_megatron() -> Path:
    """What Megatron-Bridge made of those, in seven layouts: dense_tp2pp1, moe_tp1pp1ep2, ..."""
    return MEGATRON
