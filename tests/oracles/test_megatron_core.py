"""Megatron-Core itself loads what we write, at layouts other than the one written, and we read what it saves.

Judge of the first is `reference.expected_megatron` of the source as the safetensors library reads it, of the second
the tensors that Megatron-Core's own modules held. The harness covers the text decoder: vision comes from a checkpoint
of ours.
"""

import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.multiprocessing.spawn import ProcessRaisedException

from oracles.megatron_world import Keys, Load, Save, Sizes, World, assemble, differences, run_world
from qwen3vl_convert import Dims, ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint, megatron_to_hf
from qwen3vl_convert.make import SIZES
from qwen3vl_convert.verify import verify
from reference import HF, expected_megatron, load_huggingface, load_megatron

pytestmark = pytest.mark.megatron

RUN = RunOptions(fsync=False)
THIS_RELEASE = "this release"

TINY, TINY_MOE = SIZES["tiny"], SIZES["tiny-moe"]
# As many key-value heads as tensor parallel ranks, heads x head_dim = 60 for a hidden size of 20, half of 14 odd.
ODD = replace(
    TINY, layers=3, hidden=20, heads=6, head_dim=10, mrope_section=(3, 1, 1), ffn=14, vocab=34, vision_out=20,
    vision_depth=2, vision_hidden=12, vision_heads=2, vision_ffn=10, deepstack=(1,), position_embeddings=9, patch=2,
)  # fmt: skip
# gate_up_proj of an expert is 32 x 32: its shape does not tell which way it lies. And one where down_proj is square.
SQUARE_GATE_UP = replace(TINY_MOE, layers=2, hidden=32, head_dim=4, experts=4, expert_ffn=16, vision_out=32)
SQUARE_DOWN = replace(SQUARE_GATE_UP, expert_ffn=32)
MODELS = {
    "dense": TINY,
    "tied": replace(TINY, tied=True),
    "moe": TINY_MOE,
    "odd": ODD,
    "square-gate-up": SQUARE_GATE_UP,
    "square-down": SQUARE_DOWN,
}
TEXT = "language_model."
STACKED = Keys()


def sizes_of(dims: Dims, vocab: int | None = None) -> Sizes:
    """The text decoder in the harness's words."""
    return Sizes(
        layers=dims.layers,
        hidden=dims.hidden,
        heads=dims.heads,
        groups=dims.kv_heads,
        head_dim=dims.head_dim,
        ffn=dims.ffn,
        vocab=vocab or dims.vocab,
        experts=dims.experts or None,
        expert_ffn=dims.expert_ffn,
        top_k=dims.top_k,
        tied=dims.tied,
    )


def this_release() -> str:
    """What `--for-megatron-core` calls the release that is installed; asked when a test runs, as it may be none."""
    return "0.16" if version("megatron-core").startswith(("0.16", "0.17", "0.18")) else "0.19"


def text_of(tensors: HF) -> HF:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT)}


# ---- what we write -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A checkpoint of ours: the model, the layout that it is written at, and what of the options is not the default."""

    model: str
    layout: ParallelLayout
    megatron_core: str = "any"
    vocab: int | None = None


