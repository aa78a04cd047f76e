"""Prompts as the checkpoint's own processor makes them: texts, pictures, videos, from files of either generation.

What needs torchvision or a decoder of videos is skipped where they are missing: `make test-newest` has them.
"""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_model.files import (
    IM_END,
    IMAGE,
    TEMPLATE,
    TINY,
    as_bytes,
    data_url,
    edit,
    ids_of,
    needs,
    picture,
    png,
    write_files,
)
from qwen3vl_convert import hf_to_megatron, installed, make_checkpoint
from qwen3vl_convert.errors import ConfigError, ConvertError, InputError, UsageError
from qwen3vl_convert.inference.processing import (
    Message,
    Prepared,
    Processing,
    find_files,
    libraries,
    media,
    open_processing,
    pixels,
)
from qwen3vl_convert.inference.processing.files import chat_template

pytestmark = pytest.mark.transformers
needs("transformers")

HELLO = Message("user", "Hello, 世界!")
ASKED = "<|im_start|>user\nHello, 世界!<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(params=["hub", "v5"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_files(tmp_path / "files", request.param)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


def prepared(folder: Path, *messages: Message, raw: bool = False) -> Prepared:
    return open_processing(folder, TINY).prepare(messages, raw)


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_a_chat_becomes_the_tokens_that_its_template_says(folder: Path) -> None:
    found = prepared(folder, HELLO)
    assert found.text == ASKED
    assert found.token_ids == ids_of(ASKED)
    assert (found.visual, found.notes) == (None, ())


def test_a_longer_chat_has_all_its_turns(folder: Path) -> None:
    found = prepared(folder, Message("system", "Be kind."), HELLO, Message("assistant", "Hi."), Message("user", "Why?"))
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    answer = "Hi.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert found.text == system + ASKED + answer


def test_raw_is_the_text_and_nothing_else(folder: Path) -> None:
    assert prepared(folder, HELLO, raw=True).token_ids == list("Hello, 世界!".encode())


def test_tokens_become_text_again(folder: Path) -> None:
    processing = open_processing(folder, TINY)
    assert processing.decode([*"世界".encode(), IM_END]) == "世界"


PROGRAM = """
import sys
sys.modules.update(PIL=None, torchvision=None)
from pathlib import Path
from qwen3vl_convert.inference.processing import Message, open_processing
from qwen3vl_convert.make import SIZES
print(open_processing(Path(sys.argv[1]), SIZES["tiny"]).prepare([Message("user", "Hi")]).token_ids)
"""


