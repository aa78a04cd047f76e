"""One rank of the bridge's tests: builds its part of the real model, and moves weights in and out. Jobs for
`parallel.run_ranks`.

Whoever judges is outside of the program: Megatron-Core's own loader, `reference.expected_megatron`, safetensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from oracles.megatron_world import Keys, Load, differences
from reference import expected_megatron, load_huggingface

PLAIN = Keys(prefix="", te_norm=False)
"""The real model names its keys itself."""


@dataclass(frozen=True)
class Case:
    """A checkpoint and how its model is built. `megatron`: the same weights as Megatron-Core's loader takes them."""

    folder: Path
    work: Path
    megatron: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    """Rows of the vocabulary with padding."""
    layout: str = "hub"


# ---- the model -------------------------------------------------------------------------------------------------------


def build(world: Any, case: Case, bridge: Any = None) -> list[Any]:
    """This rank's part, a model or one per virtual stage, with NaN in every weight."""
    from qwen3vl_convert.models import AutoBridge

    provider = (bridge or AutoBridge.from_hf_pretrained(case.folder)).to_megatron_provider()
    for name, value in (world.settings() | case.settings).items():
        setattr(provider, name, value)
    provider.finalize()
    chunks = [provider.provide(vp_stage=stage) for stage in world.stages]
    poison(chunks)
    return chunks


