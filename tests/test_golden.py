"""Checkpoints that Megatron-Bridge wrote, both directions: the same tensors, chunks, files and bytes as ours."""

import json
from pathlib import Path

import pytest

from qwen3vl_convert import ParallelLayout, RunOptions, hf_to_megatron, megatron_to_hf
from qwen3vl_convert.huggingface.safetensors import read_header
from qwen3vl_convert.megatron.checkpoint import MegatronCheckpoint, read_megatron
from qwen3vl_convert.megatron.metadata import read_metadata
from qwen3vl_convert.storage import DTYPES
from qwen3vl_convert.verify import verify

CASES = {
    "dense_tp1pp1": ("dense", ParallelLayout()),
    "dense_tp2pp1": ("dense", ParallelLayout(tp=2)),
    "dense_tp1pp2": ("dense", ParallelLayout(pp=2, first_stage_layers=3)),
    "dense_tied_tp1pp1": ("dense-tied", ParallelLayout()),
    "moe_tp1pp1": ("moe", ParallelLayout()),
    "moe_tp1pp1ep2": ("moe", ParallelLayout(ep=2)),
    "moe_tp2pp1ep1etp2": ("moe", ParallelLayout(tp=2, etp=2)),
}
RUN = RunOptions(fsync=False)


def chunks(checkpoint: MegatronCheckpoint) -> dict[tuple[str, tuple[int, ...]], tuple[object, ...]]:
    """Everything about every chunk that does not depend on where its blob begins: shape, dtype, box, file, data."""
    found: dict[tuple[str, tuple[int, ...]], tuple[object, ...]] = {}
    for key, tensor in checkpoint.tensors.items():
        for chunk in tensor.chunks:
            nbytes = chunk.numel * DTYPES[tensor.dtype].itemsize
            data = chunk.file.read_bytes()[chunk.start : chunk.start + nbytes]
            found[key, chunk.offsets] = (tensor.shape, tensor.dtype, chunk.sizes, chunk.file.name, data)
    return found


def weights(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, entry in read_header(path).tensors.items():
            found[name] = (entry.dtype, entry.shape, data[entry.start : entry.stop])
    return found


@pytest.mark.parametrize("name", CASES)
def test_ours_is_what_megatron_bridge_writes(
    name: str, golden_huggingface: Path, golden_megatron: Path, tmp_path: Path
) -> None:
    source, layout = CASES[name]
    theirs = golden_megatron / name
    hf_to_megatron(golden_huggingface / source, tmp_path / "m", layout=layout, megatron_core="0.19", run=RUN)
    assert chunks(read_megatron(tmp_path / "m")) == chunks(read_megatron(theirs))
    ours_metadata, their_metadata = (read_metadata(f / "iter_0000000" / ".metadata") for f in (tmp_path / "m", theirs))
    assert list(ours_metadata.tensors) == list(their_metadata.tensors) or "ep" in name
    assert {k: o.relative_path for k, o in ours_metadata.objects.items()} == {
        k: o.relative_path for k, o in their_metadata.objects.items()
    }
    for file in ("iter_0000000/metadata.json", "latest_checkpointed_iteration.txt"):
        assert (tmp_path / "m" / file).read_bytes() == (theirs / file).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_theirs_comes_back_bit_for_bit(
    name: str, golden_huggingface: Path, golden_megatron: Path, tmp_path: Path
) -> None:
    source = golden_huggingface / CASES[name][0]
    megatron_to_hf(golden_megatron / name, tmp_path / "hf", run=RUN)
    assert weights(tmp_path / "hf") == weights(source)
    assert verify(source, golden_megatron / name).equal


@pytest.mark.parametrize("name", CASES)
def test_a_config_rebuilt_from_run_config_means_the_same(
    name: str, golden_huggingface: Path, golden_megatron: Path, tmp_path: Path
) -> None:
    """What transformers 4.57 and 5.x look at is as in the source; the rest is what Megatron-Bridge kept of it."""
    source = golden_huggingface / CASES[name][0]
    megatron_to_hf(golden_megatron / name, tmp_path / "hf", run=RUN)
    rebuilt, published = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", source))
    for section in ("text_config", "vision_config"):
        for key, value in published[section].items():
            assert rebuilt[section][key] == value, (section, key)
    assert rebuilt["tie_word_embeddings"] == published["tie_word_embeddings"]
    assert rebuilt["architectures"] == published["architectures"]


def test_every_expert_layout_gives_the_same_checkpoint(golden_huggingface: Path, tmp_path: Path) -> None:
    """hub and v5 hold the same model (transformers saved the one as the other)."""
    made = []
    for name in ("moe", "moe-v5"):
        hf_to_megatron(golden_huggingface / name, tmp_path / name, layout=ParallelLayout(ep=2), run=RUN)
        made.append(chunks(read_megatron(tmp_path / name)))
    assert {k: v[-1] for k, v in made[0].items()} == {k: v[-1] for k, v in made[1].items()}


@pytest.mark.parametrize("layout", ["hub", "v5", "per-expert"])
def test_experts_are_written_in_the_layout_asked_for(
    layout: str, golden_huggingface: Path, golden_megatron: Path, tmp_path: Path
) -> None:
    megatron_to_hf(golden_megatron / "moe_tp1pp1ep2", tmp_path / layout, experts_layout=layout, run=RUN)
    assert verify(tmp_path / layout, golden_megatron / "moe_tp1pp1ep2").equal
    reference = {"hub": "moe", "v5": "moe-v5"}.get(layout)
    if reference is not None:
        assert weights(tmp_path / layout) == weights(golden_huggingface / reference)
