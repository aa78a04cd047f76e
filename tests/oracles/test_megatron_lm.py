"""Megatron-LM's own reader of checkpoint arguments, on what we write (its package is in megatron-core 0.19's wheel)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3vl_convert import ParallelLayout, RunOptions, hf_to_megatron, make_checkpoint

pytestmark = pytest.mark.megatron

READ = """
import argparse, json, sys
from megatron.training.checkpointing import load_args_from_checkpoint
asked = dict(load=None, ckpt_format="torch_dist", ckpt_step=None, iteration=0, finetune=False, load_optim=False,
             use_mp_args_from_checkpoint_args=True, use_tokenizer_model_from_checkpoint_args=False,
             exit_on_missing_checkpoint=True, auto_detect_ckpt_format=False, non_persistent_ckpt_type=None,
             dist_ckpt_strictness="assume_ok_unexpected", non_persistent_global_ckpt_dir=None, rampup_batch_size=None)
for folder in sys.argv[1:]:
    found = load_args_from_checkpoint(argparse.Namespace(**asked | {"load": folder}))
    found = found[0] if isinstance(found, tuple) else found
    print("FOUND" + json.dumps({k: v for k, v in vars(found).items() if k not in asked and v is not None}))
"""


def has_megatron_lm() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("megatron", "megatron.training"))


@pytest.mark.skipif(not has_megatron_lm(), reason="megatron.training comes with megatron-core 0.19 and later")
def test_use_checkpoint_args(tmp_path: Path) -> None:
    """`--load FOLDER --use-checkpoint-args --use-mp-args-from-checkpoint-args` finds the model's sizes."""
    make_checkpoint(tmp_path / "hf", "tiny-moe")
    layout = ParallelLayout(tp=2, pp=2, ep=2)
    folders = {iteration: tmp_path / f"of {iteration}" for iteration in (0, "release")}
    for iteration, folder in folders.items():
        hf_to_megatron(tmp_path / "hf", folder, layout=layout, iteration=iteration, run=RunOptions(fsync=False))
    command = [sys.executable, "-W", "ignore", "-c", READ, *map(str, folders.values())]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "num_experts": 8, "moe_ffn_hidden_size": 48, "moe_router_topk": 2, "position_embedding_type": "mrope",
        "normalization": "RMSNorm", "swiglu": True, "untie_embeddings_and_output_weights": True,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2,
        "add_position_embedding": True,
    }  # fmt: skip
    said = [json.loads(line.removeprefix("FOUND")) for line in output.splitlines() if line.startswith("FOUND")]
    assert [{key: found[key] for key in expected} for found in said] == [expected] * len(folders)
