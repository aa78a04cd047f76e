"""The parts in the order of what they tell, and the checkpoints that some of them need. Imports nothing that may not be
installed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint with random weights of real shapes. `layout`: options of the conversion to Megatron. `gigabytes`: on
    disk, as a Hugging Face folder; as a Megatron checkpoint it takes as much again.
    """

    size: str
    layers: int | None
    layout: tuple[str, ...]
    gigabytes: float

    def __str__(self) -> str:
        return self.size + (f", {self.layers} layers" if self.layers else "")


@dataclass(frozen=True, slots=True)
class Part:
    """`module` has its checks. In seconds, `least` must be left for it to be started, and `most` is its own limit,
    about twice what it should take on an H100 with 16 cores. `shape`: a key of `SHAPES`, needed on disk if `reads`.
    """

    name: str
    what: str
    module: str
    least: int
    most: int
    shape: str | None = None
    reads: bool = True

    @property
    def checkpoint(self) -> str | None:
        """The key of the checkpoint that must be there."""
        return self.shape if self.reads else None


SHAPES = {
    "2b": Shape("2b", None, ("--tp", "2"), 4.3),
    "8b": Shape("8b", None, ("--tp", "2"), 17.6),
    "30b-a3b": Shape("30b-a3b", 12, ("--tp", "2", "--ep", "2"), 17.5),
}
REHEARSED = {
    "2b": Shape("tiny", None, ("--tp", "2"), 0.01),
    "8b": Shape("tiny", None, ("--tp", "2"), 0.01),
    "30b-a3b": Shape("tiny-moe", None, ("--tp", "2", "--ep", "2"), 0.01),
}
"""What stands for them on a CPU."""

PARTS = (
    Part(
        "sanity",
        "attention of many lengths against float64; grouped experts against one by one; decoding by captured graphs, "
        "insisted on, against without; process groups twice; a loss with gradients",
        "gpu.sanity",
        least=30,
        most=100,
    ),
    Part(
        "tiny",
        "logits of tiny models, dense and MoE, for eight kinds of prompt; the vision tower at a fixed length; the "
        "verifier on what is right and on three faults; every step that the engine serves",
        "gpu.tiny",
        least=40,
        most=130,
    ),
    Part("verify-2b", "the verifier on 2B shapes", "gpu.verified", least=30, most=150, shape="2b"),
    Part(
        "prefill-2b",
        "a prefill of 2B shapes beside transformers with sdpa, and bfloat16 logits of longer prompts",
        "gpu.prefill",
        least=30,
        most=75,
        shape="2b",
    ),
    Part(
        "generate-2b",
        "the engine beside transformers' generate, 2B shapes",
        "gpu.generated",
        least=40,
        most=100,
        shape="2b",
        reads=False,
    ),
    Part("verify-8b", "the verifier on 8B shapes", "gpu.verified", least=60, most=170, shape="8b"),
    Part(
        "generate-8b",
        "the engine beside transformers' generate, 8B shapes",
        "gpu.generated",
        least=45,
        most=70,
        shape="8b",
        reads=False,
    ),
    Part(
        "verify-30b-a3b",
        "the verifier on the shapes of 30B-A3B, cut to 12 layers",
        "gpu.verified",
        least=60,
        most=240,
        shape="30b-a3b",
    ),
)


def part_named(name: str) -> Part:
    """Raises KeyError for a name that is none."""
    return {part.name: part for part in PARTS}[name]
