"""The harness itself: what one world saves, another loads, in every way that Megatron-Core names its tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from oracles.megatron_world import (
    DENSE,
    MOE,
    Keys,
    Load,
    Save,
    Sizes,
    World,
    assemble,
    differences,
    random_tensor,
    run_world,
)

pytestmark = pytest.mark.megatron

SQUARE = Sizes(layers=2, hidden=32, heads=2, groups=2, head_dim=16, ffn=16, vocab=32)
ODD = Sizes(layers=3, hidden=20, heads=6, groups=2, head_dim=10, ffn=14, vocab=34)
SIZES = {
    "square": SQUARE,
    "odd": ODD,
    "moe-square": replace(SQUARE, experts=4, expert_ffn=16),
    "moe-odd": replace(ODD, experts=6, expert_ffn=10),
}
KEYS = {
    "stacked": Keys(),
    "unprefixed": Keys(prefix=""),
    "local-norm": Keys(te_norm=False),
    "non-homogeneous": Keys(non_homogeneous=True),
    "singleton": Keys(singleton=True),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_saved_in_one_layout_and_loaded_in_another(model: Sizes, keys: Keys, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000000"
    [saved] = run_world(World(tp=2, pp=2, ep=2), [Save(folder, model, keys)])
    [loaded] = run_world(World(), [Load(folder, model, keys)])
    tensors = assemble(saved)
    assert differences(assemble(loaded), tensors) == []
    assert differences(tensors, {key: random_tensor(key, value.shape) for key, value in tensors.items()}) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES.values(), ids=SIZES)
def test_sizes(model: Sizes, tmp_path: Path) -> None:
    [saved] = run_world(World(tp=2, ep=2), [Save(tmp_path, model)])
    [loaded] = run_world(World(etp=2), [Load(tmp_path, model)])
    assert differences(assemble(loaded), assemble(saved)) == []


def test_training_checkpoint_holds_more_than_weights(tmp_path: Path) -> None:
    [saved] = run_world(World(tp=2, pp=2, vpp=2), [Save(tmp_path, extras=True)])
    stored = FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata.keys()
    assert assemble(saved).keys() < stored
    assert {"rng_state/shard_1.1_2.2", "optimizer.state.exp_avg.language_model.output_layer.weight"} < stored
    [loaded] = run_world(World(), [Load(tmp_path)])
    assert differences(assemble(loaded), assemble(saved)) == []


def test_padding_rows_are_zero(tmp_path: Path) -> None:
    [saved] = run_world(World(tp=2), [Save(tmp_path, Sizes(vocab=640), used_vocab=512)])
    embedding = assemble(saved)["language_model.embedding.word_embeddings.weight"]
    assert embedding.shape == (640, 64)
    assert embedding[:512].all(dim=1).any()
    assert not embedding[512:].any()


def test_vocabulary_that_the_file_lacks_is_zero(tmp_path: Path) -> None:
    """Megatron-Core loads a vocabulary of any size without a word: tests must compare shapes and values."""
    run_world(World(), [Save(tmp_path)])
    [loaded] = run_world(World(), [Load(tmp_path, Sizes(vocab=640))])
    embedding = assemble(loaded)["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(embedding.any(dim=1), torch.arange(640) < 512)
