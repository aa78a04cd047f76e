"""Training: gradients are transformers' own, steps lower the loss, frozen parts stay, and what was trained is saved.

All in float32 on a CPU, in one process, from the same folder as transformers. `docs/training.md` is run as it stands.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from launcher import torchrun
from models.planted import lively_checkpoint
from models.prompts import Prompt, make_prompt
from models.sides import load_theirs, our_inputs, our_logits, their_logits, transformers_release
from qwen3vl_convert.make import SIZES
from reference import load_huggingface

pytest.importorskip("transformers")

pytestmark = pytest.mark.megatron

EXPERTS = "v5" if transformers_release() >= (5, 2) else "hub"
"""How transformers holds experts in memory."""
TOLERANCE = 1e-4
"""Of gradients: the greatest difference in a tensor, as a share of its largest value. Found are up to 1e-5."""
STEPS = 1e-3
"""Of weights after steps of Adam, which makes as much of a gradient near zero as of a large one."""
SAME = 1e-6
"""The same where both sides are ours, and sums are done in another order at most."""
LOGITS = 2e-5

MODELS = {"dense": SIZES["tiny"], "tied": replace(SIZES["tiny"], tied=True), "moe": SIZES["tiny-moe"]}
ALL = {"freeze_language_model": False, "freeze_vision_model": False, "freeze_vision_projection": False}
PARTS = ("freeze_language_model", "freeze_vision_model", "freeze_vision_projection")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


# ---- models and batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A model on Megatron-Core, filled, with the bridge that filled it."""

    bridge: Any
    model: Any

    def prompt(self, name: str) -> Prompt:
        return make_prompt(name, self.bridge.hf_config)

    def losses(self, prompt: Prompt) -> Tensor:
        """Of each token [B, S]."""
        losses: Tensor = self.model(**our_inputs(prompt), labels=labels_of(prompt))
        return losses

    def loss(self, prompt: Prompt) -> Tensor:
        return mean(self.losses(prompt), prompt)

    def exported(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.bridge.export_hf_weights(self.model)}

    def gradients(self) -> dict[str, Tensor]:
        """By transformers' names and in its shapes: what is exported once gradients stand where weights stood."""
        kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.grad)
            named = self.bridge.export_hf_weights(self.model, experts_layout=EXPERTS)
            found = {name: tensor.clone() for name, tensor in named}
            for parameter, weight in zip(self.model.parameters(), kept, strict=True):
                parameter.copy_(weight)
        return found


def labels_of(prompt: Prompt) -> Tensor:
    """The token after each; what that is after the last is nothing that `counted` lets in."""
    return prompt.input_ids.roll(-1, dims=1)


def counted(prompt: Prompt) -> Tensor:
    """[B, S]: tokens that another one follows, in their own sequence."""
    followed = prompt.valid & prompt.valid.roll(-1, dims=1)
    followed[:, -1] = False
    if prompt.alone:
        followed[:, prompt.cu_seqlens[1:].long() - 1] = False
    return followed


def mean(losses: Tensor, prompt: Prompt) -> Tensor:
    return losses[counted(prompt)].mean()


def their_losses(model: Any, prompt: Prompt) -> Tensor:
    """Of each token [B, S], by transformers."""
    return functional.cross_entropy(their_logits(model, prompt).transpose(1, 2), labels_of(prompt), reduction="none")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by name, each written once."""
    return cache(lambda name: lively_checkpoint(tmp_path_factory.mktemp("model") / name, MODELS[name]))


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    """Process groups for one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core at import, of what is not installed and of its own old names
        pytest.importorskip("megatron.core")
        import megatron.core.dist_checkpointing
        import megatron.core.optimizer  # noqa: F401

        from qwen3vl_convert.models import single_process
    with single_process():
        yield


def built(folder: Path, **settings: Any) -> Ours:
    """All parts in training and no auxiliary loss, unless the settings say otherwise."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for name, value in {**ALL, "moe_aux_loss_coeff": 0.0, **settings}.items():
        setattr(provider, name, value)
    model = provider.provide()
    bridge.load_hf_weights(model)
    return Ours(bridge, model.train())


# ---- gradients -------------------------------------------------------------------------------------------------------


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst tensor's greatest difference, as a share of its largest value. Experts that got no token have zeros."""
    assert found.keys() == expected.keys()
    silent = {name for name, tensor in expected.items() if not tensor.any()}
    assert silent == {name for name, tensor in found.items() if not tensor.any()}
    assert [name for name in silent if ".local_experts." not in name] == []
    shares = {n: largest(found[n] - expected[n]) / largest(expected[n]) for n in expected.keys() - silent}
    return max(shares.values())