def test_text_needs_a_tokenizer_only(published: Path) -> None:
    """In a process where pictures cannot be read at all."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(published)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{ids_of(ASKED.replace('Hello, 世界!', 'Hi'))}\n", done.stderr


# ---- templates -------------------------------------------------------------------------------------------------------

OTHER = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", OTHER),
        ("chat_template.json", json.dumps({"chat_template": OTHER})),
        ("tokenizer_config.json", json.dumps({"chat_template": OTHER, "tokenizer_class": "Qwen2Tokenizer"})),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": OTHER}]}
            ),
        ),
        ("tokenizer_config.json", json.dumps({"chat_template": {"default": OTHER, "tool_use": "no"}})),
    ],
)
def test_a_template_is_found_wherever_it_has_been_put(published: Path, name: str, content: str) -> None:
    (published / "chat_template.json").unlink()
    (published / name).write_text(content)
    assert chat_template(published) == OTHER


def test_the_template_of_the_processor_goes_before_that_of_the_tokenizer(published: Path) -> None:
    edit(published / "tokenizer_config.json", chat_template=OTHER)
    assert chat_template(published) == TEMPLATE
    (published / "chat_template.jinja").write_text("jinja")
    assert chat_template(published) == "jinja"


def test_a_template_for_texts_gets_texts(published: Path) -> None:
    """One that joins the content with text fails on a list of parts, and one that looks for parts loses a text."""
    template = "{% for message in messages %}{{ '<' + message.content + '>' }}{% endfor %}"
    edit(published / "chat_template.json", chat_template=template)
    assert prepared(published, HELLO).text == "<Hello, 世界!>"


def test_a_template_that_loses_the_prompt_is_an_error(published: Path) -> None:
    edit(published / "chat_template.json", chat_template="{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(InputError, match="the prompt is not in what the template makes of it.*--raw"):
        prepared(published, HELLO)


@pytest.mark.parametrize(
    "template", ["{{ nothing.at.all }}", "{% for %}", "{{ raise_exception('roles must alternate') }}"]
)
def test_a_broken_template_is_an_error(published: Path, template: str) -> None:
    edit(published / "chat_template.json", chat_template=template)
    with pytest.raises(InputError, match="--raw does without"):
        prepared(published, HELLO)


def test_without_a_template_the_prompt_goes_in_as_it_is_and_that_is_said(published: Path) -> None:
    (published / "chat_template.json").unlink()
    found = prepared(published, HELLO)
    assert found.token_ids == list("Hello, 世界!".encode())
    assert found.notes == ("The checkpoint has no chat template: the prompt goes in as it is.",)
    with pytest.raises(UsageError, match="A chat of 2 messages needs a template, found none"):
        prepared(published, HELLO, HELLO)


# ---- what is wrong with the files ------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def change(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / name, **values)


FAULTS: dict[str, tuple[Callable[[Path], object], type[ConvertError], str]] = {
    "no tokenizer": (
        remove("tokenizer.json", "vocab.json"),
        InputError,
        "expected a tokenizer .*--config .*--token-ids",
    ),
    "a tokenizer of nonsense": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        InputError,
        "cannot make a tokenizer of these files",
    ),
    "template of nonsense": (
        change("chat_template.json", chat_template=7),
        ConfigError,
        "chat_template: expected a text",
    ),
    "eos of nonsense": (
        change("generation_config.json", eos_token_id="x"),
        ConfigError,
        "eos_token_id: expected a token",
    ),
    "eos below zero": (change("generation_config.json", eos_token_id=[2, -1]), ConfigError, "eos_token_id"),
    "top_p of nonsense": (change("generation_config.json", top_p="all"), ConfigError, "top_p: expected a number"),
    "no JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        ConfigError,
        "expected a JSON object",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_errors(published: Path, fault: str) -> None:
    damage, error, says = FAULTS[fault]
    damage(published)
    with pytest.raises(error, match=says) as caught:
        prepared(published, HELLO)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_an_error(published: Path) -> None:
    small = replace(TINY, vocab=300)
    with pytest.raises(InputError, match=f"makes token {IM_END}, expected less than 300.*another model's"):
        open_processing(published, small).prepare([HELLO])


def test_no_folder_at_all_is_an_error_that_names_the_checkpoint() -> None:
    with pytest.raises(InputError, match="^runs/sft: expected a tokenizer") as caught:
        open_processing(None, TINY, "runs/sft")
    assert caught.value.exit_code == 3


def test_an_empty_prompt_is_an_error(published: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        prepared(published, Message("user", ""), raw=True)


@pytest.mark.parametrize(
    ("saved", "found"), [({"eos_token_id": [7, 8]}, (7, 8)), ({"eos_token_id": 9}, (9,)), ({}, (IM_END,))]
)
def test_what_ends_an_answer(published: Path, saved: dict[str, Any], found: tuple[int, ...]) -> None:
    """The last: nothing says so but the tokenizer."""
    (published / "generation_config.json").write_text(json.dumps(saved))
    assert open_processing(published, TINY).eos_token_ids == found


def test_what_the_makers_recommend_for_sampling(published: Path) -> None:
    edit(published / "generation_config.json", top_k=20, repetition_penalty=1)
    assert open_processing(published, TINY).sampling == {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0}


# ---- where the files are ---------------------------------------------------------------------------------------------


def test_files_are_found_beside_either_format_or_where_config_says(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "bare", "tiny")
    make_checkpoint(tmp_path / "model", "tiny")
    write_files(tmp_path / "model")
    for name in ("bare", "model"):
        hf_to_megatron(tmp_path / name, tmp_path / f"{name}_run")
    assert find_files(tmp_path / "model") == tmp_path / "model"
    beside = find_files(tmp_path / "model_run")
    assert beside == tmp_path / "model_run" / "iter_0000000" / "hf"
    assert prepared(beside, HELLO).text == ASKED
    assert find_files(tmp_path / "model_run" / "iter_0000000") == beside
    assert find_files(tmp_path / "model_run", iteration=0) == beside
    assert find_files(tmp_path / "bare_run") is None
    assert find_files(tmp_path / "bare_run", str(tmp_path / "model")) == tmp_path / "model"
    with pytest.raises(InputError, match="no such folder"):
        find_files(tmp_path / "nowhere")


# ---- pictures --------------------------------------------------------------------------------------------------------


def visual(found: Prepared) -> Any:
    assert found.visual is not None
    return found.visual


def test_a_picture_takes_as_many_tokens_as_it_has_patches(folder: Path, tmp_path: Path) -> None:
    found = prepared(folder, Message("user", "What?", (png(tmp_path / "a.png", 96, 64),)))
    marks = "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>"
    assert found.text == f"<|im_start|>user\n{marks}What?<|im_end|>\n<|im_start|>assistant\n"
    assert found.token_ids == ids_of(found.text)
    assert visual(found).image_grid_thw.tolist() == [[1, 4, 6]]
    assert visual(found).pixel_values.shape == (24, 3 * 2 * 16 * 16)
    assert visual(found).pixel_values_videos is None


def test_pixels_are_those_of_the_picture(published: Path, tmp_path: Path) -> None:
    """Nothing to resize: a patch, by hand. Two rows and columns of patches lie together, which later are one token."""
    import numpy as np

    found = visual(prepared(published, Message("user", "?", (png(tmp_path / "a.png", 96, 64),))))
    image = torch.from_numpy(np.array(picture(96, 64))).permute(2, 0, 1) / 255 * 2 - 1
    patch = image[:, 16:32, 32:48].unsqueeze(1).expand(3, 2, 16, 16)  # row 1, column 2: the third of the second block
    assert torch.allclose(found.pixel_values[4 + 2], patch.reshape(-1), atol=1e-6)


def test_several_pictures_keep_their_order_over_turns(published: Path, tmp_path: Path) -> None:
    one, two, three = (png(tmp_path / f"{n}.png", 64 + 32 * n, 64, n) for n in range(3))
    turns = Message("user", "A", (one, two)), Message("assistant", "B"), Message("user", "C", (three, one))
    found = prepared(published, *turns)
    assert visual(found).image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 8], [1, 4, 4]]
    counts = [len(part) for part in re.findall(r"(?:<\|image_pad\|>)+", found.text)]
    assert counts == [len("<|image_pad|>") * n for n in (4, 6, 8, 4)]
    assert torch.equal(visual(found).pixel_values[:16], visual(found).pixel_values[-16:])


def test_a_data_url_is_the_file(published: Path, tmp_path: Path) -> None:
    path = png(tmp_path / "a.png")
    quoted = "data:image/png," + "".join(f"%{byte:02x}" for byte in path.read_bytes())
    spelled = data_url(path).replace("+", "%2B").replace("base64,", "base64,\n")
    found = [prepared(published, Message("user", "?", (source,))) for source in (path, data_url(path), quoted, spelled)]
    for other in found[1:]:
        assert other.token_ids == found[0].token_ids
        assert torch.equal(visual(other).pixel_values, visual(found[0]).pixel_values)


def test_pictures_are_upright_and_in_colour(published: Path, tmp_path: Path) -> None:
    """A camera's photograph lies on its side and says so; a palette and transparency become colours."""
    image = picture(96, 64)
    exif = import_module("PIL.Image").Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(as_bytes(image, "JPEG", exif=exif, quality=95))
    assert visual(prepared(published, Message("user", "?", (tmp_path / "turned.jpg",)))).image_grid_thw.tolist() == [
        [1, 6, 4]
    ]
    for mode in ("P", "L", "RGBA", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
        assert media.load_image(tmp_path / f"{mode}.png").mode == "RGB"


def test_sizes_are_those_of_the_settings(folder: Path, tmp_path: Path) -> None:
    """At least 4096 pixels and at most 262144, in multiples of 32, with and without torchvision."""
    grids = []
    for width, height in ((20, 30), (100, 100), (1500, 1000)):
        path = png(tmp_path / f"{width}.png", width, height)
        grids.append(visual(prepared(folder, Message("user", "?", (path,)))).image_grid_thw[0].tolist())
    assert grids == [[1, 6, 4], [1, 6, 6], [1, 26, 38]]


@pytest.mark.torchvision
def test_the_variant_on_pillow_makes_the_same_but_for_rounding(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("torchvision")
    path = png(tmp_path / "a.png", 300, 200)
    best = visual(prepared(published, Message("user", "?", (path,))))
    monkeypatch.setattr(pixels, "is_installed", lambda module: module != "torchvision")
    other = visual(prepared(published, Message("user", "?", (path,))))
    assert other.image_grid_thw.tolist() == best.image_grid_thw.tolist()
    assert float((other.pixel_values - best.pixel_values).abs().max()) <= 3 * 2 / 255


def test_places_of_pictures_may_be_said_in_a_raw_prompt(published: Path, tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 64, 64)
    mark, marks = "<|image_pad|>", 4 * "<|image_pad|>"
    assert (
        prepared(published, Message("user", "x", (path,)), raw=True).text == f"<|vision_start|>{marks}<|vision_end|>x"
    )
    said = f"a{mark}b{mark}c"
    assert prepared(published, Message("user", said, (path, path)), raw=True).text == f"a{marks}b{marks}c"
    with pytest.raises(UsageError, match=r"has places for 2 pictures \(<\|image_pad\|>\), and 1 are given"):
        prepared(published, Message("user", said, (path,)), raw=True)
    with pytest.raises(UsageError, match="has places for 1 pictures .* and 0 are given"):
        prepared(published, Message("user", f"What does {mark} mean?"))


def test_settings_that_are_missing_or_of_another_model_are_errors(published: Path, tmp_path: Path) -> None:
    message = Message("user", "?", (png(tmp_path / "a.png"),))
    edit(published / "preprocessor_config.json", patch_size=14)
    with pytest.raises(InputError, match="makes patches of 1176 values, expected 1536"):
        prepared(published, message)
    edit(published / "preprocessor_config.json", patch_size=16, size={"shortest_edge": "few", "longest_edge": 3})
    with pytest.raises(InputError, match="expected the least and the most pixels"):
        prepared(published, message)
    (published / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="expected preprocessor_config.json or image_processor in processor_config"):
        prepared(published, message)


def test_a_tokenizer_without_marks_takes_no_pictures(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files", special=("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|im_start|>", "<|im_end|>"))
    assert prepared(folder, HELLO).text == ASKED
    with pytest.raises(InputError, match=r"tokens 500, 501, 502, 503 are <\|a\|>, .* expected <\|image_pad\|>"):
        prepared(folder, Message("user", "?", (png(tmp_path / "a.png"),)))


BAD_SOURCES: dict[str, tuple[str, type[ConvertError], str]] = {
    "an address": ("https://example.org/a.png", UsageError, "Nothing is fetched from a network: download it first"),
    "another address": ("file:///etc/passwd", UsageError, "expected a file, found an address"),
    "nothing": ("nowhere.png", InputError, "nowhere.png: expected a file, found nothing"),
    "a folder": ("/", InputError, "expected a file, found a folder"),
    "no comma": ("data:image/png;base64", UsageError, "found no comma"),
    "no base64": ("data:image/png;base64,???", InputError, "expected base64 after the comma"),
}


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_what_is_no_picture_file(source: str) -> None:
    """Told before anything is asked of pillow."""
    text, error, says = BAD_SOURCES[source]
    with pytest.raises(error, match=says):
        media.load_image(text)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"])
def test_bytes_that_are_no_picture_are_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content + b"some more, so that the address gets long").decode()
    for source in (tmp_path / "a.png", url):
        with pytest.raises(InputError, match="expected a picture that pillow can read") as caught:
            media.load_image(source)
        assert len(str(caught.value)) < 400


def test_a_cut_off_picture_is_an_error(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 200, 200)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="expected a picture that pillow can read"):
        media.load_image(path)


@pytest.mark.parametrize(
    ("kind", "missing", "says"),
    [
        ("image", {"PIL"}, "needs pillow, which is not installed: pip install "),
        ("video", {"PIL", "torchvision"}, "needs pillow and torchvision, which are not installed: pip install "),
        ("video", {"torchvision"}, "needs torchvision, which is not installed: pip install "),
    ],
)
def test_what_is_not_installed_is_named(
    published: Path, monkeypatch: pytest.MonkeyPatch, kind: str, missing: set[str], says: str
) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda module: module not in missing)
    path = published / "merges.txt"
    message = Message("user", "?", images=(path,)) if kind == "image" else Message("user", "?", videos=(path,))
    with pytest.raises(UsageError, match=says):
        prepared(published, message)


