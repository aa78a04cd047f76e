"""What a Megatron checkpoint says its model computes, apart from weights: in all the places where it says so.

A checkpoint can hold up to four statements: the config.json that travelled along, the model's settings in
`run_config.yaml` (which Megatron-Bridge builds the model from), the Hugging Face configs inside of these, and
Megatron-LM's arguments. Weights can be equal to the bit and the model another one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from qwen3vl_convert.dims import CONFIG_FILE, Dims, read_config
from qwen3vl_convert.errors import ConfigError, InputError
from qwen3vl_convert.megatron.checkpoint import HF_FOLDER, MegatronCheckpoint
from qwen3vl_convert.megatron.run_config import config_of_run, read_run_config

RUN_CONFIG = "run_config.yaml"
NOT_FUNCTION = ("dtype", "max_positions", "bos_token_id", "eos_token_id")
"""Sizes that do not change what a model computes, and that the formats do not all record."""

_PROVIDER = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "ffn": "ffn_hidden_size",
    "experts": "num_moe_experts",
    "expert_ffn": "moe_ffn_hidden_size",
    "top_k": "moe_router_topk",
    "attention_bias": "add_qkv_bias",
    "tied": "share_embeddings_and_output_weights",
    "rms_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "mrope_section": "mrope_section",
    "image_token_id": "image_token_id",
    "video_token_id": "video_token_id",
    "vision_start_token_id": "vision_start_token_id",
}
"""Fields of Dims as Megatron-Bridge's providers call them, and Megatron-LM's arguments those that it has."""

_ARGUMENTS = {**_PROVIDER, "rms_eps": "norm_epsilon", "experts": "num_experts"}
_EXPERTS = ("experts", "expert_ffn", "top_k")
_ARGS = "the arguments of Megatron-LM"
_KINDS = {int: "number", float: "number", bool: "true or false", tuple: "list of numbers"}
_TIED = "untie_embeddings_and_output_weights"


def statements(checkpoint: MegatronCheckpoint, expected: Dims) -> Iterator[tuple[str, Dims]]:
    """(where it is said, the sizes that are said there), the one that a trainer would follow last.

    What a place does not say is `expected`. Raises `ConfigError` for a setting that is none.
    """
    folder = checkpoint.folder
    own = folder / HF_FOLDER
    if (own / CONFIG_FILE).is_file():
        yield f"{HF_FOLDER}/{CONFIG_FILE}", Dims.from_config(read_config(own), str(own / CONFIG_FILE))
    arguments = getattr(checkpoint.common.get("args"), "state", None)
    if isinstance(arguments, Mapping) and "num_layers" in arguments:
        yield _ARGS, _said(expected, arguments, _ARGUMENTS, _ARGS)
    run_config = read_run_config(folder / RUN_CONFIG)
    model = (run_config or {}).get("model")
    if run_config is not None and isinstance(model, Mapping):
        where = f"{RUN_CONFIG}: model"
        yield where, _said(_nested(run_config, expected), model, _PROVIDER, where)


def _nested(run_config: dict[str, Any], expected: Dims) -> Dims:
    """The sizes in the Hugging Face configs inside of a run_config.yaml, of which the vision tower is built."""
    try:
        return Dims.from_config(config_of_run(run_config, RUN_CONFIG), RUN_CONFIG)
    except InputError:
        return expected


def _said(base: Dims, values: Mapping[str, Any], names: Mapping[str, str], where: str) -> Dims:
    """`base` with what `values` say, by the names that they have there. Raises `ConfigError` for what is no setting."""
    known = {
        field: _like(getattr(base, field), values[name], f"{where}: {name}")
        for field, name in names.items()
        if values.get(name) is not None and (base.moe or field not in _EXPERTS)
    }
    if isinstance(values.get(_TIED), bool):
        known["tied"] = not values[_TIED]
    return replace(base, **known)


def _like(expected: Any, value: Any, where: str) -> Any:
    """A setting in the type that Dims has it in."""
    kind = type(expected)
    listed = isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)
    if kind is tuple and listed:
        return tuple(value)
    if kind is float and isinstance(value, int | float):
        return float(value)
    if kind in (int, bool) and isinstance(value, kind):
        return value
    raise ConfigError(f"{where}: expected a {_KINDS[kind]}, found {value!r}. Repair the file, or remove it.")


def stated(checkpoint: MegatronCheckpoint, expected: Dims) -> Dims:
    """The model that a trainer would build from the checkpoint; `expected` where it says nothing."""
    return [expected, *(dims for _, dims in statements(checkpoint, expected))][-1]


def differing(checkpoint: MegatronCheckpoint, expected: Dims) -> dict[str, tuple[Any, Any]]:
    """What it says otherwise than `expected`, which is Hugging Face's config: (HF, Megatron) by name and place."""
    found: dict[str, tuple[Any, Any]] = {}
    for place, dims in statements(checkpoint, expected):
        for name in (field.name for field in fields(Dims) if field.name not in NOT_FUNCTION):
            pair = getattr(expected, name), getattr(dims, name)
            if pair[0] != pair[1]:
                found[f"{name} ({place})"] = pair
    return found
