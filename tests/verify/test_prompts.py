"""The prompts that are verified with: the same everywhere, fit for both models, by the checkpoint's own processor.

The processor's part needs torchvision; it is skipped where that is missing: `make test-newest` has it.
"""

import json
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_model.files import needs
from models.planted import lively_checkpoint
from models.sides import load_theirs, their_logits, transformers_release
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import ConfigError
from qwen3vl_convert.huggingface.config import rebuild_config
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.models.positions import check_visual_tokens, get_rope_index
from qwen3vl_convert.verify.logits.pieces import Image, Row, Text, TokenIds, Video
from qwen3vl_convert.verify.logits.processor import CHATS, LONGEST
from qwen3vl_convert.verify.logits.prompts import (
    NamedPrompt,
    Prompt,
    prompt_of,
    synthetic_prompts,
    verification_prompts,
)

NAMES = ["text", "image", "images", "video", "mixed"]
TINY = SIZES["tiny"]
CONFIG = rebuild_config(TINY)[0]
MISSING = "the checkpoint's own processor is not there (no preprocessor_config.json or processor_config.json)."
OWN, RANDOM = "The checkpoint's own processor made the prompts", "The prompts are random words and pixels: "


def digest(prompt: Prompt) -> str:
    """Of every tensor, its name, type and shape."""
    found = sha256()
    for name, tensor in prompt.inputs().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def digests(prompts: Sequence[NamedPrompt]) -> dict[str, str]:
    return {one.name: digest(one.prompt) for one in prompts}


def check_fits(prompt: Prompt, dims: Dims) -> None:
    """Grids say as many tokens and patches as there are, in whole blocks, and patches have as many values as needed."""
    check_visual_tokens(
        prompt.input_ids,
        image_grid_thw=prompt.image_grid_thw,
        video_grid_thw=prompt.video_grid_thw,
        spatial_merge_size=dims.spatial_merge,
        image_token_id=dims.image_token_id,
        video_token_id=dims.video_token_id,
    )
    for pixels, grid in visual(prompt):
        assert (pixels is None) == (grid is None)
        if pixels is not None and grid is not None:
            values = dims.channels * dims.temporal_patch * dims.patch**2
            assert pixels.shape == (int(grid.prod(1).sum()), values)
            assert pixels.dtype == torch.float32


def visual(prompt: Prompt) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    return [(prompt.pixel_values, prompt.image_grid_thw), (prompt.pixel_values_videos, prompt.video_grid_thw)]


# ---- random words and pixels -----------------------------------------------------------------------------------------


def test_they_are_the_same_everywhere() -> None:
    """On every machine, with every release of torch and numpy; a change of prompts changes this list."""
    assert digests(synthetic_prompts(TINY)) == {
        "text": "9b1fb54bf39c47fc",
        "image": "ba7315edc4c0e524",
        "images": "3f2f994a0451fa33",
        "video": "65f8402af3cbb051",
        "mixed": "b34d1e11b03830f9",
    }
    assert digests(synthetic_prompts(SIZES["8b"])) == {
        "text": "7f574ddec3ddffc5",
        "image": "a508b2c930ffc1cc",
        "images": "b9720f907b624adb",
        "video": "61545ea860b6657b",
        "mixed": "212a81c29907caa1",
    }


@pytest.mark.parametrize("size", SIZES)
def test_they_fit_every_model(size: str) -> None:
    dims = SIZES[size]
    prompts, notes = verification_prompts(rebuild_config(dims)[0])
    assert [one.name for one in prompts] == NAMES
    assert notes == (
        RANDOM + "the checkpoint's own processor is not there (no preprocessor_config.json or processor_config.json).",
    )
    for one in prompts:
        check_fits(one.prompt, dims)
        assert one.prompt.input_ids.shape[0] == 1
        assert one.prompt.attention_mask.all()
        assert 20 <= len(one.kinds) <= 120


def test_odd_sizes_fit_too() -> None:
    dims = replace(TINY, patch=7, temporal_patch=3, channels=1, spatial_merge=3, vocab=700)
    for one in synthetic_prompts(dims):
        check_fits(one.prompt, dims)


