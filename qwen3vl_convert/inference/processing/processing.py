"""The tokenizer, the template and the eyes of one checkpoint, and prompts made by them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.inference.processing.files import (
    chat_template,
    eos_token_ids,
    has_tokenizer,
    sampling_settings,
)
from qwen3vl_convert.inference.processing.libraries import load_tokenizer, transformers
from qwen3vl_convert.inference.processing.pixels import Eyes, Pixels
from qwen3vl_convert.inference.processing.prompts import (
    Marks,
    Message,
    Prepared,
    Spoken,
    chat_text,
    expanded,
    raw_text,
)

if TYPE_CHECKING:
    from qwen3vl_convert.dims import Dims
    from qwen3vl_convert.inference.engine.requests import Completion, VisualInputs

NO_TEMPLATE = "The checkpoint has no chat template: the prompt goes in as it is."


def open_processing(folder: Path | None, dims: "Dims", checkpoint: str | Path = "") -> "Processing":
    """What makes prompts for a model of these sizes from the files in `folder`. Raises `InputError`'s kinds.

    `checkpoint` is named in the error where there are no such files.
    """
    if folder is None or not has_tokenizer(folder):
        place = checkpoint if folder is None else folder
        raise InputError(
            f"{place}: expected a tokenizer (tokenizer.json, or vocab.json and merges.txt), found none. "
            "Pass --config with the folder or Hub id of the model that it was made from, or --token-ids for a prompt "
            "of numbers."
        )
    return Processing(folder, dims)


class Processing:
    """Prompts for one checkpoint. `tokenizer` is transformers'; `sampling` is what generation_config.json recommends.

    `eos_token_ids`: what ends an answer, as generation_config.json says, or the tokenizer where that says nothing.
    """

    def __init__(self, folder: Path, dims: "Dims") -> None:
        self.folder, self.dims = folder, dims
        self.tokenizer: Any = load_tokenizer(folder)
        self.template = chat_template(folder)
        self.sampling = sampling_settings(folder)
        self.eos_token_ids = eos_token_ids(folder) or self._tokenizer_eos()
        self.eyes = Eyes(folder, dims)

    def prepare(self, messages: Sequence[Message], raw: bool = False, spoken: Spoken | None = None) -> Prepared:
        """The prompt that asks for an answer to `messages`, of which there is one if it is `raw`: without a template.

        `spoken`: what it goes on from, if its text begins so; those tokens are kept, and found in the prefix cache.
        Raises `UsageError` and `InputError`'s kinds.
        """
        raw_because = not raw and self.template is None
        if (raw or raw_because) and len(messages) != 1:
            raise UsageError(f"A chat of {len(messages)} messages needs a template, found none. {self._remedy()}")
        images = [self.eyes.image(source) for one in messages for source in one.images]
        videos = [self.eyes.video(source) for one in messages for source in one.videos]
        if self.template is None or raw:
            text = raw_text(messages[0], self._marks(bool(images or videos)))
        else:
            text = chat_text(self.tokenizer, self.template, messages, str(self.folder))
        text = expanded(text, self._marks(bool(images or videos)), images, videos, self.dims.spatial_merge)
        token_ids = self._token_ids(text, raw or raw_because, spoken)
        return Prepared(token_ids, _visual(images, videos), text, (NO_TEMPLATE,) if raw_because else ())

    def spoken(self, prompt: Prepared, answer: "Completion") -> Spoken | None:
        """Prompt and answer, to go on from; None where the answer has tokens that its text does not show."""
        ended = answer.finish_reason == "stop"
        own = list(answer.token_ids[:-1] if ended else answer.token_ids)
        added = self.tokenizer.added_tokens_decoder
        if any(token in added and added[token].special for token in own):
            return None
        return Spoken(prompt.text + answer.text, prompt.token_ids + own)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without those that are only marks."""
        with transformers(f"{self.folder}: the tokenizer cannot read these tokens"):
            return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _token_ids(self, text: str, special: bool, spoken: Spoken | None) -> list[int]:
        known = spoken if spoken is not None and text.startswith(spoken.text) else Spoken("", [])
        rest = text[len(known.text) :]
        with transformers(f"{self.folder}: the tokenizer cannot read this prompt"):
            found = known.token_ids + [
                int(one) for one in self.tokenizer(rest, add_special_tokens=special)["input_ids"]
            ]
        if not found:
            raise UsageError("The prompt is empty: expected some text.")
        if max(found) >= self.dims.vocab:
            raise InputError(
                f"{self.folder}: the tokenizer makes token {max(found)}, expected less than {self.dims.vocab}, "
                "which is all that the model has. It is another model's: pass --config with this one's files."
            )
        if len(found) >= self.dims.max_positions:
            raise UsageError(
                f"The prompt has {len(found)} tokens, expected fewer than {self.dims.max_positions}, which is the "
                "model's context. Shorten it; in a chat, /reset begins anew."
            )
        return found

    def _marks(self, check: bool) -> Marks:
        """The marks, as the tokenizer writes the model's tokens. With `check`, it must know them as Qwen3-VL's."""
        dims = self.dims
        ids = dims.image_token_id, dims.video_token_id, dims.vision_start_token_id, dims.vision_end_token_id
        names = [self.tokenizer.convert_ids_to_tokens(one) for one in ids]
        expected = Marks("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        if check and Marks(*map(str, names)) != expected:
            raise InputError(
                f"{self.folder}: the model's tokens {', '.join(map(str, ids))} are {', '.join(map(str, names))} to the "
                f"tokenizer, expected {', '.join((expected.image, expected.video, expected.start, expected.end))}. "
                "It is another model's: pass --config with this one's files."
            )
        return expected

    def _tokenizer_eos(self) -> tuple[int, ...]:
        found = getattr(self.tokenizer, "eos_token_id", None)
        return (int(found),) if isinstance(found, int) else ()

    def _remedy(self) -> str:
        return f"Put chat_template.jinja into {self.folder}, or pass --config."


def _visual(images: Sequence[Pixels], videos: Sequence[Pixels]) -> "VisualInputs | None":
    if not images and not videos:
        return None
    import torch

    from qwen3vl_convert.inference.engine.requests import VisualInputs

    def joined(parts: Sequence[Pixels], name: str) -> torch.Tensor | None:
        return torch.cat([getattr(one, name) for one in parts]) if parts else None

    return VisualInputs(
        pixel_values=joined(images, "patches"),
        image_grid_thw=joined(images, "grid"),
        pixel_values_videos=joined(videos, "patches"),
        video_grid_thw=joined(videos, "grid"),
    )
