"""Write the pages of docs/ that come from code, and the output under the examples of the pages that people write.

docs/generate.py              write what is not current        (make docs)
docs/generate.py --check      only say what is not current     (make docs-check); exit code 1 if anything is
docs/generate.py --figure     also run the program for docs/images/demo.svg, whose times differ from run to run
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pages
from examples import refreshed

DOCS = Path(__file__).resolve().parent
WRITTEN = (DOCS.parent / "README.md", *(DOCS / f"{name}.md" for name in ("formats", "how-it-works", "tour", "verify")))
"""Pages written by people whose examples show real output."""


def current() -> Iterator[tuple[Path, str]]:
    """Every page that this script answers for, and what it should hold."""
    yield DOCS / "cli.md", pages.commands()
    yield DOCS / "mapping-table.md", pages.mapping_table()
    yield DOCS / "python-api.md", pages.python_api()
    yield DOCS / "models-api.md", pages.models_api()
    yield DOCS / "inference-api.md", pages.inference_api()
    for path in WRITTEN:
        yield path, refreshed(path.read_text())


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    stale = [(path, text) for path, text in current() if not path.is_file() or path.read_text() != text]
    for path, text in stale:
        print(f"{path.relative_to(DOCS.parent)} {'is not current: run `make docs`' if check else 'written'}")
        if not check:
            path.write_text(text)
    if "--figure" in arguments:
        from figure import draw

        draw(DOCS / "images" / "demo.svg")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