def test_kinds_and_contents_say_what_is_in_a_prompt() -> None:
    prompts = {one.name: one for one in synthetic_prompts(TINY)}
    assert prompts["text"].kinds == 96 * "t"
    assert prompts["image"].kinds == 9 * "t" + 35 * "i" + 13 * "t"
    assert prompts["video"].kinds == 6 * "t" + 3 * (12 * "v" + 5 * "t") + 12 * "v" + 8 * "t"
    assert prompts["video"].contents == "6 tokens of text, video of 4 frames of 6x8 patches, 8 tokens of text"
    assert prompts["mixed"].contents == (
        "3 tokens of text, image of 8x4 patches, 5 tokens of text, video of 3 frames of 4x6 patches, "
        "4 tokens of text, image of 2x6 patches, 9 tokens of text"
    )


@pytest.mark.parametrize("size", ["tiny", "8b"])
def test_words_have_no_meaning_of_their_own(size: str) -> None:
    """Below the first special token of the published models, and of a tiny one between two of them."""
    words = set(range(3, 500)) if size == "tiny" else set(range(151643))
    (text,) = [one for one in synthetic_prompts(SIZES[size]) if one.name == "text"]
    found = text.prompt.input_ids.unique().tolist()
    assert set(found) <= words
    assert len(found) > 70, "words that are all the same compare few embeddings"


def test_words_stand_in_the_longest_gap_below_the_vocabulary() -> None:
    special = replace(TINY, vocab=90, bos_token_id=None, eos_token_id=(40, 10), image_token_id=41)
    assert TokenIds.from_dims(special).words == range(42, 90)
    assert TokenIds.from_dims(replace(special, vocab=60)).words == range(11, 40)


def test_positions_are_rich() -> None:
    """Time, height and width part; no two grids are the same, nor square; there is more than one frame."""
    for one in synthetic_prompts(TINY)[1:]:
        prompt = one.prompt
        positions, _ = get_rope_index(
            prompt.input_ids,
            image_grid_thw=prompt.image_grid_thw,
            video_grid_thw=prompt.video_grid_thw,
            spatial_merge_size=TINY.spatial_merge,
            image_token_id=TINY.image_token_id,
            video_token_id=TINY.video_token_id,
        )
        axes = positions[:, 0].tolist()
        assert all(axes[left] != axes[right] for left, right in ((0, 1), (0, 2), (1, 2)))
        rows = [tuple(row) for _, grid in visual(prompt) if grid is not None for row in grid.tolist()]
        assert len(set(rows)) == len(rows)
        assert any(height != width for _, height, width in rows)
        assert all(time > 1 for time, *_ in ([] if prompt.video_grid_thw is None else prompt.video_grid_thw.tolist()))


def test_pixels_are_like_a_processors() -> None:
    """From -1 to 1, all different; another seed gives others, and so do images and videos of one prompt."""
    row: Row = [Image(1, 2, 3), Text(3), Video(1, 2, 3, gap=0)]
    one, other = prompt_of(TINY, [row]), prompt_of(TINY, [row], seed=1)
    for pixels in (one.pixel_values, one.pixel_values_videos, other.pixel_values, other.pixel_values_videos):
        assert pixels is not None
        assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
        assert abs(float(pixels.mean())) < 0.02
        assert abs(float(pixels.std()) - 0.58) < 0.02
        assert len(pixels.unique(dim=0)) == len(pixels)
    assert not torch.equal(one.pixel_values, one.pixel_values_videos)  # type: ignore[arg-type]
    assert not torch.equal(one.pixel_values, other.pixel_values)  # type: ignore[arg-type]
    assert not torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("spelling", ["4.57", "5"])
def test_a_config_may_be_of_either_generation(spelling: str) -> None:
    config = json.loads(json.dumps(CONFIG))
    if spelling == "5":
        text = config["text_config"]
        text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    assert digests(verification_prompts(config)[0]) == digests(synthetic_prompts(TINY))


