"""Sources that are folders, and Hub ids from a cache built by hand, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from huggingface.samples import make_folder, tiny_config
from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.huggingface import hub
from qwen3vl_convert.huggingface.folder import read_folder
from qwen3vl_convert.huggingface.hub import Resolved, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with org/name at one commit, which `main` and `v1` point to; offline."""
    repo = tmp_path / "home" / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(make_folder(tmp_path / "plain", tiny_config()).iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for ref in ("main", "v1"):
        (repo / "refs" / ref).write_text(COMMIT)
    from huggingface_hub import constants

    # These are read from the environment when huggingface_hub is imported, which other tests may have done.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_local_folders_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, str(tmp_path), "org/name", "./org/name", Path("org/name")):
        assert resolve(source, weights=True) == Resolved(Path(source), None, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org", weights=True).folder == tmp_path / "org"


@pytest.mark.parametrize(
    "source",
    ["./models", "../models", "/models/qwen", "~/models", "a/b/c", "models", "a/b/", "", "org/na me", Path("org/name")],
)
def test_paths_that_are_missing(source: str | Path) -> None:
    with pytest.raises(InputError, match=r"no such folder.*a Hub id is org/name or org/name@revision"):
        resolve(source, weights=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="expected a model folder, found a file"):
        resolve(str(tmp_path / "config.json"), weights=True)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("source", ["org/name", "org/name@main", "org/name@v1", f"org/name@{COMMIT}"])
def test_hub_ids_are_pinned_to_a_commit(cache: Path, source: str, weights: bool) -> None:
    found = resolve(source, weights=weights)
    assert found == Resolved(cache, "org/name", COMMIT)
    assert read_folder(found.folder).files


def test_revision_by_name_and_by_argument(cache: Path) -> None:
    assert resolve("org/name", weights=True, revision="v1").revision == COMMIT
    assert resolve("org/name@v1", weights=True, revision="v1").revision == COMMIT
    with pytest.raises(UsageError, match="two revisions are asked for, v1 and main"):
        resolve("org/name@v1", weights=True, revision="main")


@pytest.mark.parametrize("source", ["org/other", "org/name@v2"])
def test_offline_and_not_cached(cache: Path, source: str) -> None:
    with pytest.raises(InputError, match=rf"^{source}: is not .* in the local cache.*unset HF_HUB_OFFLINE"):
        resolve(source, weights=True)


def test_the_environment_decides(cache: Path) -> None:
    """The same in a process of its own, where huggingface_hub reads HF_HOME and HF_HUB_OFFLINE itself."""
    program = (
        "import sys, json\n"
        "from qwen3vl_convert.huggingface.hub import resolve\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "found = resolve('org/name', weights=False)\n"
        "print(json.dumps([str(found.folder), found.repo, found.revision]))\n"
    )
    home = cache.parents[3]
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, **paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [str(cache), "org/name", COMMIT]


def asked_for(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> dict[str, Any]:
    """What snapshot_download is asked for."""
    calls: list[dict[str, Any]] = []

    def record(repo: str, **kwargs: Any) -> str:
        calls.append({"repo": repo, **kwargs})
        return f"/cache/snapshots/{COMMIT}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    resolve("org/name", **arguments)
    return calls[0]


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    def wanted(request: dict[str, Any], file: str) -> bool:
        allowed = any(fnmatch(file, pattern) for pattern in request["allow_patterns"])
        return allowed and not any(fnmatch(file, pattern) for pattern in request["ignore_patterns"])

    needed = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors"]
    never = [
        "pytorch_model.bin",
        "onnx/model.onnx",
        "original/config.json",
        "sub/x.safetensors",
        ".gitattributes",
        "a.png",
    ]
    request = asked_for(monkeypatch, weights=True, token="secret", revision="v1")
    assert (request["repo"], request["revision"], request["token"]) == ("org/name", "v1", "secret")
    assert [file for file in needed + weights + never if wanted(request, file)] == needed + weights
    request = asked_for(monkeypatch, weights=False)
    assert [file for file in needed + weights + never if wanted(request, file)] == needed
    assert wanted(request, "model.safetensors.index.json")


def test_errors_of_the_hub_say_what_to_do() -> None:
    from huggingface_hub import errors

    def made(kind: type[Exception]) -> Exception:
        error = kind.__new__(kind)  # their constructors want a response, which differs between versions
        error.args = ("401 Client Error\nmore",)
        return error

    for kind, message in (
        (errors.GatedRepoError, "org/name: is gated. Accept its terms on its Hub page, then log in"),
        (errors.RepositoryNotFoundError, "org/name: is neither a folder here nor a repository on the Hub"),
        (errors.RevisionNotFoundError, "org/name: has no such revision"),
        (errors.LocalEntryNotFoundError, "org/name: is not .or not completely. in the local cache"),
        (errors.HFValidationError, "org/name: is no name that the Hub knows"),
        (errors.HfHubHTTPError, "org/name: could not be downloaded"),
        (ConnectionError, "org/name: could not be downloaded"),
    ):
        found = hub._explained(made(kind), "org/name")
        with pytest.raises(InputError, match=message):
            raise found if found is not None else AssertionError(kind)
    assert hub._explained(ZeroDivisionError(), "org/name") is None


def test_an_error_of_the_program_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ZeroDivisionError):
        resolve("org/name", weights=True)
