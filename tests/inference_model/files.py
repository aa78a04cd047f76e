"""The files beside a tiny model's weights, made by hand: a tokenizer of bytes, settings of processors, a template."""

import base64
import io
import json
import re
import warnings
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_convert.make import SIZES

TINY = SIZES["tiny"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
"""From the tiny models' image_token_id on."""
IM_END = 505
VISUAL: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
IMAGE = {
    **VISUAL,
    "size": {"shortest_edge": 4096, "longest_edge": 262144},
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEO = {
    **VISUAL,
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer_json(special: Iterable[str] = SPECIAL) -> dict[str, Any]:
    """A token for each byte, fillers up to the model's first special token, then those."""
    words = [*byte_letters(), *(f"filler{number}" for number in range(256, TINY.image_token_id))]
    added = [
        {"id": TINY.image_token_id + number, "content": content, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, content in enumerate(special)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {word: number for number, word in enumerate(words)}, "merges": []},
    }


def write_files(folder: Path, style: str = "hub", special: Iterable[str] = SPECIAL, eos: Any = (IM_END, 2)) -> Path:
    """As published (`hub`), or as transformers 5.x saves them (`v5`)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    contents: dict[str, Any] = {
        "tokenizer.json": tokenizer_json(special),
        "generation_config.json": {"eos_token_id": list(eos), "do_sample": True, "temperature": 0.7, "top_p": 0.8},
    }
    if style == "hub":
        contents |= {
            "vocab.json": contents["tokenizer.json"]["model"]["vocab"],
            "tokenizer_config.json": {**tokenizer, "tokenizer_class": "Qwen2Tokenizer"},
            "chat_template.json": {"chat_template": TEMPLATE},
            "preprocessor_config.json": IMAGE,
            "video_preprocessor_config.json": VIDEO,
        }
        (folder / "merges.txt").write_text("#version: 0.2\n")
    else:
        contents |= {
            "tokenizer_config.json": {**tokenizer, "tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
            "processor_config.json": {"image_processor": IMAGE, "video_processor": VIDEO},
        }
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def ids_of(text: str) -> list[int]:
    """By hand: a byte is its own token, a mark has the number that the model gives it."""
    parts = re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text)
    return [
        one
        for part in parts
        for one in ([TINY.image_token_id + SPECIAL.index(part)] if part in SPECIAL else list(part.encode()))
    ]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def needs(*packages: str) -> None:
    """Skip the test where one of them is not installed, or is and cannot be used."""
    for name in packages:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(name)
        except (ImportError, RuntimeError, OSError) as cause:
            pytest.skip(f"needs {name}: {cause}")


def picture(width: int = 96, height: int = 64, number: int = 0) -> Any:
    """Gradients and a square; `number` makes it another."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * x // width, 255 * y // height, (x + 3 * y + 40 * number) % 256], axis=-1).astype(np.uint8)
    return import_module("PIL.Image").fromarray(image)


def png(path: Path, width: int = 96, height: int = 64, number: int = 0) -> Path:
    picture(width, height, number).save(path)
    return path


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def as_bytes(image: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
