"""The two programs that are compared: transformers' model of the folder, ours on Megatron-Core of the checkpoint.

Each is built without weights and takes them, a module at a time, from where they are: files, or a model that has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwen3vl_convert.dims import Dims
from qwen3vl_convert.errors import UnsupportedFormat
from qwen3vl_convert.huggingface.config import rebuild_config
from qwen3vl_convert.huggingface.experts import experts_layout
from qwen3vl_convert.mappings import MappingRegistry, Pair, View, mapping_registry
from qwen3vl_convert.model import EMBEDDING, OUTPUT, HuggingFaceModel
from qwen3vl_convert.plan import Box
from qwen3vl_convert.reader import read_box
from qwen3vl_convert.storage import DTYPES, StoredTensor
from qwen3vl_convert.verify.logits.hollow import LentStack, Named, Shelf, lend, weightless
from qwen3vl_convert.verify.logits.prompts import Prompt, our_arguments, their_arguments

EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
"""The dtype that tells how far a program in this dtype is from itself."""

ROUNDED_BYTES = 1 << 30
"""Of a layer's weights that are held in the dtype of a runner, so that they are not rounded again for every prompt."""
WORDS = (*(name.removesuffix(".weight") for name in EMBEDDING), "model.embed_tokens")
"""The tables of words, of which a few rows are used: these are rounded, not the table."""
STACK = ".mlp.experts"
"""How the modules of transformers end that hold all experts of a layer in one parameter."""