# ---- videos ----------------------------------------------------------------------------------------------------------


def film(path: Path, frames: int = 20, rate: int = 10) -> Path:
    """128 x 96, a square that moves."""
    av: Any = import_module("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(128, 96, number))
            for packet in (*stream.encode(frame), *(stream.encode() if number == frames - 1 else ())):
                container.mux(packet)
    return path


@pytest.mark.torchvision
def test_a_video_has_a_time_before_each_frame(folder: Path, tmp_path: Path) -> None:
    """Two frames a second, at least four, two of which make a step: 0, 6, 13 and 19 tenths of a second."""
    needs("torchvision", "av")
    found = prepared(folder, Message("user", "?", videos=(film(tmp_path / "a.mp4"),)))
    frame = "<|vision_start|>" + 12 * "<|video_pad|>" + "<|vision_end|>"
    assert found.text == (
        f"<|im_start|>user\n<0.3 seconds>{frame}<1.6 seconds>{frame}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.token_ids == ids_of(found.text)
    assert visual(found).video_grid_thw.tolist() == [[2, 6, 8]]
    assert visual(found).pixel_values_videos.shape == (96, 1536)
    assert visual(found).pixel_values is None


@pytest.mark.parametrize(
    ("frames", "fps", "seconds"),
    [
        ([0, 12, 24, 36], 24, (0.25, 1.25)),
        ([0, 12, 24], 24, (0.25, 1.0)),
        ([0, 30, 60, 90, 120], 30, (0.5, 2.5, 4.0)),
    ],
)
def test_times_are_the_published_ones(frames: list[int], fps: float, seconds: tuple[float, ...]) -> None:
    assert pixels.timestamps(frames, fps, 2) == seconds


@pytest.mark.torchvision
def test_a_video_that_is_none_is_an_error(published: Path, tmp_path: Path) -> None:
    needs("torchvision", "av")
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(InputError, match=r"a.mp4: expected a video that \w+ can decode, found none"):
        prepared(published, Message("user", "?", videos=(tmp_path / "a.mp4",)))
    with pytest.raises(UsageError, match="Nothing is fetched"):
        prepared(published, Message("user", "?", videos=("https://example.org/a.mp4",)))


def test_without_a_decoder_it_says_what_to_install(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    for module in media.DECODERS:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"a.mp4 needs a decoder: pip install .* \(or one of torchcodec, "):
        media.load_video(tmp_path / "a.mp4", lambda metadata, **_: [0])


# ---- transformers' own processor -------------------------------------------------------------------------------------


FRAMES = r"(?:<[\d.]+ seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>)+"
AROUND = rf"<\|vision_start\|>({FRAMES})<\|vision_end\|>"


@pytest.mark.torchvision
def test_prompts_are_those_of_transformers_processor(published: Path, tmp_path: Path) -> None:
    """Tokens and pixels of a chat with everything, by Qwen3VLProcessor with the same settings.

    5.23 leaves the marks around all of a video in place, which 4.57, and with it the training, replaced: not followed.
    """
    needs("torchvision", "av")
    transformers: Any = import_module("transformers")
    one, two, clip = png(tmp_path / "a.png", 300, 200), png(tmp_path / "b.png", 70, 90), film(tmp_path / "a.mp4", 33)
    chat = Message("user", "See: ", (one,), (clip,)), Message("assistant", "Yes."), Message("user", "And 这个?", (two,))
    with libraries.transformers("the test"):
        theirs = transformers.Qwen3VLProcessor.from_pretrained(published)
        text = theirs.apply_chat_template(
            [{"role": turn.role, "content": turn.content()} for turn in chat],
            tokenize=False,
            add_generation_prompt=True,
        )
        frames, metadata = media.load_video(clip, lambda metadata, **_: theirs.video_processor.sample_frames(metadata))
        expected = theirs(
            text=[text],
            images=[media.load_image(one), media.load_image(two)],
            videos=[frames],
            videos_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
            return_tensors="pt",
        )
    found = prepared(published, *chat)
    said = theirs.tokenizer.decode(expected["input_ids"][0].tolist())
    assert found.token_ids == ids_of(re.sub(AROUND, r"\1", said))
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(visual(found), name), expected[name]), name


def test_processing_is_made_of_what_is_documented(published: Path) -> None:
    found = open_processing(published, TINY)
    assert isinstance(found, Processing)
    assert found.folder == published
    assert found.template == TEMPLATE
    assert IMAGE["patch_size"] == TINY.patch


# ---- going on from an answer -----------------------------------------------------------------------------------------


def completion(*token_ids: int, text: str, ended: bool = False) -> Any:
    from qwen3vl_convert.inference.engine.requests import Completion

    reason: Any = "stop" if ended else "length"
    return Completion(tuple(token_ids), text, reason, 0, 0, None, 1.0, 0.5)


@pytest.mark.parametrize("ended", [False, True])
def test_the_models_own_tokens_are_kept(published: Path, ended: bool) -> None:
    """Of the letters that a filler's token stands for, the tokenizer would make as many tokens."""
    processing = open_processing(published, TINY)
    asked = processing.prepare([HELLO])
    answer = completion(300, 301, *([IM_END] if ended else []), text="filler300filler301", ended=ended)
    turns = [HELLO, Message("assistant", answer.text), Message("user", "Why?")]
    found = processing.prepare(turns, spoken=processing.spoken(asked, answer))
    rest = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert found.token_ids == [*asked.token_ids, 300, 301, *ids_of(rest)]
    assert found.text == ASKED + answer.text + rest


def test_they_are_not_where_the_text_says_otherwise(published: Path) -> None:
    """An answer with marks that its text does not show; a template that leaves out what was thought aloud."""
    processing = open_processing(published, TINY)
    asked = processing.prepare([HELLO])
    assert processing.spoken(asked, completion(300, TINY.image_token_id, 301, text="filler300filler301")) is None
    spoken = processing.spoken(asked, completion(300, 301, text="filler300filler301"))
    turns = [HELLO, Message("assistant", "filler301"), Message("user", "Why?")]
    assert processing.prepare(turns, spoken=spoken).token_ids == processing.prepare(turns).token_ids
