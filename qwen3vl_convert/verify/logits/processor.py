"""Prompts by the checkpoint's own processor: a chat in English and Chinese about drawn pictures, as a user's comes in.

Only Qwen3-VL's own classes run, and nothing but the folder is read: neither code that comes with a checkpoint nor the
network. The drawings have whole tokens and so few of them that the processor has nothing to resize.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.installed import lacking, missing
from qwen3vl_convert.models.positions import check_visual_tokens
from qwen3vl_convert.verify.logits.prompts import NamedPrompt, Prompt, contents_of, token_types

LONGEST = 300
"""Tokens of a prompt. The largest models are verified on a CPU."""
FILES = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
"""What a processor is read from: one of each."""
MODULES = ("PIL", "torchvision")
"""What transformers' processors of images and videos need."""


class NoProcessor(Exception):
    """Why there is none, as the end of a sentence."""


# ---- what is said ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of height x width tokens, or as many as there are frames; `number` makes it another."""

    height: int
    width: int
    number: int
    frames: int = 0

    def draw(self, dims: Dims) -> NDArray[np.uint8]:
        """[height, width, 3] in pixels; of a video [frames, 3, height, width]."""
        side = dims.patch * dims.spatial_merge
        if not self.frames:
            return _picture(self.height * side, self.width * side, self.number, moved=0)
        times = range(self.frames * dims.temporal_patch)
        frames = [_picture(self.height * side, self.width * side, self.number, time) for time in times]
        return np.stack(frames).transpose(0, 3, 1, 2)

    def metadata(self, dims: Dims) -> dict[str, Any]:
        """Two frames a second, all of them taken."""
        count = self.frames * dims.temporal_patch
        return {"total_num_frames": count, "fps": 2.0, "duration": count / 2, "frames_indices": list(range(count))}


Part = str | Drawing
CHATS: dict[str, Sequence[Part]] = {
    "text": [
        "A lighthouse keeper writes down the weather every evening: wind from the north-west, 17 knots, rain after "
        "midnight, visibility poor. One day the numbers stop making sense. What would you ask first, and why? "
        "灯塔看守人每天晚上记录天气、风向和雨量。有一天数字不再合理。请用中文回答。 "
        "def f(x): return 3 * x ** 2 - 1"
    ],
    "image": [Drawing(5, 7, 0), "Which colours does this picture have, from left to right? 图中有哪些颜色。"],
    "images": [
        "Compare these: ",
        Drawing(2, 3, 1),
        Drawing(3, 3, 2),
        " and 还有这两张 ",
        Drawing(1, 5, 3),
        Drawing(6, 2, 4),
        "Which one is the widest?",
    ],
    "video": [Drawing(3, 4, 5, frames=4), "Where does the disc move to? 圆盘向哪里移动。"],
    "mixed": [
        "First a picture: ",
        Drawing(4, 2, 6),
        "then a video. 然后是视频。",
        Drawing(2, 3, 7, frames=3),
        Drawing(1, 3, 8),
        "Do they show the same thing?",
    ],
}
"""By name: what the user says and shows."""


def _picture(height: int, width: int, number: int, moved: int) -> NDArray[np.uint8]:
    """[height, width, 3]: gradients, a checkerboard, bars, a disc that moves; whole numbers, the same everywhere."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x // (width - 1), 255 * y // (height - 1)
    blue = 255 * ((x // 8 + y // 8 + number) % 2)
    image = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    image[(x + 2 * y + 23 * number) % 61 < 9] = (40 * number % 256, 200, 60)
    at_y, at_x = (height // 3 + 5 * moved) % height, (width // 3 + 9 * moved + 11 * number) % width
    image[(y - at_y) ** 2 + (x - at_x) ** 2 < (min(height, width) // 4) ** 2] = (230, 60, 30 * number % 256)
    return image


# ---- the processor ---------------------------------------------------------------------------------------------------


def processor_prompts(dims: Dims, folder: Path | None) -> tuple[NamedPrompt, ...]:
    """A prompt for each of `CHATS`. Raises NoProcessor, whatever is wrong with the folder or what is installed."""
    _check_there(folder)
    try:
        with _quiet():
            processor = import_module("transformers").Qwen3VLProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return tuple(_named(name, _answer(processor, parts, dims), dims) for name, parts in CHATS.items())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as cause:  # a stranger's files; and a panic of tokenizers is no Exception
        raise NoProcessor(f"does not work ({_in_short(cause)})") from cause


def _in_short(cause: BaseException) -> str:
    """One line, without what could move a terminal's cursor."""
    line = "".join(char for char in str(cause).strip().partition("\n")[0] if char.isprintable())
    return f"{type(cause).__name__}: {line[:200].rstrip('.')}"


