"""Where the tests find real checkpoints: in the repository, or in the `shared` folder beside it."""

import os
from pathlib import Path

import pytest

# The tests run side by side already; threads of one would wait for those of the other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
GOLDEN = [SHARED / "golden", REPOSITORY / "tests" / "golden"]
"""All of them beside the repository, or the few that it carries."""


def first_existing(candidates: list[Path], what: str) -> Path:
    """The first folder that is there; skips the test, saying where it looked, if none is."""
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    pytest.skip(f"{what} is in none of {', '.join(map(str, candidates))}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts and checkpoints that several projects read: reference/, golden/."""
    return first_existing([SHARED], "the shared folder")


@pytest.fixture(scope="session")
def golden_huggingface() -> Path:
    """Tiny Hugging Face folders: dense, dense-tied, moe, moe-v5."""
    return first_existing([folder / "huggingface" for folder in GOLDEN], "golden/huggingface")


@pytest.fixture(scope="session")
def golden_megatron() -> Path:
    """What Megatron-Bridge made of those, in several layouts: dense_tp2pp1, moe_tp1pp1ep2, ..."""
    return first_existing([folder / "megatron" for folder in GOLDEN], "golden/megatron")
