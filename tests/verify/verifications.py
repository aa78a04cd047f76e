"""Verifications as real runs have them, without running a model: random, and the same every time."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from qwen3vl_convert.verify.result import (
    Difference,
    LogitsReport,
    Place,
    PointResult,
    PromptResult,
    Side,
    Verification,
    WeightsReport,
)

VERSIONS = {"qwen3vl-convert": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0"}
SIDES = (
    Side("/data/Qwen3-VL-2B-Instruct", "huggingface; names: hub", "", "bfloat16"),
    Side(
        "/runs/qwen3-vl/iter_0000100", "megatron torch_dist; keys: stacked, common.pt", "TP2 PP1 EP4 ETP1", "bfloat16"
    ),
)
KINDS = {
    "text": "t" * 23,
    "one image": "t" * 5 + "i" * 24 + "t" * 9,
    "several images": "ttt" + "i" * 30 + "ttt" + "i" * 12 + "t" * 6 + "i" * 48 + "t" * 7,
    "video": "t" * 4 + ("v" * 20 + "tttt") * 4 + "t" * 8,
    "mixed": "t" * 12 + "i" * 35 + "ttt" + ("v" * 12 + "ttt") * 3 + "t" * 20 + "i" * 16 + "t" * 9,
}
TEXT = ("self_attention.linear_qkv", "self_attention", "pre_mlp_layernorm", "mlp.router", "mlp")
VISION = ("self_attention.linear_qkv", "self_attention", "mlp.linear_fc1", "mlp")


def weights(*differences: Difference, **changes: object) -> WeightsReport:
    ulps = (0,) * 7 if not differences else (41_822, 9_310, 5_204, 18_733, 902_114, 3_801_447, 22_106)
    report = WeightsReport(
        tensors=383,
        elements=1_020_140_032,
        differences=differences,
        settings={},
        ulps=ulps,
        tolerated="",
        notes=(),
        seconds=4.31,
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def difference(layer: int, name: str = "self_attn.k_proj.weight", guess: str = "", **changes: object) -> Difference:
    made = Difference(
        name=f"model.language_model.layers.{layer}.{name}",
        megatron_name=f"language_model.decoder.layers.{layer}.self_attention.linear_qkv.weight",
        shape=(1024, 2048),
        count=2_097_024,
        first=(0, 1),
        max_abs=0.1816,
        max_ulp=33_412,
        cosine=0.0021,
        guess=guess,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def prompt(name: str, size: float, allowed: float, kinds: str = "", seed: int = 0) -> PromptResult:
    """`size` is that of the difference; a NaN one has NaN in every third token."""
    chance = random.Random(f"{name} {seed}")
    kinds = kinds or KINDS[name]
    clean = 1e-5 if math.isnan(size) else size
    kl = [clean**2 * chance.lognormvariate(-2, 1.6) for _ in kinds]
    if math.isnan(size):
        kl = [math.nan if number % 3 == 2 else value for number, value in enumerate(kl)]
    agreed = 1.0 if size <= allowed else 0.43
    return PromptResult(
        name=name,
        contents=f"<|im_start|>user\n{len(kinds)} tokens: {name}, made of seed {seed}<|im_end|>",
        kinds=kinds,
        max_abs=size,
        mean_abs=size / 9,
        allowed=allowed,
        own_errors=(allowed / 4.4, allowed / 4),
        kl=tuple(kl),
        top1=agreed,
        top5=agreed,
    )


def points(text_layers: int = 28, vision_layers: int = 24, wrong: int | None = None) -> tuple[PointResult, ...]:
    """Every point of both towers; from text layer `wrong` on, they differ."""
    chance = random.Random(7)
    return tuple(
        PointResult(module, hf_module, side, tower, layer, *_values(chance, tower, layer, wrong, number))
        for number, (module, hf_module, side, tower, layer) in enumerate(_modules(text_layers, vision_layers))
    )


def _values(
    chance: random.Random, tower: str, layer: int | None, wrong: int | None, number: int
) -> tuple[float, float]:
    allowed = 2.2e-6 * (1 + number / 90) * chance.uniform(0.8, 1.25)
    good = allowed * chance.lognormvariate(-1.9, 0.35)
    off = tower == "text" and wrong is not None and layer is not None and layer >= wrong
    return (
        min(0.9, 0.05 * (layer - wrong + 1)) * chance.uniform(0.6, 1.4)
        if off and layer is not None and wrong is not None
        else good
    ), allowed


def _modules(text_layers: int, vision_layers: int) -> Iterator[tuple[str, str, str, str, int | None]]:
    yield "vision_model.patch_embed", "model.visual.patch_embed", "output", "vision", None
    for layer in range(vision_layers):
        for name in VISION:
            for side in ("input", "output"):
                yield (
                    f"vision_model.decoder.layers.{layer}.{name}",
                    f"model.visual.blocks.{layer}.{name}",
                    side,
                    "vision",
                    layer,
                )
        if layer in (5, 11, 17):
            merger = f"deepstack_merger_list.{layer // 6}"
            yield f"vision_model.decoder.{merger}", f"model.visual.{merger}", "output", "vision", None
    yield "vision_model.merger", "model.visual.merger", "output", "vision", None
    yield "language_model.embedding", "model.language_model.embed_tokens", "output", "text", None
    for layer in range(text_layers):
        for name in TEXT:
            for side in ("input", "output"):
                ours, theirs = (
                    f"language_model.decoder.layers.{layer}.{name}",
                    f"model.language_model.layers.{layer}.{name}",
                )
                yield ours, theirs, side, "text", layer
    yield "language_model.decoder.final_layernorm", "model.language_model.norm", "output", "text", None
    yield "language_model.output_layer", "lm_head", "output", "text", None


def logits(prompts: tuple[PromptResult, ...], all_points: tuple[PointResult, ...], **changes: object) -> LogitsReport:
    report = LogitsReport(
        programs=("transformers 5.23.0", "Qwen3VLModel on megatron-core 0.16.1"),
        device="cuda (NVIDIA H100 80GB HBM3)",
        dtype="fp32",
        reference="fp64",
        multiple=4.0,
        mode="stream",
        prompts=prompts,
        points=all_points,
        place=None,
        notes=("No processor in the folder: the pixels are synthetic.",),
        seconds=38.2,
        peak_bytes=5_214_000_000,
        deepstack=(5, 11, 17),
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def verification(
    found: WeightsReport, computed: LogitsReport | None = None, model: str = "qwen3_vl, 2b"
) -> Verification:
    paths = ("/data/Qwen3-VL-2B-Instruct", "/runs/qwen3-vl/iter_0000100")
    return Verification(*paths, model, found, computed, VERSIONS, SIDES)


def passing() -> Verification:
    prompts = tuple(prompt(name, 3e-5, 2.1e-4) for name in KINDS)
    return verification(weights(), logits(prompts, points()))


def failing() -> Verification:
    """Text layer 7 is wrong; one prompt ends in NaN."""
    guess = "k heads in another order: group 3 holds what belongs to group 5"
    one = difference(7, guess=guess)
    two = difference(7, "self_attn.v_proj.weight", "transposed", cosine=0.1, max_abs=math.inf)
    flipped = difference(
        12, "self_attn.o_proj.weight", count=1, first=(17, 1023), max_abs=0.0625, max_ulp=128, cosine=1 - 3e-9
    )
    sizes = {"text": 3.1, "one image": 2.2, "several images": 4e-5, "video": 0.9, "mixed": math.nan}
    prompts = tuple(prompt(name, size, 2.1e-4) for name, size in sizes.items())
    every = points(wrong=7)
    first = next(one for one in every if not one.passed)
    place = Place(
        first, "Text layer 7, self_attention.linear_qkv: the k heads of group 3 differ.", (one.name, two.name)
    )
    found = weights(two, flipped, one, settings={"rope_theta": (5000000, 500000)})
    return verification(found, logits(prompts, every, place=place), "qwen3_vl_moe, 30b-a3b")


def equal_weights() -> Verification:
    return verification(weights(notes=("The manifest of the conversion was not found.",)))


def different_weights() -> Verification:
    guesses = ("gate and up swapped", "another expert's weights: those of expert 5", "rounded to bf16", "")
    found = [
        difference(number, "mlp.gate_proj.weight", guesses[number % 4], cosine=number / 30) for number in range(26)
    ]
    return verification(weights(*found, replace(difference(3, "mlp.up_proj.weight"), dtypes=("float32", "bfloat16"))))


def huge() -> Verification:
    """235B-like: 94 layers, 1,500 tokens, 700 tensors."""
    kinds = ("t" * 20 + "i" * 256 + "t" * 24) * 1
    prompts = tuple(prompt(f"prompt {number}", 0.4, 2e-3, kinds, number) for number in range(5))
    found = weights(
        *[difference(layer, f"mlp.experts.{name}") for layer in range(94) for name in range(8)][:700], tensors=1_210
    )
    every = points(94, 27, wrong=40)
    first = next(one for one in every if not one.passed)
    return verification(found, logits(prompts, every, place=Place(first, "Text layer 40.")), "qwen3_vl_moe, 235b-a22b")


def odd() -> Verification:
    """What no picture expects: zeros, NaN and infinities everywhere, names that are markup, no tokens."""
    values = [
        (0.0, 1e-6),
        (math.nan, 1e-6),
        (math.inf, 1e-6),
        (1e-7, math.nan),
        (1e-300, 0.0),
        (0.3, math.inf),
        (0.0, 0.0),
    ]
    modules = list(_modules(2, 2))
    every = tuple(PointResult(*one, *values[number % len(values)]) for number, one in enumerate(modules))
    first = next(one for one in every if not one.passed)
    empty = replace(
        prompt("text", 0.0, 0.0), kinds="", kl=(), name="<script>alert(1)</script>", contents="\x1b[31m\u202e&"
    )
    wild = replace(prompt("video", math.inf, 1e-4), kl=(math.inf, math.nan, 0.0, -1e-12, 1e-300, 7.0), kinds="tiv")
    bad = difference(1, cosine=math.nan, max_abs=math.nan, shape=(), count=1, first=(), guess="<b>bold</b>")
    computed = logits((empty, wild), every, place=Place(first, "<i>here</i>", ("<u>",)), mode="new", peak_bytes=0)
    found = weights(bad, settings={"<s>": ("<a href='https://x.invalid'>", None)})
    return replace(verification(found, computed), huggingface="/<script src=//x.invalid>", megatron="/a\udcff\x00b")


SAMPLES: dict[str, Callable[[], Verification]] = {
    made.__name__: made for made in (passing, failing, equal_weights, different_weights, huge, odd)
}
