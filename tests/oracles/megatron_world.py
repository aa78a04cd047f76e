"""Real Megatron-Core on CPU, at any parallel layout: the judge of what we write and the author of what we read.

A world is `pp * lcm(tp, ep * etp)` processes under gloo. Each builds its part of a real `GPTModel` (the text decoder,
from Megatron-Core's own local spec) and loads or saves checkpoints through `megatron.core.dist_checkpointing`.

    ranks = run_world(World(tp=2, pp=2), [Load(folder), Load(other, MOE)])    # processes start once for all jobs
    tensors = assemble(ranks[0])                                             # {key: global tensor} of the first job
    run_world(World(ep=2), [Save(folder, MOE, extras=True)])                 # a checkpoint, as a training run leaves it

This half runs in the test and never imports megatron; `megatron_rank` is the half that runs in the processes.
"""

import math
import multiprocessing
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

# What takes seconds to import is imported once, in a server process that ranks are forked from.
PRELOAD = [
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "frozen",
]


@dataclass(frozen=True, slots=True)
class World:
    """Parallel sizes. Ranks are as few as these allow, so there is no data parallelism beyond what they force."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.pp * math.lcm(self.tp, self.ep * self.etp)

    def __str__(self) -> str:
        """What differs from one process, `tp2pp2vpp2`: the name of a test."""
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": self.etp}
        return "".join(f"{name}{size}" for name, size in sizes.items() if size not in (None, 1)) or "single"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a text decoder. `experts=None` is the dense model. `vocab` counts padding rows too."""

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    groups: int = 2
    head_dim: int = 16
    ffn: int = 160
    vocab: int = 512
    experts: int | None = None
    expert_ffn: int = 48
    top_k: int = 2
    tied: bool = False


DENSE = Sizes()
MOE = Sizes(experts=8)


@dataclass(frozen=True, slots=True)
class Keys:
    """How Megatron-Core is told to name what it stores: stacked layers, or one of the older per-layer ways.

    `te_norm` asks a MoE for the norm before its MLP under Transformer Engine's name, not under the local spec's.
    """

    prefix: str = "language_model."
    non_homogeneous: bool = False
    singleton: bool = False
    te_norm: bool = True

    @property
    def metadata(self) -> dict[str, bool]:
        """What `sharded_state_dict` and `content_metadata` take; today's trainers write just the default."""
        metadata = {"singleton_local_shards": self.singleton, "chained_optim_avoid_prefix": True}
        return metadata | ({"non_homogeneous_layers": True} if self.non_homogeneous else {})


@dataclass(frozen=True, slots=True)
class Load:
    """Load an `iter_*` folder strictly, into modules too; the result is what the modules' parameters then hold."""

    folder: Path
    model: Sizes = DENSE
    keys: Keys = Keys()


@dataclass(frozen=True, slots=True)
class Save:
    """Save the model with `random_tensor(key, shape, seed)` in every weight; the result is the same as of a `Load`.

    used_vocab: rows of the vocabulary from here on are zero, as padding is.
    extras: what a training run adds: optimizer tensors, random states, a Namespace of arguments.
    """

    folder: Path
    model: Sizes = DENSE
    keys: Keys = Keys()
    seed: int = 0
    used_vocab: int | None = None
    extras: bool = False


Job = Load | Save


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of one stored tensor. `data` has all the axes of the global tensor, layer and expert too."""

    key: str
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    data: torch.Tensor

    @property
    def where(self) -> tuple[slice, ...]:
        """The index of `data` in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.data.shape, strict=True))


Ranks = list[list[Shard]]


def run_world(world: World, jobs: Sequence[Job]) -> list[Ranks]:
    """Do the jobs in order in one world; per job, each rank's shards. A rank's exception is raised here."""
    from oracles.megatron_rank import rank_main  # its module level imports nothing of megatron

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        meeting_point = Path(name)
        arguments = (world, list(jobs), meeting_point)
        start_processes(rank_main, arguments, nprocs=world.size, start_method="forkserver")
        ranks = [torch.load(meeting_point / f"rank{rank}.pt", weights_only=False) for rank in range(world.size)]
    return [[shards[job] for shards in ranks] for job in range(len(jobs))]


def assemble(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The global tensors. Every element must be held by some rank, and the same bits by all that hold it."""
    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    for shard in (shard for shards in ranks for shard in shards):
        tensor = tensors.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=shard.data.dtype))
        seen = held.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=torch.bool))
        assert tensor.shape == shard.global_shape, f"{shard.key}: ranks disagree on its shape"
        again = seen[shard.where]
        assert same_bits(tensor[shard.where][again], shard.data[again]), f"{shard.key}: replicas differ"
        tensor[shard.where] = shard.data
        seen[shard.where] = True
    incomplete = [key for key, seen in held.items() if not seen.all()]
    assert not incomplete, f"no rank holds all of {incomplete}"
    return tensors


def random_tensor(key: str, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The values that `Save` gives a stored tensor. They depend on nothing else, so not on the layout either."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    return torch.randn(*shape, generator=generator).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit: NaN equals itself, and -0.0 is not 0.0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names that are in one only, or whose bits differ. Tests assert that there are none."""
    return sorted(name for name in one.keys() | other.keys() if not both_same(one.get(name), other.get(name)))


def both_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Both there, and with the same bits."""
    return one is not None and other is not None and same_bits(one, other)
