"""One rank of a `megatron_world`: builds its part of the model and carries the jobs out. Runs in its own process.

Nothing of megatron is imported before `rank_main` runs: the tests import this module by name to start it.
"""

import argparse
import contextlib
import inspect
import logging
import queue
import random
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed
from torch.distributed.checkpoint.api import CheckpointException

from oracles.megatron_world import Job, Keys, Load, Save, Shard, Sizes, World, random_tensor

State = dict[str, Any]

LOCAL_NORM = "mlp.linear_fc1.layer_norm_"
TE_NORM = "pre_mlp_layernorm."


def rank_main(rank: int, world: World, jobs: list[Job], meeting_point: Path) -> None:
    """Entry point of a process: join the world, do the jobs, leave what each gave in `rank{rank}.pt`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with cpu_for_cuda(), parallel(world, rank, meeting_point / "store"):
        torch.save([carry_out(job, world) for job in jobs], meeting_point / f"rank{rank}.pt")


@contextlib.contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Stand-ins for the calls that Megatron-Core makes of a GPU whatever it was told. All of them, and only here."""
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
    ):
        yield


@contextlib.contextmanager
def parallel(world: World, rank: int, store: Path) -> Iterator[None]:
    """Megatron-Core's process groups under gloo. They meet at a file: ports could clash between tests."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world.size, timeout=timedelta(seconds=120)
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        virtual_pipeline_model_parallel_size=world.vpp,
        expert_model_parallel_size=world.ep,
        expert_tensor_parallel_size=world.etp,
    )
    yield  # on an error the process ends, and with it the world: nothing to clean up in an orderly way
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def carry_out(job: Job, world: World) -> list[Shard]:
    """Do one job; what this rank's modules hold afterwards."""
    chunks = build(job.model, world)
    try:
        load(job, chunks) if isinstance(job, Load) else save(job, chunks)
    except CheckpointException as error:  # no Exception, so that it would end the process without a word
        raise RuntimeError(str(error)) from error
    return [shard_of(tensor) for tensor in stored_tensors(chunks, job.keys)]


# ---- the model -------------------------------------------------------------------------------------------------------


def build(model: Sizes, world: World) -> list[Any]:
    """This rank's part of the decoder: one GPTModel, or one per virtual stage."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=model.experts, qk_layernorm=True, normalization="RMSNorm")
    config = transformer_config(model, world)
    return [build_chunk(model, config, spec, stage) for stage in ([None] if world.vpp is None else range(world.vpp))]


def transformer_config(model: Sizes, world: World) -> Any:
    """What Qwen3's text decoder is to Megatron-Core."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe = {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_router_topk": model.top_k,
        "expert_model_parallel_size": world.ep,
        "expert_tensor_parallel_size": world.etp,
    }
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        virtual_pipeline_model_parallel_size=world.vpp,
        **(moe if model.experts else {}),
    )


def build_chunk(model: Sizes, config: Any, spec: Any, stage: int | None) -> Any:
    """One GPTModel with NaN in every weight, so that one that is not loaded cannot pass for one that is."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    chunk = GPTModel(
        config,
        spec,
        vocab_size=model.vocab,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="none",
        vp_stage=stage,
    )
    chunk.bfloat16()  # torch's norms come in float32, and trainers do this too
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))
    return chunk


# ---- its state -------------------------------------------------------------------------------------------------------


def sharded_state(chunks: list[Any], keys: Keys) -> dict[str, State]:
    """What `dist_checkpointing` takes, as trainers pass it: `model`, or `model0`, `model1` for virtual stages."""
    names = ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]
    states = {
        name: chunk.sharded_state_dict(prefix=keys.prefix, metadata=dict(keys.metadata))
        for name, chunk in zip(names, chunks, strict=True)
    }
    if keys.te_norm and chunks[0].config.num_moe_experts:
        for state in states.values():
            name_norms_as_transformer_engine_does(state)
    return states


def name_norms_as_transformer_engine_does(state: State) -> None:
    """Undo the local spec's renaming of a MoE's norm.

    That spec names the norm before the MLP after the linear layer that Transformer Engine fuses it into. In a MoE
    there is no such layer and Transformer Engine stores a norm of its own: what is published has that name.
    """
    for sharded in state.values():
        if LOCAL_NORM in sharded.key:
            sharded.key = sharded.key.replace(LOCAL_NORM, TE_NORM)


def stored_tensors(chunks: list[Any], keys: Keys) -> list[Any]:
    """Every ShardedTensor of this rank, over the parameters' own memory; gate and up apart, as they are stored."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded_state(chunks, keys)
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def shard_of(tensor: Any) -> Shard:
    """A ShardedTensor as a value that outlives the process."""
    data = tensor.data.detach().clone()
    return Shard(
        tensor.key,
        tuple(map(int, tensor.global_offset)),
        tuple(map(int, tensor.global_shape)),
        data.reshape((1,) * tensor.prepend_axis_num + tuple(data.shape)),
    )


