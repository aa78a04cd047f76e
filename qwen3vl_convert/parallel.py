"""Which rank of a Megatron job holds what: tensor, pipeline, virtual pipeline, expert and expert-tensor parallel sizes.

Ranks are numbered as Megatron-Core numbers them (order tp-cp-ep-dp-pp): within a pipeline stage, rank r has tensor
parallel index r % tp, expert-tensor parallel index r % etp and expert parallel index (r // etp) % ep. The world is the
smallest that has them all: pp * lcm(tp, ep * etp).
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UsageError


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Parallel sizes of a Megatron job. `first_stage_layers`, `last_stage_layers`: for an uneven pipeline.

    `vpp` is the number of model chunks per pipeline rank (None: one). Raises `UsageError` for sizes below one.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise UsageError(f"--{field.name.replace('_', '-')} {value}: expected 1 or more.")
        if self.vpp and self.vpp > 1 and self.pp == 1:
            raise UsageError(f"--vpp {self.vpp} needs a pipeline: pass --pp 2 or more.")
        if (self.first_stage_layers or self.last_stage_layers) and (self.pp == 1 or (self.vpp or 1) > 1):
            raise UsageError("--first-stage-layers and --last-stage-layers need --pp 2 or more, and no --vpp.")

    @property
    def stage_ranks(self) -> int:
        """Ranks per pipeline stage."""
        return math.lcm(self.tp, self.ep * self.etp)

    @property
    def world(self) -> int:
        return self.pp * self.stage_ranks

    def __str__(self) -> str:
        sizes = [("TP", self.tp), ("PP", self.pp), ("VPP", self.vpp or 1), ("EP", self.ep), ("ETP", self.etp)]
        return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "TP1"

    def stages(self, layers: int) -> list[int]:
        """The pipeline stage of each layer. Raises `UsageError` when the layers do not divide."""
        if self.first_stage_layers or self.last_stage_layers:
            return self._uneven(layers)
        chunks = self.pp * (self.vpp or 1)
        if layers % chunks:
            raise UsageError(
                f"{layers} layers do not divide by pp * vpp = {chunks}: choose a divisor of {layers}, or give "
                f"--first-stage-layers and --last-stage-layers."
            )
        return [(layer // (layers // chunks)) % self.pp for layer in range(layers)]

    def _uneven(self, layers: int) -> list[int]:
        first, last = self.first_stage_layers or 0, self.last_stage_layers or 0
        middle = self.pp - bool(first) - bool(last)
        rest = layers - first - last
        if rest < middle or (middle and rest % middle) or (not middle and rest):
            raise UsageError(
                f"{layers} layers: {first} on the first stage and {last} on the last leave {rest} for {middle} stages, "
                f"which does not divide."
            )
        counts = [first] * bool(first) + ([rest // middle] * middle if middle else []) + [last] * bool(last)
        return [stage for stage, count in enumerate(counts) for _ in range(count)]

    def validate(self, dims: Dims, padded_vocab: int) -> None:
        """Raise `UsageError` naming the size that does not divide what it must."""
        self.stages(dims.layers)
        if self.pp > dims.layers:
            raise UsageError(f"--pp {self.pp} is more than the model's {dims.layers} layers.")
        if not dims.moe and (self.ep > 1 or self.etp > 1):
            raise UsageError(f"--ep {self.ep} --etp {self.etp}: {dims.model_type} has no experts; leave both at 1.")
        for what, size, flag, value in self._divisions(dims, padded_vocab):
            if size % value:
                raise UsageError(f"--{flag} {value} does not divide {what} = {size}.")
        if dims.kv_heads % self.tp and self.tp % dims.kv_heads:
            raise UsageError(f"--tp {self.tp} and num_key_value_heads = {dims.kv_heads}: one must divide the other.")

    def _divisions(self, dims: Dims, padded_vocab: int) -> list[tuple[str, int, str, int]]:
        dense = [] if dims.moe else [("intermediate_size", dims.ffn, "tp", self.tp)]
        experts = [
            ("num_experts", dims.experts, "ep", self.ep),
            ("moe_intermediate_size", dims.expert_ffn, "etp", self.etp),
        ]
        return [
            ("num_attention_heads", dims.heads, "tp", self.tp),
            ("the vision tower's num_heads", dims.vision_heads, "tp", self.tp),
            ("the vision tower's intermediate_size", dims.vision_ffn, "tp", self.tp),
            ("the vocabulary (pad it with --make-vocab-size-divisible-by)", padded_vocab, "tp", self.tp),
            *(experts if dims.moe else dense),
        ]

    def holders(self, tp: int | None, ep: int | None, etp: int | None) -> tuple[int, ...]:
        """Ranks of a stage (0 is its first) that hold a shard: those with the given indices, in rising order."""
        return _holders(self, tp, ep, etp)


@lru_cache(maxsize=65536)
def _holders(layout: ParallelLayout, tp: int | None, ep: int | None, etp: int | None) -> tuple[int, ...]:
    return tuple(
        rank
        for rank in range(layout.stage_ranks)
        if (tp is None or rank % layout.tp == tp)
        and (etp is None or rank % layout.etp == etp)
        and (ep is None or rank // layout.etp % layout.ep == ep)
    )
