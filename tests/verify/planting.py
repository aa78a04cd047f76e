"""Right checkpoints with lively weights, and the ways in which a mistake gets into one, or into the model of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from broken import ITERATION, QUICK, copied, edit_config
from models import planted
from qwen3vl_convert import hf_to_megatron
from qwen3vl_convert.dims import Dims
from qwen3vl_convert.make import SIZES
from reference import load_huggingface
from verify.weight_faults import HF, changed_run, run_of_changed

DENSE = replace(SIZES["tiny"], layers=2, vision_depth=3, deepstack=(0, 2))
MOE = replace(DENSE, model_type="qwen3_vl_moe", experts=8, top_k=3, expert_ffn=48)
MODELS: dict[str, Dims] = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "deep": replace(DENSE, layers=4, vision_depth=2, deepstack=(1,)),
    "moe": MOE,
    "square up": replace(MOE, expert_ffn=32),  # gate_up_proj of an expert is
    "square down": replace(MOE, expert_ffn=64),
    "bfloat16": DENSE,
    "float16": DENSE,
    "bright": DENSE,
}
"""The sizes of the checkpoints that faults are planted in, in float32 or what they are called by. q_proj and o_proj are
square.
"""

BRIGHT = 7e4
"""More than float16 holds: one weight of the checkpoint of that name."""


@dataclass(frozen=True)
class Bases:
    """Right checkpoints in both formats, by name; made when first asked for. Weights are lively: every fault shows."""

    root: Path

    def huggingface(self, name: str) -> Path:
        folder = self.root / name
        return folder if folder.exists() else _lively(folder, name)

    def megatron(self, name: str, **options: Any) -> Path:
        run = self.root / " ".join([name, *(f"{key}={value}" for key, value in options.items()), "run"])
        if not run.exists():
            hf_to_megatron(self.huggingface(name), run, run=QUICK, **options)
        return run


def _lively(folder: Path, name: str) -> Path:
    planted.lively_checkpoint(folder, MODELS[name])
    weights = load_huggingface(folder)
    if name in ("bfloat16", "float16"):
        weights = {key: tensor.to(getattr(torch, name)) for key, tensor in weights.items()}
        edit_config(lambda config: _set_dtype(config, name))(folder)
    if name == "bright":
        weights["model.language_model.layers.1.mlp.down_proj.weight"][5, 7] = BRIGHT
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for section in (config, config["text_config"], config["vision_config"]):
        for key in section.keys() & {"dtype", "torch_dtype"}:
            section[key] = dtype


# ---- ways to plant ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Where a fault is planted: right checkpoints, and a folder for the wrong one."""

    bases: Bases
    model: str
    options: dict[str, Any]
    target: Path

    @property
    def folder(self) -> Path:
        return self.bases.huggingface(self.model)

    @property
    def run(self) -> Path:
        return self.bases.megatron(self.model, **self.options)


Plant = Callable[[Site], Path]
"""Makes the wrong Megatron checkpoint; gives its folder."""
Change = Callable[[Tensor], Tensor]


def weights(change: Callable[[HF], object]) -> Plant:
    """What a converter makes that mistakes the tensors of the folder."""
    return lambda site: run_of_changed(site.folder, site.target, change, **site.options)


def each(names: Sequence[str], change: Change) -> Plant:
    return weights(lambda found: found.update({name: change(found[name]) for name in names}))


def exchanged(*pairs: tuple[str, str]) -> Plant:
    """Two tensors, or all those of two modules that differ in the beginning of the name."""

    def change(found: HF) -> None:
        before = dict(found)
        for one, other in [*pairs, *((other, one) for one, other in pairs)]:
            for name in (name for name in before if name.startswith(one)):
                found[name] = before[other + name.removeprefix(one)]

    return weights(change)


def stored(keys: Sequence[str], change: Change, layer: int | None = 1) -> Plant:
    """What a converter makes that puts Megatron parameters together wrongly, in one layer of a stack."""

    def plant(site: Site) -> Path:
        run = site.run
        for number, key in enumerate(keys):
            run = changed_run(run, site.target / str(number), key, _in_layer(change, layer))
        return run

    return plant


def _in_layer(change: Change, layer: int | None) -> Callable[[Tensor], object]:
    def work(stack: Tensor) -> None:
        part = stack if layer is None else stack[layer]
        part.copy_(change(part.clone()))

    return work


def settings(**values: Any) -> Plant:
    """What the checkpoint says of its model, in run_config.yaml; `vision_` for the tower's."""

    def plant(site: Site) -> Path:
        run = copied(site.run, site.target / "run")
        path = run / ITERATION / "run_config.yaml"
        config = yaml.safe_load(path.read_text())
        for name, value in values.items():
            inner = name.removeprefix("vision_")
            section = config["model"] if inner == name else config["model"]["vision_config"]
            assert section[inner] != value
            section[inner] = value
        path.write_text(yaml.safe_dump(config))
        return run

    return plant


def as_it_is(site: Site) -> Path:
    """A right checkpoint: the fault is in the code."""
    return site.run


# ---- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A mistake, and what must be found. Of `plant` and `change` one: into a checkpoint, into each live model of it.

    - `wrong`: the HF names of the tensors that differ, exactly; a name may end in `*`. `settings`: those of `Dims`.
    - `guess`: in what is said of those tensors. `function`: whether it changes what the model computes.
    - `place`: how the place where the models part begins; `blames`: what it says further on.
    """

    plant: Plant = as_it_is
    place: str = ""
    wrong: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    guess: str = ""
    blames: str = ""
    model: str = "dense"
    function: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any, pytest.MonkeyPatch], object] | None = None

    def planted(self, bases: Bases, target: Path) -> tuple[Path, Path]:
        """(the right folder, the wrong checkpoint)."""
        site = Site(bases, self.model, self.options, target)
        return site.folder, self.plant(site)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it the verifier builds models that are wrong, if the fault is one of code."""
        from qwen3vl_convert.verify.logits.programs import build_ours

        change = self.change

        def build_wrongly(*args: Any, **kwargs: Any) -> Any:
            model = build_ours(*args, **kwargs)
            if change is not None:
                change(model, patch)
            return model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qwen3vl_convert.verify.logits.traffic.build_ours", build_wrongly)
            yield