# ---- the jobs --------------------------------------------------------------------------------------------------------


def load(job: Load, chunks: list[Any]) -> None:
    """Strictly twice: every key that the model asks for is in the file, and fills every parameter of the modules."""
    from megatron.core import dist_checkpointing

    asked = sharded_state(chunks, job.keys)
    loaded = dist_checkpointing.load(dict(asked), str(job.folder))
    for name, chunk in zip(asked, chunks, strict=True):
        chunk.load_state_dict({key.removeprefix(job.keys.prefix): value for key, value in loaded[name].items()})


def save(job: Save, chunks: list[Any]) -> None:
    """Fill the weights and save them, with a common dictionary as trainers write it."""
    from megatron.core import dist_checkpointing

    fill(job, chunks)
    job.folder.mkdir(parents=True, exist_ok=True)
    state: State = {"checkpoint_version": 3.0, "iteration": 0, **sharded_state(chunks, job.keys)}
    if job.extras:
        state |= training_state(chunks, job.keys)
    torch.distributed.barrier()
    with results_in_this_process():
        dist_checkpointing.save(state, str(job.folder), content_metadata=dict(job.keys.metadata), **own_writer())


def own_writer() -> State:
    """Later releases write through an optional package unless told not to."""
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


@contextlib.contextmanager
def results_in_this_process() -> Iterator[None]:
    """A plain queue for what the writer reports to itself, which else takes a server process that starts in seconds."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with mock.patch.object(filesystem_async, "_results_queue", queue.Queue()):
        yield


def fill(job: Save, chunks: list[Any]) -> None:
    """Cut each rank's weights from the same global tensors."""
    with torch.no_grad():
        for sharded in stored_tensors(chunks, job.keys):
            values = random_tensor(sharded.key, sharded.global_shape, job.seed)
            if job.used_vocab is not None and ("word_embeddings" in sharded.key or "output_layer" in sharded.key):
                values[job.used_vocab :] = 0
            sharded.data.copy_(values[shard_of(sharded).where].reshape(sharded.data.shape))


def training_state(chunks: list[Any], keys: Keys) -> State:
    """What else lies in a training checkpoint and is not a weight."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank()
    return {
        "args": training_arguments(chunks[0].config),
        "optimizer": {name: optimizer_tensors(name, chunks, keys) for name in ("fp32_param", "exp_avg")},
        "rng_state": ShardedObject("rng_state", [random_states()], (pp_size, tp_size), (pp, tp), replica_id=replica),
    }


def training_arguments(config: Any) -> argparse.Namespace:
    """A little of each type that real ones hold."""
    from megatron.core.transformer.enums import AttnBackend

    return argparse.Namespace(
        num_layers=config.num_layers,
        lr=1e-4,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
    )


def optimizer_tensors(name: str, chunks: list[Any], keys: Keys) -> list[Any]:
    """One tensor per weight, cut as the weights are."""
    return [
        replace(tensor, key=f"optimizer.state.{name}.{tensor.key}", data=tensor.data.float(), dtype=torch.float)
        for tensor in stored_tensors(chunks, keys)
    ]


def random_states() -> State:
    """Pickles of tuples, arrays and byte tensors, under Megatron-LM's names."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
