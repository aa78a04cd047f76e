"""What is missing is named, with the command that installs it: as an error of the user's, never as a bug."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broken import QUICK
from qwen3vl_convert import hf_to_megatron, installed, make_checkpoint
from qwen3vl_convert.cli import console
from qwen3vl_convert.cli.app import app
from qwen3vl_convert.errors import NotInstalled
from qwen3vl_convert.installed import EXTRAS, PACKAGES, Package, command, missing, named, need

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED: dict[str, list[str]] = PROJECT["optional-dependencies"]


@pytest.fixture(autouse=True)
def installed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests run in a checkout alone."""
    monkeypatch.setattr(installed, "program_version", lambda: "1.0")


def absent(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def closure(extra: str) -> Iterator[str]:
    """The packages that an extra installs, and the extras that it brings along."""
    for requirement in DECLARED[extra]:
        brought = re.fullmatch(r"qwen3vl-convert\[([\w,]+)\]", requirement)
        if brought is None:
            yield re.split(r"[<>=;\s]", requirement)[0]
            continue
        for other in brought[1].split(","):
            yield f"[{other}]"
            yield from closure(other)


# ---- the table -------------------------------------------------------------------------------------------------------


BROUGHT = {"torch": {"jinja2"}, "transformers": {"tokenizers"}}
"""Packages that others of an extra depend on."""


@pytest.mark.parametrize(("package", "extra"), [(one, extra) for one in PACKAGES for extra in one.extras])
def test_the_extras_that_are_named_install_the_package(package: Package, extra: str) -> None:
    assert package.package in {*closure(extra), *BROUGHT.get(extra, ())}


def test_extras_bring_along_what_the_table_says() -> None:
    for extra, others in EXTRAS.items():
        assert {one.strip("[]") for one in closure(extra) if one.startswith("[")} == set(others)
    assert {one.strip("[]") for one in closure("all") if one.startswith("[")} == EXTRAS.keys()


def test_what_is_installed_without_extras_is_not_torch() -> None:
    always = {re.split(r"[<>=;\s]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert not always & {package.package for package in PACKAGES}


IMPORTED_AS = {"PyYAML": "yaml", "huggingface-hub": "huggingface_hub"}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            yield from (str(word.value) for word in node.args if isinstance(word, ast.Constant))


def test_every_import_that_is_not_a_dependency_is_in_the_table() -> None:
    always = {re.split(r"[<>=;\s]", requirement)[0] for requirement in PROJECT["dependencies"]}
    known = {package.module.partition(".")[0] for package in PACKAGES} | sys.stdlib_module_names
    rooms = ("qwen3vl_convert", "cli", "mappings")
    found = {
        name.partition(".")[0] for room in rooms for path in (ROOT / room).rglob("*.py") for name in imported(path)
    }
    assert found - known - {"qwen3vl_convert"} <= {IMPORTED_AS.get(name, name) for name in always}
    assert "torch" in found


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_nothing_is_said_where_all_is_there() -> None:
    need("x", "numpy")
    assert missing() == ()


def test_everything_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "torch", "transformers", "psutil")
    with pytest.raises(NotInstalled) as caught:
        need("--logits", "torch", "transformers", "psutil")
    said = "--logits needs torch, transformers and psutil, which are not installed: "
    assert str(caught.value) == said + "pip install 'qwen3vl-convert[transformers]'"
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["torch"], "pip install 'qwen3vl-convert[torch]'"),
        (["PIL", "megatron.core", "torch"], "pip install 'qwen3vl-convert[megatron,transformers]'"),
        (["torchvision", "transformers"], "pip install 'qwen3vl-convert[video]'"),
        (["flash_attn", "av"], "pip install 'qwen3vl-convert[video]' flash-attn"),
        (["decord"], "pip install decord"),
    ],
)
def test_the_command(modules: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, *modules)
    assert command(missing(*modules)) == said


def test_a_checkout_that_is_not_installed_has_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "program_version", lambda: installed.NOT_INSTALLED)
    absent(monkeypatch, "torch", "PIL")
    assert command(missing("torch", "PIL")) == "pip install torch pillow"


@pytest.mark.parametrize(
    ("release", "also"),
    [("0.16.1", {"psutil"}), ("0.18.2", {"psutil"}), ("0.19.0", {"psutil", "triton"}), ("1.0", {"psutil", "triton"})],
)
def test_megatron_core_needs_more_than_it_says(release: str, also: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "megatron", "megatron.core", "psutil", "triton")
    monkeypatch.setattr(installed, "version", lambda package: release)
    assert {package.package for package in missing("megatron.core")} == {"megatron-core", *also}


def test_a_program_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.undo()
    monkeypatch.setattr(installed, "version", none)
    assert installed.program_version() == "unknown"
    import qwen3vl_convert

    assert qwen3vl_convert.__version__ == "unknown"


