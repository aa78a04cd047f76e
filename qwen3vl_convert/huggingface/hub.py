"""A source that is a folder, or the Hub's name of one: `org/name` or `org/name@revision`.

Only the files that a conversion needs are downloaded, into the Hub's own cache, pinned to one commit.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_convert.errors import InputError, UsageError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AUXILIARY = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
_WEIGHTS = ("*.safetensors",)
_UNWANTED = ("*/*", ".*")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A folder on this machine; `repo` and `revision` (a commit hash) say which of the Hub's it is, if it is."""

    folder: Path
    repo: str | None
    revision: str | None


def resolve(
    source: str | Path, *, weights: bool, token: str | bool | None = None, revision: str | None = None
) -> Resolved:
    """The local folder of `source`, downloaded if it is a Hub id. `weights=False`: config, tokenizer and the like only.

    HF_HUB_OFFLINE, HF_HOME and the other variables of huggingface_hub apply. Raises InputError with what to do.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and source != "":
        return Resolved(folder, None, None)
    match = None if isinstance(source, Path) or folder.exists() else _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "~")):  # type: ignore[union-attr]  # a match is of a str
        raise _no_such_folder(source, folder)
    repo, named = match[1], match[2]
    if named and revision and named != revision:
        raise UsageError(f"{source}: two revisions are asked for, {named} and {revision}. Name one.")
    snapshot = _download(repo, named or revision, weights, token)
    return Resolved(snapshot, repo, snapshot.name if _COMMIT.fullmatch(snapshot.name) else None)


def _no_such_folder(source: str | Path, folder: Path) -> InputError:
    if folder.exists() and not folder.is_dir():
        return InputError(f"{source}: expected a model folder, found a file. Name the folder that holds it.")
    known = "Check the path; a Hub id is org/name or org/name@revision."
    return InputError(f"{source}: no such folder (from {os.curdir!r}, the current one). {known}")


def _download(repo: str, revision: str | None, weights: bool, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download  # takes a while, and no local conversion needs it

    patterns = [*_AUXILIARY, *(_WEIGHTS if weights else ())]
    try:
        folder = snapshot_download(
            repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=list(_UNWANTED)
        )
    except Exception as error:  # the HTTP libraries below it differ between versions
        explained = _explained(error, f"{repo}@{revision}" if revision else repo)
        if explained is None:
            raise
        raise explained from error
    return Path(folder)


def _explained(error: Exception, at: str) -> InputError | None:
    """What a failed download means to its user; None if it is none of the Hub's or the network's errors."""
    from huggingface_hub import errors

    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "is gated. Accept its terms on its Hub page, then log in with `hf auth login`"),
        (
            errors.RepositoryNotFoundError,
            "is neither a folder here nor a repository on the Hub that you may see. Check the spelling; "
            "if it is private, log in with `hf auth login`",
        ),
        (errors.RevisionNotFoundError, "has no such revision. Check the branch, tag or commit"),
        (
            errors.LocalEntryNotFoundError,
            "is not (or not completely) in the local cache, and the Hub cannot be reached. "
            "Download it with a connection (unset HF_HUB_OFFLINE), or name a local folder",
        ),
        (errors.HFValidationError, "is no name that the Hub knows, and no folder here. Check the spelling"),
        (errors.HfHubHTTPError, "could not be downloaded"),
        (OSError, "could not be downloaded"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return InputError(f"{at}: {reason}. ({type(error).__name__}: {_first_line(error)})")
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3"):
        return InputError(f"{at}: the Hub cannot be reached. Check the network. ({_first_line(error)})")
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
