"""What a verification found: values that the terminal, `--json` and the HTML report show, each in its way.

Verification                 the whole answer
├── Side                         what each checkpoint says that it is, Hugging Face's and Megatron's
├── WeightsReport                every tensor on disk; a `Difference` for each that is not equal
└── LogitsReport                 what both models compute
    ├── PromptResult                 logits of one prompt
    ├── PointResult                  what went into a module, or came out of it, on all prompts
    └── Place                        the first of them that is wrong, and why it may be
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

ULP_BUCKETS = ("1", "2", "3-4", "5-16", "17-256", "257-65536", "more")
"""Of `WeightsReport.ulps`: by how many units in the last place elements differ."""


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint that was compared, as its headers tell it.

    `layout`: the parallel sizes that it says it was written with, such as `TP2 PP1 EP2 ETP1`; "" where it says none.
    `dtype`: that of its tensors, or all of them.
    """

    path: str
    format: str
    layout: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same on both sides. `name` is Hugging Face's, `megatron_name` the key on disk.

    - `count` elements differ, the first at the index `first`. `max_ulp` counts representable numbers in between.
    - `cosine` of the two tensors, 1 for the same direction; NaN where either is zero or not finite.
    - `dtypes`: (HF, Megatron) where they differ and that was not asked for; then nothing else was compared.
    - `guess`: what probably happened, in a sentence; empty where it is none of the usual things.
    """

    name: str
    megatron_name: str
    shape: tuple[int, ...]
    count: int
    first: tuple[int, ...]
    max_abs: float
    max_ulp: int
    cosine: float
    guess: str = ""
    dtypes: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """Every element of both checkpoints, read from disk and compared.

    `settings` are facts that the two configs state differently: (HF, Megatron) by name. `ulps` counts the elements that
    differ, by `ULP_BUCKETS`. `tolerated`: "" for bits, else how dtypes were allowed to differ.
    """

    tensors: int
    elements: int
    differences: tuple[Difference, ...]
    settings: dict[str, tuple[Any, Any]]
    ulps: tuple[int, ...]
    tolerated: str
    notes: tuple[str, ...]
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.differences and not self.settings


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The logits of one prompt by both models.

    - `kinds`: per token "t" text, "i" image or "v" video; `kl`: KL(HF || Megatron) in nats of the next token's
      distribution there.
    - `max_abs` and `mean_abs` of the logits' difference. `allowed`: the most that `max_abs` may be. `own_errors`: how
      far (HF, Megatron) are from themselves in the more exact dtype.
    - `top1`, `top5`: the share of tokens where the first is the same; where the first five are the same set.
    """

    name: str
    contents: str
    kinds: str
    max_abs: float
    mean_abs: float
    allowed: float
    own_errors: tuple[float, float]
    kl: tuple[float, ...]
    top1: float
    top5: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.max_abs <= self.allowed

    @property
    def severity(self) -> float:
        """The difference as a multiple of what is allowed; infinite for NaN."""
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.allowed if self.allowed > 0 and not math.isnan(self.max_abs) else math.inf


@dataclass(frozen=True, slots=True)
class PointResult:
    """What went into (`input`) or came out of (`output`) a module, all prompts together; the worst of them counts.

    `tower`: "vision" or "text"; `layer` counts from 0 and is None outside of layers. `difference` and `allowed` are
    root mean squares relative to that of the values.
    """

    module: str
    hf_module: str
    side: str
    tower: str
    layer: int | None
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.difference <= self.allowed

    @property
    def name(self) -> str:
        """`text layer 7, self_attention.linear_qkv`, the names being Megatron's."""
        short = self.module.rpartition(f".layers.{self.layer}.")[2] if self.layer is not None else self.module
        return f"{self.tower} layer {self.layer}, {short}" if self.layer is not None else short


@dataclass(frozen=True, slots=True)
class Place:
    """Where the two models part: the first point that is wrong, and what stands behind it, in a sentence.

    `parameters`: differing HF tensors of that module, if any.
    """

    point: PointResult | None
    text: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """Both models run on the same prompts. `reference` is the more exact dtype that `allowed` was derived with.

    `programs`: what computed with the HF folder, and with the Megatron checkpoint, with versions.
    `mode`: "whole", "stream" or "parallel". `peak_bytes`: most memory of the process, or of the GPU where there is one.
    `deepstack`: the blocks of the vision tower from which its deepstack mergers take, in the order of the mergers.
    """

    programs: tuple[str, str]
    device: str
    dtype: str
    reference: str
    multiple: float
    mode: str
    prompts: tuple[PromptResult, ...]
    points: tuple[PointResult, ...]
    place: Place | None
    notes: tuple[str, ...]
    seconds: float
    peak_bytes: int
    deepstack: tuple[int, ...] = ()

    @property
    def equal(self) -> bool:
        return bool(self.prompts) and all(prompt.passed for prompt in self.prompts)

    @property
    def worst(self) -> PromptResult | None:
        """The prompt whose logits are furthest beyond, or closest to, what is allowed; None where none was run."""
        return max(self.prompts, key=lambda one: one.severity, default=None)


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of `verify`: is this the same model? `sides`: (HF, Megatron)."""

    huggingface: str
    megatron: str
    model: str
    weights: WeightsReport
    logits: LogitsReport | None = None
    versions: dict[str, str] = field(default_factory=dict)
    sides: tuple[Side, ...] = ()

    @property
    def equal(self) -> bool:
        return self.weights.equal and (self.logits is None or self.logits.equal)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"equal": self.equal, **asdict(self)}