# ---- imports that fail -----------------------------------------------------------------------------------------------


def test_a_failed_import_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "triton")
    said = r"plan needs triton, which is not installed: pip install '.*\[megatron\]'"
    with pytest.raises(NotInstalled, match=said), named("plan"):
        import_module("triton")


def test_a_package_that_nobody_foresaw_is_named_with_what_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_library.py").write_text("import a_package_of_its_own\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = "plan needs the Python module a_package_of_its_own, which a_library imports and which is not installed"
    with pytest.raises(NotInstalled, match=said), named("plan"):
        import_module("a_library")


def test_a_package_that_is_too_old_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda module: True)
    monkeypatch.setattr(installed, "version", lambda package: {"transformers": "4.50.1", "decord": "0.6"}[package])
    lacks = {
        "transformers.models.qwen3_vl": (
            "verify needs transformers.models.qwen3_vl, which transformers 4.50.1, as it is installed, does not have: "
            "pip install -U transformers 'qwen3vl-convert[transformers]'"
        ),
        "decord.bridge": (
            "verify needs decord.bridge, which decord 0.6, as it is installed, does not have: pip install -U decord"
        ),
    }
    for module, said in lacks.items():
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert str(installed.explained(error, "verify")) == said


def test_a_real_import_from_a_package_that_lacks_the_module() -> None:
    pytest.importorskip("torch", reason="the package that is there is torch, which is not installed")
    said = rf"plan needs torch.no_such_part, which torch {re.escape(version('torch'))}, as it is installed, does not"
    with pytest.raises(NotInstalled, match=said), named("plan"):
        import_module("torch.no_such_part")


def test_another_package_of_the_same_namespace_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`megatron` is shared: that megatron.training is missing says nothing of megatron-core."""
    monkeypatch.setattr(installed, "is_installed", lambda module: module != "megatron.core")
    said = {"megatron.core.models": "needs megatron-core, ", "megatron": "needs megatron-core, "}
    for module, expected in (said | {"megatron.training": "needs the Python module megatron.training, "}).items():
        assert expected in str(installed.explained(ModuleNotFoundError(name=module), "verify"))


@pytest.mark.parametrize("module", ["qwen3vl_convert.no_such_room", "json.no_such_part"])
def test_a_mistake_of_the_program_s_stays_one(module: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught, named("plan"):
        import_module(module)
    assert not isinstance(caught.value, NotInstalled)


# ---- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "hf", "tiny")
    hf_to_megatron(folder / "hf", folder / "run", run=QUICK)
    return folder


LOGITS = ["verify", "hf", "run", "--logits"]
MISSING = {
    "logits, torch": (LOGITS, ["torch"], "--logits needs torch,"),
    "logits, megatron-core": (LOGITS, ["megatron", "megatron.core"], "--logits needs megatron-core,"),
    "logits, transformers": (LOGITS, ["transformers"], "--logits needs transformers,"),
    "logits, psutil": (LOGITS, ["psutil"], "--logits needs psutil,"),
    "inference, psutil": ([*LOGITS, "--model", "inference"], ["psutil"], "--logits needs psutil,"),
    "inference, torch": ([*LOGITS, "--model", "inference"], ["torch"], "--logits needs torch,"),
    "roundtrip": (["roundtrip", "hf", "--logits"], ["torch", "psutil"], "--logits needs torch and psutil,"),
    "generate": (["generate", "hf", "hello"], ["torch", "transformers"], "generate needs torch and transformers,"),
    "generate from tokens": (["generate", "hf", "--token-ids", "1,2"], ["torch"], "generate needs torch,"),
    "chat": (["chat", "hf"], ["transformers"], "chat needs transformers,"),
}
INSTALLED_IN_FULL = ("torch", "megatron.core", "transformers")


@pytest.mark.parametrize("case", MISSING.values(), ids=MISSING.keys())
def test_a_command_says_what_is_missing(
    case: tuple[list[str], list[str], str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, modules, said = case
    if lacking := [module for module in missing_here() if module not in modules]:
        pytest.skip(f"{', '.join(lacking)} is not installed, and would be named, too")
    absent(monkeypatch, *modules)
    monkeypatch.chdir(made)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert f"error: {said}" in result.stderr
    assert "pip install 'qwen3vl-convert[" in result.stderr
    assert "bug" not in result.stderr


def missing_here() -> list[str]:
    return [package.module for package in missing(*INSTALLED_IN_FULL)]


def test_an_import_that_fails_deep_in_a_command_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "triton")

    def plan_something() -> None:
        raise ModuleNotFoundError("No module named 'triton.language'", name="triton.language")

    with pytest.raises(Exception) as caught:
        console.guarded(plan_something)()
    stopped: Any = caught.value
    assert stopped.exit_code == 2
    assert capsys.readouterr().err.startswith(
        "error: plan-something needs triton, which is not installed: pip install "
    )
