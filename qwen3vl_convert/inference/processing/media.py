"""Pictures and videos, from files and data URLs. Nothing is fetched from a network."""

import base64
import binascii
import io
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from qwen3vl_convert.errors import InputError, NotInstalled, UsageError
from qwen3vl_convert.inference.processing.libraries import in_short, transformers
from qwen3vl_convert.installed import command, is_installed, missing, need

_DATA = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),(.*)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
DECODERS = {"torchcodec": "torchcodec", "av": "pyav", "cv2": "opencv", "decord": "decord"}
"""What can decode videos, the best first: the name that is imported, and what transformers calls it."""


def load_image(source: str | Path) -> Any:
    """The picture in a file or a data URL, upright, in RGB. Raises `InputError`, or `UsageError` without pillow."""
    content = _bytes_of(source)
    need(f"The picture {shown(source)}", "PIL")
    image, operations = import_module("PIL.Image"), import_module("PIL.ImageOps")
    try:
        with image.open(io.BytesIO(content)) as opened:
            return operations.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as cause:
        raise InputError(
            f"{shown(source)}: expected a picture that pillow can read (PNG, JPEG, WebP ...), found none "
            f"({in_short(cause)}). Save it again as PNG."
        ) from cause


def load_video(source: str | Path, choose: Callable[..., Any]) -> tuple[Any, Any]:
    """(the frames that `choose(metadata)` takes, the metadata with their numbers), by transformers' own loader."""
    path = _file(source)
    decoder = next((name for module, name in DECODERS.items() if _usable(module)), None)
    if decoder is None:
        others = ", ".join(package.package for package in missing(*DECODERS) if package.module != "av")
        raise NotInstalled(f"The video {path} needs a decoder: {command(missing('av'))} (or one of {others})")
    about = f"{path}: expected a video that {decoder} can decode, found none. Convert it to MP4 (H.264)"
    with transformers(about):
        loader: Any = import_module("transformers.video_utils")
        frames, metadata = loader.load_video(str(path), backend=decoder, sample_indices_fn=choose)
        return frames, metadata


def _usable(module: str) -> bool:
    """Whether it can be imported, which torchcodec cannot without ffmpeg's libraries."""
    if not is_installed(module):
        return False
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def shown(source: str | Path) -> str:
    """A source as a message names it: data URLs are long."""
    text = str(source)
    return f"{text[:40]}..." if text.startswith("data:") and len(text) > 40 else text


def _bytes_of(source: str | Path) -> bytes:
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _data(source)
    path = _file(source)
    try:
        return path.read_bytes()
    except OSError as cause:
        raise InputError(f"{path}: cannot be read ({cause.strerror}). Check its permissions.") from cause


def _data(url: str) -> bytes:
    match = _DATA.fullmatch("data:" + url[5:])
    if match is None:
        raise UsageError(f"{shown(url)}: expected data:image/png;base64,..., found no comma. Check the URL.")
    if ";base64" not in match[2].lower():
        return unquote_to_bytes(match[3])
    try:
        return base64.b64decode("".join(unquote_to_bytes(match[3]).decode("ascii").split()), validate=True)
    except (binascii.Error, ValueError) as cause:
        raise InputError(f"{shown(url)}: expected base64 after the comma, found something else ({cause}).") from cause


def _file(source: str | Path) -> Path:
    if isinstance(source, str) and _URL.match(source):
        raise UsageError(
            f"{source}: expected a file, found an address. Nothing is fetched from a network: download it first."
        )
    path = Path(source).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise InputError(f"{path}: expected a file, found {found}. Check the path.")
    return path
