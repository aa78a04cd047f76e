"""The one rule by which tests are left out where torch is not installed; `make test-light` runs the others.

Left out are the folders about what is built with torch, files that import it, and tests that import it themselves: it
is their oracle. Where the program itself fails to import it, a test fails.
"""

from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
WITH_TORCH = find_spec("torch") is not None
NEED_TORCH = ("torch", "transformers", "megatron", "tokenizers")
"""What tests import that is torch, or stands on it."""
OF_MODELS = ("models", "inference_model", "oracles")
"""Folders of tests of what is built with torch, or asks what is."""


def pytest_report_header() -> list[str]:
    folders = ", ".join(f"tests/{folder}" for folder in OF_MODELS)
    return [] if WITH_TORCH else [f"torch is not installed: left out are {folders} and what imports it as an oracle"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if not WITH_TORCH and collection_path in [TESTS / folder for folder in OF_MODELS] else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that imports it is skipped. Where torch is installed, none is for want of a package."""
    report = yield
    call: pytest.CallInfo[object] | None = getattr(report, "call", None)
    error = call.excinfo.value.__cause__ if report.failed and call and call.excinfo else None
    if reason := _wants_torch(error):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """So is a test that imports it itself. What the program fails to import is a failure."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        reason = _wants_torch(error)
        if not reason or not _in_tests(error):
            raise
    pytest.skip(reason)


pytest_runtest_call = pytest_runtest_setup


def _wants_torch(error: BaseException | None) -> str:
    """Why a test is skipped that failed with this; nothing where that is no reason."""
    name = str(error.name) if isinstance(error, ImportError) else ""
    wants = not WITH_TORCH and name.partition(".")[0] in NEED_TORCH
    return f"imports {name}, and torch is not installed" if wants else ""


def _in_tests(error: BaseException) -> bool:
    """Whether the import statement that failed is in a file of tests."""
    trace, last = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        last, trace = (last if "importlib" in file else file), trace.tb_next
    return Path(last).is_relative_to(TESTS)