def _check_there(folder: Path | None) -> None:
    for names in FILES:
        if folder is None or not any((folder / name).is_file() for name in names):
            raise NoProcessor(f"is not there (no {' or '.join(names)})")
    if absent := missing(*MODULES):
        raise NoProcessor(f"needs {lacking(absent)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers has to say about processors helps nobody here; what fails is told in a note."""
    log = import_module("transformers").utils.logging
    before = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(before)


def _answer(processor: Any, parts: Sequence[Part], dims: Dims) -> Mapping[str, Any]:
    """What the processor makes of a chat of one message, with no limits on sizes but ours."""
    images = [part for part in parts if isinstance(part, Drawing) and not part.frames]
    videos = [part for part in parts if isinstance(part, Drawing) and part.frames]
    content = [_content(part) for part in parts]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    side = dims.patch * dims.spatial_merge
    size = {"size": {"shortest_edge": side**2, "longest_edge": LONGEST * side**2 * dims.temporal_patch}}
    clips = {"video_metadata": [video.metadata(dims) for video in videos], "do_sample_frames": False}
    answer: Mapping[str, Any] = processor(
        text=[text],
        images=[image.draw(dims) for image in images] or None,
        videos=[video.draw(dims) for video in videos] or None,
        images_kwargs=size,
        videos_kwargs=size | clips if videos else {},
        return_tensors="pt",
    )
    return answer


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if part.frames else "image"}


def _named(name: str, answer: Mapping[str, Any], dims: Dims) -> NamedPrompt:
    """Raises ValueError if that is nothing for a model of these sizes."""
    ids = answer["input_ids"]
    pixels = {key: answer[key].float() for key in ("pixel_values", "pixel_values_videos") if key in answer}
    grids = {key: answer[key] for key in ("image_grid_thw", "video_grid_thw") if key in answer}
    prompt = Prompt(ids, torch.ones_like(ids), token_types(ids, dims), **pixels, **grids)
    _check(prompt, dims)
    return NamedPrompt(name, contents_of(prompt), prompt)


def _check(prompt: Prompt, dims: Dims) -> None:
    ids = prompt.input_ids
    if not 0 < ids.shape[1] <= LONGEST:
        raise ValueError(f"{ids.shape[1]} tokens, expected 1 to {LONGEST}")
    if ids.min() < 0 or ids.max() >= dims.vocab:
        raise ValueError(f"token {int(ids.max())}, expected less than vocab_size = {dims.vocab}")
    check_visual_tokens(
        ids,
        image_grid_thw=prompt.image_grid_thw,
        video_grid_thw=prompt.video_grid_thw,
        spatial_merge_size=dims.spatial_merge,
        image_token_id=dims.image_token_id,
        video_token_id=dims.video_token_id,
    )
    for pixels, grid in (
        (prompt.pixel_values, prompt.image_grid_thw),
        (prompt.pixel_values_videos, prompt.video_grid_thw),
    ):
        if pixels is not None and grid is not None:
            _check_pixels(pixels, int(grid.prod(1).sum()), dims)


def _check_pixels(pixels: Tensor, patches: int, dims: Dims) -> None:
    expected = (patches, dims.channels * dims.temporal_patch * dims.patch**2)
    if tuple(pixels.shape) != expected:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}, expected {expected}")
    if not pixels.isfinite().all():
        raise ValueError("pixels that are not finite")
