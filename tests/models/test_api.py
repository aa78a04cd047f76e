"""What the API documents leave open (`tests/api` holds what they say): values that they print as `field(…)`, the names
that they only mention, and how the room is imported.
"""

import inspect
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

BOTH = {"mrope_section": [24, 20, 20], "deepstack_visual_indexes": [8, 16, 24]}
PROVIDERS = {
    "Qwen3VLModelProvider": BOTH,
    "Qwen3VLMoEModelProvider": {**BOTH, "mlp_only_layers": []},
}


def named(path: str) -> Any:
    """`file.Class.method` of the models room."""
    from importlib import import_module

    file, *names = path.split(".")
    found = import_module(f"qwen3vl_convert.models.{file}")
    for name in names:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("name", PROVIDERS)
def test_lists_that_the_document_calls_field(name: str) -> None:
    made = named(f"provider.{name}")
    assert {setting: getattr(made(), setting) for setting in PROVIDERS[name]} == PROVIDERS[name]
    assert made().mrope_section is not made().mrope_section


@pytest.mark.transformers
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_default_vision_config_is_that_of_transformers(name: str) -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    assert isinstance(named(f"provider.{name}")().vision_config, Qwen3VLVisionConfig)


@pytest.mark.transformers
def test_without_transformers_the_default_vision_config_has_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    provider = named("provider.default_vision_config")
    theirs = provider()
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_vl.configuration_qwen3_vl", None)
    ours = provider()
    assert type(ours) is not type(theirs)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(theirs).items()}
    assert {name: listed[name] for name in vars(ours)} == vars(ours)


def test_a_base_is_what_its_classes_have_in_common() -> None:
    """Not a name alone: the text models' providers have every setting of Megatron-Core and none of a tower."""
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in fields(TransformerConfig)}
    for text, whole in (
        ("Qwen3ModelProvider", "Qwen3VLModelProvider"),
        ("Qwen3MoEModelProvider", "Qwen3VLMoEModelProvider"),
    ):
        base, made = named(f"provider.{text}"), named(f"provider.{whole}")
        assert issubclass(made, base)
        assert issubclass(base, TransformerConfig)
        assert known <= {field.name for field in fields(base)}
        tower = {field.name for field in fields(made)} - {field.name for field in fields(base)}
        assert {"vision_config", "freeze_vision_model", "add_encoder"} <= tower
    shared = named("bridge.MegatronModelBridge")
    for bridge in (named("bridge.Qwen3VLBridge"), named("bridge.Qwen3VLMoEBridge")):
        assert bridge.provider_bridge is shared.provider_bridge
        assert bridge.mapping_registry is shared.mapping_registry


def test_a_base_makes_no_bridge() -> None:
    from qwen3vl_convert.errors import UsageError

    with pytest.raises(UsageError, match="base of Qwen3VLBridge, Qwen3VLMoEBridge: make one of those, or AutoBridge"):
        named("bridge.MegatronModelBridge")("folder")


@pytest.mark.parametrize("method", ["load_hf_weights", "export_hf_weights"])
def test_auto_bridge_takes_a_model_alone(method: str) -> None:
    """The document's example makes one and says no more of it."""
    first, *more = list(inspect.signature(named(f"auto_bridge.AutoBridge.{method}")).parameters.values())[1:]
    assert (first.name, first.default) == ("model", first.empty)
    assert all(one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in more)


@pytest.mark.slow
def test_the_room_exports_its_names_and_imports_nothing_before_they_are_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, qwen3vl_convert.models as room; assert 'megatron' not in sys.modules; "
        "[getattr(room, name) for name in room.__all__]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