def both_gradients(ours: Ours, folder: Path, prompt: Prompt) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the mean loss, ours and transformers', after a check that the losses themselves are the same."""
    losses = ours.losses(prompt)
    mean(losses, prompt).backward()
    other = load_theirs(folder)
    expected = their_losses(other, prompt)
    mean(expected, prompt).backward()
    assert losses.shape == prompt.input_ids.shape
    torch.testing.assert_close(losses[counted(prompt)], expected[counted(prompt)], rtol=0, atol=LOGITS)
    return ours.gradients(), {name: parameter.grad for name, parameter in other.named_parameters()}


@pytest.mark.transformers
@pytest.mark.parametrize("prompt", ["mixed", "padded left", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_are_those_of_transformers(
    name: str, prompt: str, folder_of: Callable[[str], Path]
) -> None:
    ours = built(folder_of(name))
    found, expected = both_gradients(ours, folder_of(name), ours.prompt(prompt))
    assert distance(found, expected) <= TOLERANCE


@pytest.mark.parametrize("part", [0, 1], ids=["features", "first deepstack feature"])
def test_half_a_gradient_is_seen(part: int, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the same, and not all of what is due reaches the tower."""
    ours = built(folder_of("dense"))
    features = ours.model._features

    def halved(visual: Any) -> Tensor:
        whole = features(visual)
        return torch.stack([(x + x.detach()) / 2 if number == part else x for number, x in enumerate(whole)])

    monkeypatch.setattr(ours.model, "_features", halved)
    found, expected = both_gradients(ours, folder_of("dense"), ours.prompt("mixed"))
    assert distance(found, expected) > 100 * TOLERANCE


# ---- recompute -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recompute:
    """Settings of activation recompute, and which modules run again: how many of each tower of four layers."""

    granularity: str
    module: str
    again: int
    method: str | None = None
    layers: int | None = None
    modules: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        settings = {
            "recompute_granularity": self.granularity,
            "recompute_method": self.method,
            "recompute_num_layers": self.layers,
        }
        return {**settings, "recompute_modules": list(self.modules)} if self.modules else settings


LAYER, ATTENTION = "", ".self_attention.core_attention"
RECOMPUTES = {
    "uniform, each layer": Recompute("full", LAYER, 4, "uniform", 1),
    "uniform, by twos": Recompute("full", LAYER, 4, "uniform", 2),
    "block, one layer": Recompute("full", LAYER, 1, "block", 1),
    "block, three layers": Recompute("full", LAYER, 3, "block", 3),
    "selective": Recompute("selective", ATTENTION, 4),
}


def runs(model: Any, module: str, step: Callable[[], None]) -> tuple[int, int]:
    """How often a module of the text layers, and of the vision layers, runs in a step."""
    counts = [0, 0]

    def counting(tower: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[tower] += 1

        return count

    hooks = [
        layer.get_submodule(module.removeprefix(".")).register_forward_pre_hook(counting(tower))
        for tower, part in enumerate((model.language_model, model.vision_model))
        for layer in part.decoder.layers
    ]
    step()
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1]


def named_gradients(ours: Ours) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in ours.model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("prompt", ["mixed", "packed"])
@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("kind", RECOMPUTES)
def test_recompute_changes_neither_loss_nor_gradients(
    kind: str, name: str, prompt: str, folder_of: Callable[[str], Path]
) -> None:
    recompute = RECOMPUTES[kind]
    plain, sparing = built(folder_of(name)), built(folder_of(name), **recompute.settings)
    batch = plain.prompt(prompt)

    def step(ours: Ours) -> Callable[[], None]:
        return lambda: ours.loss(batch).backward()

    assert runs(plain.model, recompute.module, step(plain)) == (4, 4)
    assert runs(sparing.model, recompute.module, step(sparing)) == (4 + recompute.again, 4 + recompute.again)
    assert sparing.loss(batch).item() == plain.loss(batch).item()
    assert len(named_gradients(plain)) == len(list(plain.model.parameters()))
    assert distance(named_gradients(sparing), named_gradients(plain)) <= SAME


@pytest.mark.parametrize("frozen", [PARTS[:1], PARTS[:2], PARTS[1:], PARTS[1:2]], ids=" ".join)
def test_recompute_of_frozen_parts(frozen: tuple[str, ...], folder_of: Callable[[str], Path]) -> None:
    """Megatron-Core's recompute gives no gradients where nothing that enters has one; what is trained gets its own."""
    settings = dict.fromkeys(frozen, True)
    plain = built(folder_of("dense"), **settings)
    sparing = built(folder_of("dense"), **settings, **RECOMPUTES["uniform, each layer"].settings)
    for ours in (plain, sparing):
        ours.loss(ours.prompt("mixed")).backward()
    assert named_gradients(plain).keys() == {n for n, p in plain.model.named_parameters() if p.requires_grad}
    assert distance(named_gradients(sparing), named_gradients(plain)) <= SAME


# ---- steps -----------------------------------------------------------------------------------------------------------


def train(ours: Ours, prompt: Prompt, steps: int) -> list[float]:
    """Losses before each step and after the last. The optimizer is given all parameters, frozen ones too."""
    optimizer = torch.optim.AdamW(ours.model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ours.loss(prompt)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, ours.loss(prompt).item()]


@pytest.mark.parametrize("name", MODELS)
def test_steps_lower_the_loss(name: str, folder_of: Callable[[str], Path]) -> None:
    ours = built(folder_of(name), **({"moe_aux_loss_coeff": 1e-3} if name == "moe" else {}))
    losses = train(ours, ours.prompt("mixed"), 4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def part_of(name: str) -> str:
    """Which setting freezes a tensor of the Hugging Face folder."""
    if not name.startswith("model.visual."):
        return "freeze_language_model"
    projection = name.startswith(("model.visual.merger.", "model.visual.deepstack_merger_list."))
    return "freeze_vision_projection" if projection else "freeze_vision_model"


FREEZES = [(), *((part,) for part in PARTS), PARTS[:2], PARTS[::2], PARTS[1:]]


@pytest.mark.parametrize(
    ("name", "frozen"),
    [*(("dense", frozen) for frozen in FREEZES), ("tied", PARTS[:1]), ("tied", PARTS[1:]), ("moe", PARTS[1:])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_trained_parts_move_and_are_saved_and_no_others(
    name: str, frozen: tuple[str, ...], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(name)
    ours = built(folder, **dict.fromkeys(frozen, True))
    train(ours, ours.prompt("mixed"), 1)
    ours.bridge.save_hf_pretrained(ours.model, tmp_path / "trained")
    before, after = load_huggingface(folder), load_huggingface(tmp_path / "trained")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if part_of(name) not in frozen}
    exported = ours.exported()
    assert [name for name in after if not torch.equal(exported[name], after[name])] == []


@pytest.mark.transformers
@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_the_same_model_in_transformers(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    ours = built(folder_of(name))
    prompt = ours.prompt("mixed")
    losses = train(ours, prompt, 2)
    ours.bridge.save_hf_pretrained(ours.model, tmp_path / "trained")
    with torch.no_grad():
        found, expected = ours.losses(prompt), their_losses(load_theirs(tmp_path / "trained"), prompt)
        logits = our_logits(ours.model.eval(), prompt)
        other = their_logits(load_theirs(tmp_path / "trained"), prompt)
    assert mean(found, prompt).item() < losses[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)
    torch.testing.assert_close(logits, other, rtol=0, atol=LOGITS)


# ---- the page --------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHANGE = {"ParallelLayout()": "ParallelLayout(tp=2)", "world.settings()": "world.settings(sequence_parallel=True)"}


def run_python(folder: Path, *arguments: str) -> None:
    """As a user does, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def page() -> list[str]:
    """Its blocks. Models are made in the first, trained in the second."""
    return BLOCK.findall(PAGE.read_text())


@pytest.fixture(scope="module")
def after_the_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page was run in, all of it. Not as a file: processes that save would run it too."""
    folder = tmp_path_factory.mktemp("page")
    run_python(folder, "-c", "".join(page()) + 'torch.save([losses, answer], "results.pt")\n')
    return folder


def test_the_page_trains_and_saves(after_the_page: Path) -> None:
    losses, _ = torch.load(after_the_page / "results.pt")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    before, after = load_huggingface(after_the_page / "tiny"), load_huggingface(after_the_page / "trained")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    again = load_huggingface(after_the_page / "from-run")
    assert [name for name in after if not torch.equal(after[name], again[name])] == []


def test_the_page_answers_as_transformers_does(after_the_page: Path) -> None:
    answer = torch.cat(torch.load(after_the_page / "results.pt")[1], dim=1)
    ids = torch.tensor([[11, 12, 13, 502, *[500] * 6, 503, 21, 22, 23, 24, 25]])
    pixels = torch.randn(24, 1536, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    if transformers_release() >= (5, 0):
        inputs["mm_token_type_ids"] = (ids == 500).long()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = load_theirs(after_the_page / "trained").generate(**inputs, **options)
    assert torch.equal(answer, expected[:, ids.shape[1] :])


@pytest.mark.slow
def test_the_page_under_torchrun_is_the_same_training(after_the_page: Path, tmp_path: Path) -> None:
    """With the change that it says."""
    code = page()[1]
    for before, after in CHANGE.items():
        assert f"`{before}` becomes `{after}`" in PAGE.read_text()
        assert code.count(before) == 1
        code = code.replace(before, after)
    shutil.copytree(after_the_page / "tiny", tmp_path / "tiny")
    (tmp_path / "page.py").write_text(code)
    done = torchrun("page.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    trained, expected = (load_huggingface(folder / "trained") for folder in (tmp_path, after_the_page))
    assert distance(trained, expected) <= STEPS