WRITTEN = {
    "dense": Written("dense", ParallelLayout(tp=2, pp=2)),
    "dense-this-release": Written("dense", ParallelLayout(pp=4), THIS_RELEASE),
    "dense-padded": Written("dense", ParallelLayout(tp=4), vocab=640),
    "tied": Written("tied", ParallelLayout(tp=4, pp=2, vpp=2)),
    "moe": Written("moe", ParallelLayout(tp=2, pp=2, ep=2)),
    "moe-this-release": Written("moe", ParallelLayout(etp=4, ep=2), THIS_RELEASE),
    "odd": Written("odd", ParallelLayout(tp=2, pp=3)),
    "square-gate-up": Written("square-gate-up", ParallelLayout(ep=2, etp=2)),
    "square-down": Written("square-down", ParallelLayout(tp=2, ep=2)),
}
LAYERS_4 = ("dense", "dense-this-release", "dense-padded", "tied", "moe", "moe-this-release")
SQUARES = ("square-gate-up", "square-down")
WORLDS = {
    World(): WRITTEN,
    World(tp=2): WRITTEN,
    World(tp=4): ("dense", "dense-this-release", "tied", "moe", "moe-this-release"),
    World(pp=3): ("odd",),
    World(tp=2, pp=2, vpp=2): (*LAYERS_4,),
    World(tp=2, ep=2, etp=2): ("moe", "moe-this-release", *SQUARES),
    World(pp=2, ep=4, etp=1): ("dense", "tied", "moe", "moe-this-release", *SQUARES),
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of random weights per model."""
    folder = tmp_path_factory.mktemp("sources")
    for name, dims in MODELS.items():
        make_checkpoint(folder / name, dims)
    return folder


@pytest.fixture(scope="session")
def written(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for name, one in WRITTEN.items():
        hf_to_megatron(
            sources / one.model,
            folder / name,
            layout=one.layout,
            megatron_core=this_release() if one.megatron_core == THIS_RELEASE else one.megatron_core,
            padded_vocab_size=one.vocab,
            run=RUN,
        )
    return folder


@pytest.mark.parametrize(("world", "names"), WORLDS.items(), ids=map(str, WORLDS))
def test_megatron_core_loads_what_we_write(world: World, names: Iterable[str], sources: Path, written: Path) -> None:
    """Strictly, at every other layout: every parameter of its modules holds what the source says, bit for bit."""
    jobs = [
        Load(written / name / "iter_0000000", sizes_of(MODELS[WRITTEN[name].model], WRITTEN[name].vocab))
        for name in names
    ]
    for name, ranks in zip(names, run_world(world, jobs), strict=True):
        one = WRITTEN[name]
        layout = one.layout
        assert (layout.tp, layout.pp, layout.vpp, layout.ep, layout.etp) != (
            world.tp, world.pp, world.vpp, world.ep, world.etp,
        ), f"{name} is to be loaded at another layout than it was written at"  # fmt: skip
        expected = expected_megatron(load_huggingface(sources / one.model), MODELS[one.model], one.vocab)
        assert differences(assemble(ranks), text_of(expected)) == [], name


@pytest.mark.parametrize("name", WRITTEN)
def test_no_more_and_no_less_is_stored(name: str, sources: Path, written: Path) -> None:
    """The vision tower too, which the harness does not build, as torch.load reads each chunk."""
    one = WRITTEN[name]
    expected = expected_megatron(load_huggingface(sources / one.model), MODELS[one.model], one.vocab)
    assert differences(load_megatron(written / name), expected) == []


def test_common_pt_is_what_releases_before_0_19_need(sources: Path, tmp_path: Path) -> None:
    """Why the default has it beside the common state that 0.19 writes. 0.19 takes either."""
    hf_to_megatron(sources / "dense", tmp_path / "new", megatron_core="0.19", run=RUN)
    hf_to_megatron(sources / "dense", tmp_path / "old", megatron_core="0.16", run=RUN)
    new, old = (Load(tmp_path / name / "iter_0000000") for name in ("new", "old"))
    if this_release() == "0.16":
        with pytest.raises(ProcessRaisedException, match="common.pt"):
            run_world(World(), [new])
        run_world(World(), [old])
    else:
        run_world(World(), [new, old])


def test_a_wrong_weight_is_seen(sources: Path, written: Path) -> None:
    """The comparison is no rubber stamp: one element of the source changed, and it says where."""
    source = load_huggingface(sources / "dense")
    source["model.language_model.layers.2.self_attn.k_proj.weight"][5, 7] += 1
    [ranks] = run_world(World(), [Load(written / "dense" / "iter_0000000")])
    expected = text_of(expected_megatron(source, TINY))
    assert differences(assemble(ranks), expected) == ["language_model.decoder.layers.self_attention.linear_qkv.weight"]


# ---- what it saves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint of Megatron-Core's: the model, who saves it and how; `config`: the file that says its sizes."""

    model: str
    world: World
    keys: Keys = STACKED
    vocab: int | None = None
    extras: bool = False
    config: str = "hf/config.json"


FOUR = World(tp=2, pp=2, ep=2)
VIRTUAL = World(tp=2, pp=2, vpp=2)
SAVED = {
    "dense": Saved("dense", FOUR),
    "dense-per-layer": Saved("dense", FOUR, Keys(non_homogeneous=True)),
    "dense-singleton": Saved("dense", FOUR, Keys(singleton=True)),
    "dense-padded": Saved("dense", FOUR, vocab=640),
    "dense-padded-run-config": Saved("dense", FOUR, vocab=576, config="run_config.yaml"),
    "dense-training": Saved("dense", VIRTUAL, extras=True),
    "tied": Saved("tied", VIRTUAL, config="run_config.yaml"),
    "moe": Saved("moe", FOUR),
    "moe-local-norm": Saved("moe", FOUR, Keys(te_norm=False)),
    "moe-per-layer": Saved("moe", FOUR, Keys(non_homogeneous=True)),
    "moe-singleton": Saved("moe", FOUR, Keys(singleton=True)),
    "moe-singleton-local-norm": Saved("moe", FOUR, Keys(singleton=True, te_norm=False)),
    "moe-training": Saved("moe", VIRTUAL, vocab=640, extras=True, config="run_config.yaml"),
    "odd": Saved("odd", World(tp=2), Keys(non_homogeneous=True)),
    "square-gate-up": Saved("square-gate-up", World(tp=2), config="run_config.yaml"),
    "square-down": Saved("square-down", World(tp=2), Keys(singleton=True)),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> "Saver":
    return Saver(tmp_path_factory.mktemp("saved"))


class Saver:
    """Has all checkpoints of a world saved when the first of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of_world = cache(self._of_world)

    def __call__(self, name: str) -> tuple[Path, HF]:
        """The folder of a checkpoint, and the tensors that its modules held."""
        return self.folder / name, self.of_world(SAVED[name].world)[name]

    def _of_world(self, world: World) -> dict[str, HF]:
        jobs = {
            name: Save(
                self.folder / name,
                sizes_of(MODELS[one.model], one.vocab),
                one.keys,
                used_vocab=one.vocab and MODELS[one.model].vocab,
                extras=one.extras,
            )
            for name, one in SAVED.items()
            if one.world == world
        }
        ranks = run_world(world, list(jobs.values()))
        return {name: assemble(held) for name, held in zip(jobs, ranks, strict=True)}


def add_vision(text: Path, ours: Path, config: str) -> None:
    """Complete a text decoder of Megatron-Core's with the vision tower of a checkpoint of ours, as if saved together.

    Its `.metadata` stays the pickle that Megatron-Core wrote, with entries added.
    """
    whole, vision = (FileSystemReader(str(folder)).read_metadata() for folder in (text, ours))
    for name, entry in vision.state_dict_metadata.items():
        if name.startswith("vision_model."):
            whole.state_dict_metadata[name] = entry
    for index, info in vision.storage_data.items():
        if index.fqn.startswith("vision_model."):
            whole.storage_data[index] = replace(info, relative_path=f"__vision_{info.relative_path}")
    for path in ours.glob("*.distcp"):
        shutil.copy(path, text / f"__vision_{path.name}")
    (text / ".metadata").write_bytes(pickle.dumps(whole))
    (text / config).parent.mkdir(exist_ok=True)
    shutil.copy(ours / config, text / config)


def stacked(tensors: HF) -> HF:
    """What older and other ways of naming hold, under the names of today's default, in plain torch."""
    joined = {
        name.removesuffix("_w"): torch.cat([tensor, tensors[name.removesuffix("_w") + "_v"]])
        if name.endswith(".weight_w")
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".weight_v")
    }
    whole = numbers_stacked(numbers_stacked(joined, r"\.experts\.experts"), r"\.decoder\.layers")
    norm = "language_model.decoder.layers.{}.weight"
    if norm.format("mlp.router") in whole and norm.format("pre_mlp_layernorm") not in whole:
        local = "language_model.decoder.layers.mlp.linear_fc1.layer_norm_weight"
        whole[norm.format("pre_mlp_layernorm")] = whole.pop(local)
    return whole


def numbers_stacked(tensors: HF, after: str) -> HF:
    """One tensor where several have names that differ in the number after a module list's name."""
    counted = re.compile(rf"(.*{after})\.(\d+)(\..*)")
    whole: HF = {}
    groups: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if found := counted.fullmatch(name):
            groups.setdefault(found[1] + found[3], {})[int(found[2])] = tensor
        else:
            whole[name] = tensor
    return whole | {name: torch.stack([group[i] for i in range(len(group))]) for name, group in groups.items()}


@pytest.mark.parametrize("name", SAVED)
def test_we_read_what_megatron_core_saves(name: str, saved: Saver, sources: Path, tmp_path: Path) -> None:
    """Every way of naming, whole: to Hugging Face and by hand to Megatron's side again is what its modules held."""
    one, dims = SAVED[name], MODELS[SAVED[name].model]
    text, held = saved(name)
    shutil.copytree(text, tmp_path / "checkpoint")
    hf_to_megatron(
        sources / one.model, tmp_path / "vision", layout=ParallelLayout(tp=2), padded_vocab_size=one.vocab, run=RUN
    )
    add_vision(tmp_path / "checkpoint", tmp_path / "vision" / "iter_0000000", one.config)

    result = megatron_to_hf(tmp_path / "checkpoint", tmp_path / "hf", run=RUN)

    from_source = expected_megatron(load_huggingface(sources / one.model), dims, one.vocab)
    expected = stacked(held) | {key: t for key, t in from_source.items() if not key.startswith(TEXT)}
    assert expected.keys() == from_source.keys()
    assert differences(expected_megatron(load_huggingface(tmp_path / "hf"), dims, one.vocab), expected) == []
    assert verify(tmp_path / "hf", tmp_path / "checkpoint").equal
    said = " ".join(result.notes)
    assert ("Training state is left out" in said and "rng_state" in said) is one.extras
    assert ("rows of padding are dropped" in said) is (one.vocab is not None)


def test_training_state_is_there_to_be_ignored(saved: Saver) -> None:
    """Both training checkpoints do hold optimizer tensors and random states, under names that are no weights'."""
    for name in ("dense-training", "moe-training"):
        keys = FileSystemReader(str(saved(name)[0])).read_metadata().state_dict_metadata
        assert sum(key.startswith("optimizer.") for key in keys) > 10
        assert any(key.startswith("rng_state/") for key in keys)
