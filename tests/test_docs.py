"""What the pages say is so: code runs, commands exist, links lead somewhere, generated pages are current."""

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`qwen3vl-convert ([^`\n]*)`")
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_REPOSITORY_PATH = re.compile(r"`((?:tests|docs|benchmarks|mappings|qwen3vl_convert|cli)/[\w./-]*)`")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> Iterator[tuple[str, int, str]]:
    """(language, line of the first line, text) of each block."""
    page = path.read_text()
    for match in _BLOCK.finditer(page):
        if match[1] in languages:
            yield match[1], page.count("\n", 0, match.start(3)) + 1, match[3]


@pytest.fixture
def own_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mappings that a page registers are gone after it."""
    from qwen3vl_convert.mappings import registry

    monkeypatch.setattr(registry, "_REGISTERED", {})


@pytest.mark.usefixtures("own_mappings")
@pytest.mark.parametrize(
    "page", ["README.md", "docs/notation.md", "docs/adding-a-mapping.md", "docs/from-megatron-bridge.md"]
)
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page != "README.md":
        pytest.importorskip("torch", reason=f"{page} uses torch, which is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    runner = doctest.DocTestRunner(verbose=False)
    found = list(blocks(ROOT / page, "python", "pycon"))
    for language, line, text in found:
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(ROOT / page), "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(text, names, page, str(ROOT / page), line - 1)
        output: list[str] = []
        runner.run(test, out=output.append, clear_globs=False)
        names.update(test.globs)
        assert not output, "".join(output)
    assert found


def examples() -> list[tuple[str, str]]:
    """(page, arguments) of every `qwen3vl-convert ...` in a block."""
    found = []
    for path in PAGES:
        for _, _, text in blocks(path, "console", "bash", "sh", ""):
            joined = text.replace("\\\n", " ")
            for line in re.findall(r"(?:^|\$ |&& |; )qwen3vl-convert ([^#\n;&|]*)", joined, re.MULTILINE):
                if "[OPTIONS]" not in line:
                    found.append((name_of(path), line.strip()))
    return found


def inline() -> list[tuple[str, str]]:
    """(page, arguments) of every `qwen3vl-convert ...` in a line of text or a cell of a table."""
    texts = ((path, _BLOCK.sub("", path.read_text())) for path in PAGES)
    return [(name_of(path), line) for path, text in texts for line in _INLINE.findall(text)]


@pytest.mark.parametrize(("page", "line"), [*examples(), *inline()])
def test_command_exists_with_its_options(page: str, line: str) -> None:
    from typer.main import get_command

    from qwen3vl_convert.cli.app import app

    name, *arguments = shlex.split(line)
    group: Any = get_command(app)
    if name.startswith("--"):  # the program's own
        assert name in {word for parameter in group.params for word in parameter.opts}, page
        return
    assert name in group.commands, page
    if "--help" not in arguments:
        # A command that is only named has its arguments elsewhere.
        named_alone = (page, line) in inline() and not arguments
        group.commands[name].make_context(name, arguments, resilient_parsing=named_alone)


def test_readme_shows_every_command() -> None:
    from qwen3vl_convert.cli.app import app

    commands = {command.name for command in app.registered_commands}
    assert commands <= {line.split()[0] for page, line in examples() if page == "README.md"}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    page = path.read_text()
    text = _BLOCK.sub("", page)
    for link in _LINK.findall(text):
        target, _, heading = link.partition("#")
        if "://" in link:
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not heading or heading in headings(file.read_text()), link
    missing = [name for name in _REPOSITORY_PATH.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def headings(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.slow
def test_generated_pages_and_shown_output_are_current() -> None:
    """As `make docs-check`."""
    pytest.importorskip("megatron.core", reason="pages come from modules on megatron-core, which is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