def test_a_config_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        verification_prompts({**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": -1}})


@pytest.fixture(scope="module")
def their_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    return load_theirs(lively_checkpoint(tmp_path_factory.mktemp("model") / "tiny", TINY))


@pytest.mark.transformers
def test_transformers_takes_them(their_model: Any) -> None:
    for one in synthetic_prompts(TINY):
        check_logits(their_model, one)


def check_logits(model: Any, one: NamedPrompt) -> None:
    with torch.no_grad():
        logits = their_logits(model, one.prompt)
    assert logits.shape == (1, len(one.kinds), TINY.vocab)
    assert logits.isfinite().all()
    assert logits[0].std(dim=-1).min() > 0.1


# ---- the checkpoint's own processor ----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
"""From the tiny models' image_token_id on."""
VISUAL: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def write_processor(folder: Path, special: Sequence[str] = SPECIAL) -> Path:
    """The files of a published folder, for a tokenizer of 500 words: bytes, and what these texts have most of."""
    tokenizer = small_tokenizer(special)
    added = {token["id"]: {"content": token["content"], "special": True} for token in tokenizer["added_tokens"]}
    least, most = {"shortest_edge": 65536, "longest_edge": 16777216}, {"shortest_edge": 4096, "longest_edge": 25165824}
    contents = {
        "tokenizer.json": tokenizer,
        "vocab.json": tokenizer["model"]["vocab"],
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "added_tokens_decoder": added,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {**VISUAL, "size": least, "image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {**VISUAL, "size": most, "video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    merges = (" ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(merges))
    return folder


def small_tokenizer(special: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json: byte pairs, up to the tiny models' first special token."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    bytes_ = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TINY.image_token_id, initial_alphabet=sorted(bytes_.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([part for chat in CHATS.values() for part in chat if isinstance(part, str)], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    assert tokenizer.token_to_id(special[0]) == TINY.image_token_id
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a model whose processor can be used here."""
    needs("transformers", "torchvision")
    return write_processor(tmp_path)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.torchvision
@pytest.mark.transformers
def test_the_processor_makes_them_if_it_can(folder: Path, their_model: Any) -> None:
    prompts, notes = verification_prompts(CONFIG, folder)
    assert len(notes) == 1
    assert notes[0].startswith(OWN)
    assert [one.name for one in prompts] == NAMES
    for one in prompts:
        check_fits(one.prompt, TINY)
        check_logits(their_model, one)
        assert 20 <= len(one.kinds) <= LONGEST


@pytest.mark.torchvision
@pytest.mark.transformers
def test_a_chat_arrives_whole(folder: Path) -> None:
    """Words, in both languages, where they were said, and each picture in its own size."""
    transformers: Any = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = {one.name: one for one in verification_prompts(CONFIG, folder)[0]}
    (said,) = CHATS["text"]
    expected = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts["text"].prompt.input_ids[0]) == expected
    video = tokenizer.decode(prompts["video"].prompt.input_ids[0])
    assert [time in video for time in ("<0.2 seconds>", "<1.2 seconds>", "<2.2 seconds>", "<3.2 seconds>")] == 4 * [
        True
    ]
    assert prompts["images"].prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 6, 6], [1, 2, 10], [1, 12, 4]]  # type: ignore[union-attr]
    assert [kind for kind, _ in groupby(prompts["mixed"].kinds)] == list("titvtvtvtit")


@pytest.mark.torchvision
@pytest.mark.transformers
def test_drawn_pixels_are_the_same_everywhere(folder: Path) -> None:
    """As those of random prompts; nothing is resized, which differs between releases."""
    found = {
        one.name: [
            sha256(pixels.numpy().tobytes()).hexdigest()[:16] for pixels, _ in visual(one.prompt) if pixels is not None
        ]
        for one in verification_prompts(CONFIG, folder)[0]
    }
    assert found == {
        "text": [],
        "image": ["8c5e06799ff43cb7"],
        "images": ["6bbb58a3c17e9005"],
        "video": ["613879b44da2b201"],
        "mixed": ["50feb2612a84d324", "cb8b39f71352fdbc"],
    }


@pytest.mark.torchvision
@pytest.mark.transformers
def test_a_folder_that_transformers_saved_gives_the_same(folder: Path, tmp_path: Path) -> None:
    """Under the names of the release that is installed: processor_config.json from 5 on."""
    transformers: Any = import_module("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again, notes = verification_prompts(CONFIG, tmp_path / "saved")
    assert notes[0].startswith(OWN)
    assert digests(again) == digests(verification_prompts(CONFIG, folder)[0])


@pytest.mark.torchvision
@pytest.mark.transformers
def test_neither_the_network_nor_foreign_code_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        asked.append("the network")
        raise OSError("no network")

    asked: list[str] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (folder / "hostile.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Hostile: ...\n")
    hostile = dict.fromkeys(("AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"), "hostile.Hostile")
    for file in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / file, auto_map={**hostile, "AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]})
    assert verification_prompts(CONFIG, folder)[1][0].startswith((OWN, RANDOM))
    assert not (folder / "ran").exists()
    assert not asked


# ---- and if it cannot ------------------------------------------------------------------------------------------------


def check_random(folder: Path, reason: str) -> None:
    prompts, notes = verification_prompts(CONFIG, folder)
    assert digests(prompts) == digests(synthetic_prompts(TINY))
    (note,) = notes
    assert note.startswith(RANDOM)
    assert reason in note
    assert note.isprintable()


def test_no_processor(tmp_path: Path) -> None:
    check_random(tmp_path, "is not there (no preprocessor_config.json or processor_config.json)")
    (tmp_path / "processor_config.json").write_text("{}")
    check_random(tmp_path, "is not there (no tokenizer.json or vocab.json)")
    check_random(tmp_path / "nothing", "is not there")


def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("processor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    for name in ("PIL", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    check_random(tmp_path, "needs pillow and torchvision, which are not installed: pip install ")


def patch_size(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", patch_size=8)


def other_channels(folder: Path) -> None:
    edit(folder / "video_preprocessor_config.json", temporal_patch_size=1)


def infinite(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", image_std=[0.0, 0.5, 0.5])


def no_template(folder: Path) -> None:
    (folder / "chat_template.json").unlink()


def raising_template(folder: Path) -> None:
    edit(folder / "chat_template.json", chat_template="{{ raise_exception('\x1b[2J no\x07') }}")


def forgetful_template(folder: Path) -> None:
    edit(folder / "chat_template.json", chat_template="{{ messages[0].content[0].text }}")


def long_template(folder: Path) -> None:
    edit(folder / "chat_template.json", chat_template=40 * "many words " + TEMPLATE)


def shifted_tokens(folder: Path) -> None:
    """A tokenizer of a model with other special tokens."""
    write_processor(folder, ["<|one|>", "<|two|>", *SPECIAL])


def unknown_tokens(folder: Path) -> None:
    """A tokenizer of a model with more words: <|im_start|> is beyond this one's 512."""
    write_processor(folder, [*SPECIAL[:4], *(f"<|{number}|>" for number in range(8)), *SPECIAL[4:]])


def panic(folder: Path) -> None:
    """What makes tokenizers raise something that is no Exception: a word shorter than the prefix that it must have."""
    made = json.loads((folder / "tokenizer.json").read_text())
    model = made["model"]
    vocab, merges = {**model["vocab"], "": 499}, [["a", ""], *model["merges"]]
    edit(folder / "tokenizer.json", model={**model, "vocab": vocab, "merges": merges, "continuing_subword_prefix": "x"})
    if transformers_release() >= (5, 0):  # which else makes a tokenizer of its own from the words
        edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")


def no_json(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")


@pytest.mark.torchvision
@pytest.mark.transformers
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (patch_size, "pixels of shape (560, 384), expected (560, 1536)"),
        (other_channels, ""),
        (infinite, "pixels that are not finite"),
        (no_template, "chat template"),
        (raising_template, "(TemplateError: [2J no)"),
        (forgetful_template, ""),
        (long_template, f"tokens, expected 1 to {LONGEST}"),
        (shifted_tokens, "expected 35 image tokens (id 500) in one piece, found 0"),
        (unknown_tokens, "token 513, expected less than vocab_size = 512"),
        (panic, ""),
        (no_json, "preprocessor_config.json' is not a valid JSON file"),
    ],
)
def test_a_processor_that_cannot_be_used(spoil: Callable[[Path], None], reason: str, folder: Path) -> None:
    assert verification_prompts(CONFIG, folder)[1][0].startswith(OWN)
    spoil(folder)
    check_random(folder, reason)