class Weights(Protocol):
    """Where a program's parameters are, by their name in it; of a stack of experts, one by one."""

    def parameter(self, name: str) -> Tensor: ...

    def expert(self, name: str, number: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Resident:
    """The weights of a model that is in memory."""

    model: nn.Module

    def parameter(self, name: str) -> Tensor:
        found: Tensor = self.model.get_parameter(name).detach()
        return found

    def expert(self, name: str, number: int) -> Tensor:
        return self.parameter(name)[number]


def owners(model: nn.Module) -> dict[str, dict[str, str]]:
    """The modules that compute with parameters, in the model's order: where these are in them, and their whole name."""
    found: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        for key in (key for key, parameter in module._parameters.items() if parameter is not None):
            owner = owner_of(name)
            path = f"{name}.{key}".removeprefix(f"{owner}.")
            found.setdefault(owner, {})[path] = f"{name}.{key}"
    return found


def owner_of(module: str) -> str:
    """The module whose forward uses a module's parameters: our patch embedding does not call its convolution."""
    return module.removesuffix(".proj") if module.endswith("patch_embed.proj") else module


def lend_all(model: nn.Module, shelf: Shelf, dtypes: Sequence[torch.dtype]) -> Shelf:
    """Have a hollow model take its weights from a shelf whenever it runs, rounded to these dtypes one after another.

    Gives the shelf of what was rounded.
    """
    made = Shelf(lambda name: rounded(shelf.get(name), dtypes), min(shelf.most, ROUNDED_BYTES))
    taken = owners(model)
    output, embedding = (name.removesuffix(".weight") for name in (OUTPUT[0], EMBEDDING[0]))
    if embedding in taken and output not in taken:
        taken[output] = {"weight": EMBEDDING[0]}  # Megatron-Core hands the embedding to a tied output layer
    for name, names in taken.items():
        module = model.get_submodule(name)
        if name.endswith(WORDS):
            lend(module, names, shelf.get)
            module.register_forward_hook(lambda module, args, output: rounded(output, dtypes), prepend=True)
        elif name.endswith(STACK):
            module.__dict__ |= {key: LentStack(made.get, whole) for key, whole in names.items()}
        else:
            lend(module, names, made.get)
    return made


def shelf_of(weights: Weights, most: int, device: torch.device) -> Shelf:
    """A shelf of weights as they are stored, on the device."""

    def read(name: Named) -> Tensor:
        tensor = weights.parameter(name) if isinstance(name, str) else weights.expert(*name)
        return tensor.to(device)

    return Shelf(read, most)


def fill(model: nn.Module, weights: Weights, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """Give a hollow model its weights for good, rounded to these dtypes one after another: on the device, which takes
    them as they are stored, since a GPU rounds in no time and a host does not.
    """
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                tensor = rounded(_whole(weights, f"{name}.{key}", parameter, device), dtypes)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)


def _whole(weights: Weights, name: str, like: Tensor, device: torch.device) -> Tensor:
    """A parameter as it is stored, on the device; a stack of experts too."""
    if not name.rpartition(".")[0].endswith(STACK):
        return weights.parameter(name).to(device)
    return torch.stack([weights.expert(name, number).to(device) for number in range(len(like))])


def rounded(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """In these dtypes one after another, to nearest even. What changes no value would take memory, and is skipped."""
    *between, last = dtypes
    for dtype in between:
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            tensor = tensor.to(dtype)
    return tensor.to(last)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules at whose boundaries nothing is kept in the model: layers, and outside of them what has parameters."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = {f"{name}.{at}" for name in lists for at, _ in model.get_submodule(name).named_children()}
    outer = {name for name in layers if not any(name.startswith(f"{other}.") for other in layers)}
    alone = {name for name in owners(model) if not any(name.startswith(f"{other}.") for other in outer)}
    return {name: module for name, module in model.named_modules() if name in outer | alone}


# ---- transformers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderWeights:
    """The weights of a folder. `memory` are the mappings against the expert layout that transformers has in memory,
    which differs between its releases and from that of the folder.
    """

    opened: HuggingFaceModel
    memory: MappingRegistry
    layout: str

    def parameter(self, name: str) -> Tensor:
        """A whole tensor, but of the stacks of experts."""
        if name == OUTPUT[1] and not self.opened.model.output_layer:
            name = EMBEDDING[1]
        return read_tensor(self.opened.tensors[name])

    def expert(self, name: str, number: int) -> Tensor:
        """One expert of a stack in memory, by way of its Megatron tensor, on which both equations agree."""
        claim = self.memory.hf_to_megatron_lookup(name)
        wanted, sizes = claim.mapping.equation, self.opened.model.sizes
        stored = next(e for e in self.opened.model.equations if e.megatron.name == wanted.megatron.name)
        place = {**claim.place, "e": number}
        between: Tensor | None = None
        for pair in stored.pairs(sizes, place):
            source, view = self._of_expert(pair, number)
            between = source.new_empty(pair.megatron.shape) if between is None else between
            pair.megatron.of(between).copy_(view.of(source))
        assert between is not None
        (into,) = wanted.pairs(sizes, place)
        view = _without_first(into.hf)
        made = between.new_empty(view.shape)
        view.of(made).copy_(into.megatron.of(between))
        return made

    def _of_expert(self, pair: Pair, number: int) -> tuple[Tensor, View]:
        """What the folder has of an expert, its own tensor or its slice of a stack, and the view of that."""
        tensor = self.opened.tensors[pair.hf_name]
        if len(tensor.shape) == 2:
            return read_tensor(tensor), pair.hf
        zeros = (0,) * (len(tensor.shape) - 1)
        return read_tensor(tensor, ((number, *zeros), (1, *tensor.shape[1:])))[0], _without_first(pair.hf)


def _without_first(view: View) -> View:
    """A view that has one entry of the first dimension, as one of that entry."""
    axes = tuple(replace(axis, dim=axis.dim - 1) for axis in view.axes)
    return View(view.shape[1:], view.start[1:], axes)


def folder_weights(opened: HuggingFaceModel, model: nn.Module) -> FolderWeights:
    """The weights of a folder for a model of transformers, which may be without weights."""
    dims = opened.model.dims
    tensors = {name: StoredTensor(name, "", tuple(p.shape), ()) for name, p in model.named_parameters()}
    layout = experts_layout(tensors, dims)
    registry = mapping_registry(dims.model_type, attention_bias=dims.attention_bias, head=opened.model.output_layer)
    layout = "hub" if layout == "none" else layout
    return FolderWeights(opened, registry.with_experts(layout), layout)


def read_tensor(tensor: StoredTensor, box: Box | None = None) -> Tensor:
    """A stored tensor, or a box of it, on the CPU."""
    bits = read_box(tensor, box or ((0,) * len(tensor.shape), tensor.shape))
    width = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}[DTYPES[tensor.dtype].itemsize]
    found: Tensor = torch.from_numpy(bits.view(width)).view(getattr(torch, tensor.dtype))
    return found


def build_theirs(folder: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' model of a folder's config, on the meta device."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(folder)
    with weightless():
        model: nn.Module = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, **_plain_kernels())
    return one_by_one(model.eval())


def _transformers() -> Any:
    """The package, quiet: its progress would go between ours."""
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _plain_kernels() -> dict[str, str]:
    """The ways to compute that have one meaning in every precision and on every device."""
    from transformers import PreTrainedModel

    experts = {"experts_implementation": "eager"} if hasattr(PreTrainedModel, "set_experts_implementation") else {}
    return {"attn_implementation": "eager", **experts}


def one_by_one(model: nn.Module) -> nn.Module:
    """Have transformers' experts run one by one: 4.57 does it in training, and all on all tokens otherwise."""
    for name, module in model.named_modules():
        if name.endswith(STACK):
            module.train()
    return model


def their_logits(model: nn.Module, prompt: Prompt) -> Tensor:
    """[S, vocab]."""
    logits: Tensor = model(**their_arguments(prompt), use_cache=False).logits[0]
    return logits


# ---- Megatron-Core ---------------------------------------------------------------------------------------------------


def our_provider(dims: Dims, padded_vocab: int, dtype: torch.dtype, **settings: Any) -> Any:
    """Settings of Megatron-Core's own layers and torch's kernels, which have one meaning on every device."""
    from qwen3vl_convert.models import AutoBridge

    provider = AutoBridge.from_hf_config(rebuild_config(dims)[0]).to_megatron_provider()
    precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype}
    flags = {"bf16": dtype == torch.bfloat16, "fp16": False, "perform_initialization": False}
    chosen = {"vocab_size": padded_vocab, "should_pad_vocab": False, "transformer_impl": "local"}
    on_meta = {"use_cpu_initialization": True}  # else weights are made on the GPU, whatever the default device is
    for name, value in {**precision, **flags, **chosen, **on_meta, **settings}.items():
        setattr(provider, name, value)
    return provider


def build_ours(dims: Dims, padded_vocab: int, dtype: torch.dtype) -> nn.Module:
    """Our model of these sizes on the meta device. Raises `UnsupportedFormat` for sizes that it cannot have."""
    provider = our_provider(dims, padded_vocab, dtype)
    try:
        provider.finalize()
        with weightless():
            return provider.provide().eval()  # type: ignore[no-any-return]
    except ValueError as error:
        raise UnsupportedFormat(f"There are no logits: our model cannot be built at these sizes: {error}") from error


def our_logits(model: nn.Module, prompt: Prompt, vocab: int) -> Tensor:
    """[S, vocab], without the padding of the vocabulary."""
    logits: Tensor = model(**our_arguments(prompt))[0, :, :vocab]
    return logits
