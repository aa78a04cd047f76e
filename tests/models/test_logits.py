"""Our model on Megatron-Core computes what transformers computes, in float32 on a CPU, from the same folder.

Every prompt of `prompts`, by a dense model, one with tied embeddings and one of experts. That the comparison can tell
is shown by the faults of `planted`: each is made in the live model, and must come out as a difference.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from models.planted import FAULTS, lively_checkpoint
from models.prompts import MAKERS, Prompt, make_prompt
from models.sides import load_theirs, our_logits, their_logits
from qwen3vl_convert.make import SIZES

pytest.importorskip("transformers")

pytestmark = [pytest.mark.megatron, pytest.mark.transformers]

TOLERANCE = 2e-5
"""The greatest difference of two logits. Sums in another order make up to a quarter of it, with these weights, and the
least of the faults 35 times as much.
"""

MODELS = {"dense": SIZES["tiny"], "tied": replace(SIZES["tiny"], tied=True), "moe": SIZES["tiny-moe"]}


@dataclass(frozen=True)
class Pair:
    """The same weights in both programs."""

    ours: Any
    theirs: Any

    def difference(self, prompt: Prompt) -> float:
        """The greatest, over all tokens that are no padding."""
        with torch.no_grad():
            ours, theirs = our_logits(self.ours, prompt), their_logits(self.theirs, prompt)
        assert ours.shape == theirs.shape
        assert theirs[prompt.valid].std(dim=-1).min() > 0.1, "logits that are all the same compare nothing"
        return float((ours - theirs)[prompt.valid].abs().max())


def prompt_for(pair: Pair, name: str) -> Prompt:
    return make_prompt(name, pair.theirs.config.to_dict())


def build_ours(bridge: Any) -> Any:
    provider = bridge.to_megatron_provider()
    provider.finalize()
    model = provider.provide()
    bridge.load_hf_weights(model)
    return model.eval()


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Both models by name, each built once, in a world of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core at import, of what is not installed and of its own old names
        pytest.importorskip("megatron.core")
        from qwen3vl_convert.models import AutoBridge, single_process

    @cache
    def pair(name: str) -> Pair:
        folder = lively_checkpoint(tmp_path_factory.mktemp("model") / name, MODELS[name])
        return Pair(build_ours(AutoBridge.from_hf_pretrained(folder)), load_theirs(folder))

    with single_process():
        yield pair


@pytest.mark.parametrize("prompt", MAKERS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, prompt: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    assert pair.difference(prompt_for(pair, prompt)) <= TOLERANCE


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault in FAULTS for name in FAULTS[fault].models])
def test_a_planted_fault_is_seen(
    fault: str, name: str, pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin, so that a fault is not seen by chance."""
    pair = pair_of(name)
    prompt = prompt_for(pair, FAULTS[fault].prompt)
    FAULTS[fault].plant(pair.ours, monkeypatch)
    assert pair.difference(prompt) > 10 * TOLERANCE