def poison(chunks: list[Any]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def held(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Every parameter of this rank."""
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def passed(chunks: list[Any]) -> Any:
    """As users pass it: a model, or a list."""
    return chunks[0] if len(chunks) == 1 else chunks


@contextmanager
def windows() -> Iterator[list[tuple[str, int, int]]]:
    """(file, first byte, bytes) of all that is mapped of the source meanwhile."""
    import mmap

    seen: list[tuple[str, int, int]] = []

    class Counted(mmap.mmap):
        def __new__(cls, descriptor: int, length: int, **options: Any) -> "Counted":
            seen.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, options.get("offset", 0), length))
            return super().__new__(cls, descriptor, length, **options)

    with mock.patch.object(mmap, "mmap", Counted):
        yield seen


# ---- what is asked of it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trip:
    """What a rank saw: bytes that it read, mapped and was to hold, windows into the source, names in their order."""

    read_bytes: int
    mapped_bytes: int
    own_bytes: int
    windows: list[tuple[str, int, int]]
    names: list[str]


def round_trip(world: Any, case: Case) -> Trip:
    """In, compared with two judges; out, streamed and as a folder."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    chunks = build(world, case, bridge)
    with windows() as seen:
        loaded = bridge.load_hf_weights(passed(chunks))
    ours = held(chunks)
    compare_with_reference(chunks, case, bridge)
    compare_with_megatron(chunks, case, ours)
    exported = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(passed(chunks), check_replicas=True)}
    source = load_huggingface(case.folder)
    assert not differences(exported, source)
    bridge.save_hf_pretrained(passed(chunks), case.work)
    own = sum(tensor.nbytes for tensor in ours.values()) - padding_bytes(chunks, case)
    return Trip(loaded.read_bytes, loaded.mapped_bytes, own, seen, list(exported))


def compare_with_reference(chunks: list[Any], case: Case, bridge: Any) -> None:
    """Every shard is that part of the tensor that the reference made by hand."""
    from oracles.megatron_rank import shard_of, stored_tensors

    source = load_huggingface(case.folder)
    if case.layout == "v5":  # the reference knows the published layout
        source = {name: tensor.mT if ".experts." in name else tensor for name, tensor in source.items()}
    expected = expected_megatron(source, bridge.source.dims, case.rows)
    for shard in map(shard_of, stored_tensors(chunks, PLAIN)):
        assert not differences({shard.key: shard.data}, {shard.key: expected[shard.key][shard.where]})


def compare_with_megatron(chunks: list[Any], case: Case, ours: dict[str, torch.Tensor]) -> None:
    """Every parameter is what Megatron-Core's own loader reads from the converted checkpoint."""
    from oracles.megatron_rank import load

    assert case.megatron is not None
    poison(chunks)
    load(Load(case.megatron, keys=PLAIN), chunks)
    assert not differences(held(chunks), ours)


def padding_bytes(chunks: list[Any], case: Case) -> int:
    """Bytes of this rank's rows of the vocabulary that lie beyond it."""
    from oracles.megatron_rank import shard_of, stored_tensors

    rows = 0
    for shard in map(shard_of, stored_tensors(chunks, PLAIN)):
        if shard.key.endswith(("word_embeddings.weight", "output_layer.weight")) and case.rows:
            vocab = load_huggingface(case.folder)["model.language_model.embed_tokens.weight"].shape[0]
            rows += max(0, shard.offset[0] + len(shard.data) - max(vocab, shard.offset[0])) * shard.data[0].nbytes
    return rows


def said(step: Callable[[], object]) -> tuple[str, str]:
    """(type, message) of what a step raises, or nothing."""
    try:
        step()
    except Exception as error:  # noqa: BLE001  what it is, is what the test looks at
        return type(error).__name__, str(error)
    return "", ""


def failures(world: Any, case: Case) -> dict[str, tuple[str, str]]:
    """What goes wrong on one rank is raised on both, and leaves nothing behind."""
    from qwen3vl_convert.errors import OutputError
    from qwen3vl_convert.models import AutoBridge
    from qwen3vl_convert.models import saving as module
    from qwen3vl_convert.models.live import Export

    first = torch.distributed.get_rank() == 0
    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    found = {}
    for name, here in (("unknown parameter", first), ("unknown replica", not first)):
        if here:
            model.language_model.extra = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        found[name] = said(lambda: bridge.load_hf_weights(model))
        if here:
            del model.language_model.extra
    keys = model.sharded_state_dict
    if not first:
        model.sharded_state_dict = lambda *a, **k: {n: v for n, v in keys(*a, **k).items() if "k_layernorm" not in n}
    found["hidden replica"] = said(lambda: bridge.load_hf_weights(model))
    model.sharded_state_dict = keys
    assert all(parameter.isnan().all() for parameter in model.parameters()), "touched"
    bridge.load_hf_weights(model)

    written = []

    def full(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 5:
            raise OutputError("disk full")

    with mock.patch.object(module, "write_from", full), mock.patch.object(module, "check_written", lambda *_: None):
        found["disk full"] = said(lambda: bridge.save_hf_pretrained(model, case.work / "full"))
    place = Export._place

    def broken(export: Export, link: Any, bits: torch.Tensor, job: Any) -> None:
        if not first and "norm" in job.name:
            raise RuntimeError("no memory left")
        place(export, link, bits, job)

    with mock.patch.object(Export, "_place", broken):
        found["second rank"] = said(lambda: bridge.save_hf_pretrained(model, case.work / "second"))
    norm = model.language_model.decoder.final_layernorm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.add_(0 if first else 1)
    found["replica"] = said(lambda: bridge.save_hf_pretrained(model, case.work / "replica"))
    with torch.no_grad():
        norm.copy_(kept)
    found["exists"] = said(lambda: bridge.save_hf_pretrained(model, case.folder))
    found["nothing"] = said(lambda: bridge.save_hf_pretrained(model, case.work / "good"))
    found["only rank 0"] = ("", str(sum(1 for _ in bridge.export_hf_weights(model, only_rank0=True))))
    return found


def half_a_model(world: Any, case: Case) -> list[tuple[str, str]]:
    """The first virtual stage of each rank without the second."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    chunks = build(world, case, bridge)
    return [said(lambda: bridge.load_hf_weights(chunks[:1])), said(lambda: list(bridge.export_hf_weights(chunks[:1])))]


def expert_mappings(world: Any, case: Case) -> int:
    """Both methods of the document on the modules of a live model: this rank's part in, the whole out, every expert."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    bridge.load_hf_weights(model)
    source, checked = load_huggingface(case.folder), 0
    layout = opened(bridge).model.experts_layout
    for number, layer in enumerate(model.language_model.decoder.layers):
        experts = layer.mlp.experts
        first = experts.ep_group.rank() * len(experts.local_experts)
        for local, expert in enumerate(experts.local_experts):
            for linear, projection in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                name = f"language_model.decoder.layers.{number}.mlp.experts.{linear}.weight{first + local}"
                fused = source[f"model.language_model.layers.{number}.mlp.experts.{projection}"]
                mapping = bridge.mapping_registry().with_experts(layout).lookup(name).mapping
                module = getattr(expert, linear)
                mine = mapping.hf_to_megatron(fused, module, e=first + local)
                assert torch.equal(mine, module.weight)
                whole = mapping.megatron_to_hf(module.weight.detach(), module)
                assert isinstance(whole, torch.Tensor)
                assert torch.equal(whole, fused[first + local])
                checked += 1
    return checked


def opened(bridge: Any) -> Any:
    """The checkpoint that a bridge was made of."""
    assert bridge.source.opened is not None
    return bridge.source.opened


def refusals(world: Any, case: Case) -> dict[str, tuple[str, str]]:
    """What a load does with tensors that are missing, too many or of another shape; no parameter may be touched."""
    from qwen3vl_convert.models import AutoBridge

    def load(folder: Path = case.folder, **options: Any) -> tuple[str, str]:
        return said(lambda: AutoBridge.from_hf_pretrained(folder).load_hf_weights(model, **options))

    model = build(world, case)[0]
    found = {folder.name: load(folder) for folder in sorted(case.work.iterdir())}
    keys = model.sharded_state_dict

    def without_norm(*arguments: Any, **options: Any) -> Any:
        return {key: value for key, value in keys(*arguments, **options).items() if "final_layernorm" not in key}

    model.sharded_state_dict = without_norm
    found["hidden parameter"] = load()
    model.sharded_state_dict = keys

    def copied(*arguments: Any, **options: Any) -> Any:
        state = keys(*arguments, **options)
        norm = state["language_model.decoder.final_layernorm.weight"]
        norm.data = norm.data.detach().clone()
        return state

    model.sharded_state_dict = copied
    found["copy"] = load()
    model.sharded_state_dict = keys
    model.language_model.adapter = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    found["adapter"] = load()
    del model.language_model.adapter
    found["no model"] = said(lambda: AutoBridge.from_hf_pretrained(case.folder).load_hf_weights(torch.nn.Linear(2, 2)))
    config_only = AutoBridge.from_hf_config(AutoBridge.from_hf_pretrained(case.folder).hf_config)
    found["no weights"] = said(lambda: config_only.load_hf_weights(model))
    assert all(parameter.isnan().all() for parameter in model.parameters()), "touched"
    config_only.load_hf_weights(model, case.folder)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    return found


def wider(world: Any, case: Case) -> dict[str, Any]:
    """A bfloat16 folder in a float32 model: in exactly, out as the source or as it is."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    bridge.load_hf_weights(model)
    source = load_huggingface(case.folder)
    assert not differences(dict(bridge.export_hf_weights(model)), source)
    kept = dict(bridge.export_hf_weights(model, dtype="keep"))
    assert not differences(kept, {name: tensor.float() for name, tensor in source.items()})
    bridge.save_hf_pretrained(model, case.work / "kept", dtype="keep")
    half = dict(bridge.export_hf_weights(model, dtype="fp16"))
    assert not differences(half, {name: tensor.half() for name, tensor in source.items()})
    with torch.no_grad():
        model.language_model.decoder.final_layernorm.weight[3] = 1e30
    return {"overflow": said(lambda: list(bridge.export_hf_weights(model, dtype="fp16")))}


def narrower(world: Any, case: Case) -> dict[str, Any]:
    """A float32 folder in a bfloat16 model: refused, or rounded when that is asked for."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    refused = said(lambda: bridge.load_hf_weights(model))
    assert all(parameter.isnan().all() for parameter in model.parameters()), "touched"
    bridge.load_hf_weights(model, allow_dtype_cast=True)
    expected = {name: tensor.bfloat16() for name, tensor in load_huggingface(case.folder).items()}
    assert not differences(dict(bridge.export_hf_weights(model, dtype="keep")), expected)
    return {"refused": refused}


def other_layouts(world: Any, case: Case) -> None:
    """Experts in every layout that can be written, from a model that was filled from the hub's; and in small pieces."""
    from qwen3vl_convert.models import AutoBridge
    from qwen3vl_convert.models.live import load_weights

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    load_weights(model, opened(bridge), piece_bytes=1000)
    hub = load_huggingface(case.folder)
    v5 = dict(bridge.export_hf_weights(model, experts_layout="v5"))
    assert not differences(v5, {name: tensor.mT if ".experts." in name else tensor for name, tensor in hub.items()})
    apart = dict(bridge.export_hf_weights(model, experts_layout="per-expert"))
    fused = hub["model.language_model.layers.1.mlp.experts.gate_up_proj"][3].T
    gate, up = (apart[f"model.language_model.layers.1.mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), fused)
    bridge.save_hf_pretrained(model, case.work / "v5", experts_layout="v5")
    again = AutoBridge.from_hf_pretrained(case.work / "v5")
    poison([model])
    again.load_hf_weights(model)
    assert not differences(dict(again.export_hf_weights(model, experts_layout="hub")), hub)


def from_config_alone(world: Any, case: Case) -> None:
    """A model that has never had weights of a folder is written for transformers, and read back by a bridge."""
    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_config(AutoBridge.from_hf_pretrained(case.folder).hf_config)
    model = build(world, case, bridge)[0]
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    bridge.save_hf_pretrained(model, case.work / "saved", max_shard_bytes=300_000)
    written = load_huggingface(case.work / "saved")
    assert not differences(dict(bridge.export_hf_weights(model, cpu=True)), written)
    provider = AutoBridge.from_hf_pretrained(case.work / "saved").to_megatron_provider(load_weights=True)
    other = provider.provide()
    assert not differences(held([other]), held([model]))


def wrapped(world: Any, case: Case) -> None:
    """A model as trainers hold it: parameters moved into one buffer, data parallelism and float16 around it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from qwen3vl_convert.models import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(case.folder)
    model = build(world, case, bridge)[0]
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    trained = DistributedDataParallel(model.config, settings, Float16Module(model.config, model))
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) < 5
    bridge.load_hf_weights([trained])
    assert not differences(dict(bridge.export_hf_weights(trained)), load_huggingface(case.folder))
