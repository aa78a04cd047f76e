"""Random models in random layouts: what Megatron's side holds is what the hand-written oracle says, and it all comes
back.

The weights are random bits: every NaN payload, infinity and negative zero there is.
"""

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3vl_convert import ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint, megatron_to_hf
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.fill import FillOptions
from qwen3vl_convert.huggingface.safetensors import read_header
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify import verify
from reference import assert_same_bits, expected_megatron, load_huggingface, load_megatron

RUN = RunOptions(fsync=False, fill=FillOptions(workers=2, max_memory=2 << 20))
"""Small pieces, so that even tiny tensors are cut into several."""


@dataclass(frozen=True)
class Case:
    """A model, the two layouts that it passes through, and how its experts lie."""

    dims: Dims
    first: ParallelLayout
    second: ParallelLayout
    experts_layout: str
    padded_vocab: int | None
    dtype: str


def divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, 9) if all(number % n == 0 for number in numbers)]


@st.composite
def dims(draw: st.DrawFn, moe: bool) -> Dims:
    kv, g, d = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    hidden = draw(st.sampled_from([8, 12, 14, 24]))
    square = draw(st.sampled_from([None, hidden, hidden // 2]))
    expert_ffn = square or draw(st.integers(1, 9))
    experts: dict[str, Any] = {"experts": draw(st.sampled_from([2, 3, 4, 6])), "expert_ffn": expert_ffn, "top_k": 1}
    depth, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    return replace(
        SIZES["tiny"],
        model_type="qwen3_vl_moe" if moe else "qwen3_vl",
        layers=draw(st.integers(1, 4)),
        hidden=hidden,
        kv_heads=kv,
        heads=kv * g,
        head_dim=d,
        ffn=draw(st.sampled_from([4, 7, 12, 16])),
        vocab=draw(st.sampled_from([33, 40, 64])),
        tied=draw(st.booleans()) and not moe,
        vision_depth=depth,
        vision_heads=heads,
        vision_hidden=heads * draw(st.sampled_from([3, 4])),
        vision_ffn=draw(st.sampled_from([8, 12])),
        vision_out=hidden,
        position_embeddings=9,
        patch=2,
        deepstack=tuple(range(draw(st.integers(0, depth)))),
        **(experts if moe else {}),
    )


@st.composite
def layouts(draw: st.DrawFn, of: Dims, vocab: int) -> ParallelLayout:
    """A layout that the model divides into."""
    tps = divisors(of.heads, of.vision_heads, of.vision_ffn, vocab, *([] if of.moe else [of.ffn]))
    tp = draw(st.sampled_from([n for n in tps if n % of.kv_heads == 0 or of.kv_heads % n == 0]))
    pp = draw(st.sampled_from(divisors(of.layers)))
    vpp = draw(st.sampled_from([None, *divisors(of.layers // pp)])) if pp > 1 else None
    ep, etp = (draw(st.sampled_from(divisors(n))) for n in (of.experts, of.expert_ffn)) if of.moe else (1, 1)
    return ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp)


@st.composite
def cases(draw: st.DrawFn, moe: bool) -> Case:
    model = draw(dims(moe))
    padded = draw(st.sampled_from([None, model.vocab + 1, 64 * 2]))
    expert_layouts = ["hub", "v5", "per-expert", "scrambled"] if moe else ["hub"]
    rows = padded or model.vocab
    return Case(
        model,
        draw(layouts(model, rows)),
        draw(layouts(model, rows)),
        draw(st.sampled_from(expert_layouts)),
        padded,
        draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )


def randomise(folder: Path, seed: int) -> None:
    """Overwrite the data of every tensor with random bits."""
    generator = random.Random(seed)
    for path in folder.glob("*.safetensors"):
        start = min(entry.start for entry in read_header(path).tensors.values())
        data = bytearray(path.read_bytes())
        data[start:] = generator.randbytes(len(data) - start)
        path.write_bytes(data)


def check(case: Case, work: Path) -> None:
    make_checkpoint(work / "hf", case.dims, experts_layout=case.experts_layout, dtype=case.dtype)
    randomise(work / "hf", seed=len(str(case)))
    padding = {"padded_vocab_size": case.padded_vocab}
    # a square expert is scrambled or per-expert by its shape alone, so the folder is read as what it was made as
    reading = {"experts_layout": case.experts_layout if case.dims.moe else "auto"}
    hf_to_megatron(work / "hf", work / "a", layout=case.first, run=RUN, **padding, **reading)  # type: ignore[arg-type]
    megatron_to_hf(work / "a", work / "hub", run=RUN)
    original = load_huggingface(work / "hub")
    assert_same_bits(load_megatron(work / "a"), expected_megatron(original, case.dims, case.padded_vocab))
    if case.experts_layout == "hub":
        assert_same_bits(original, load_huggingface(work / "hf"))
    hf_to_megatron(work / "hub", work / "b", layout=case.second, run=RUN, **padding)  # type: ignore[arg-type]
    assert_same_bits(load_megatron(work / "b"), load_megatron(work / "a"))
    if case.experts_layout in ("v5", "per-expert"):
        megatron_to_hf(work / "b", work / "back", experts_layout=case.experts_layout, run=RUN)
        assert_same_bits(load_huggingface(work / "back"), load_huggingface(work / "hf"))
    assert verify(work / "hub", work / "b").equal


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_any_model_in_any_layout(moe: bool) -> None:
    """Hugging Face to Megatron (A) to Hugging Face to Megatron (B) and back, every bit."""

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(moe))
    def holds(case: Case) -> None:
        with tempfile.TemporaryDirectory() as work:
            check(case, Path(work))

    holds()
