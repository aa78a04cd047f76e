"""The script of docs/from-megatron-bridge.md with its one line changed: what it writes is what Megatron-Bridge wrote.

Megatron-Bridge 0.6.2 wrote the golden checkpoints from the golden Hugging Face folders. Neither torch, Megatron-Core
nor a network is needed here.
"""

import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3vl_convert import AutoBridge, ParallelLayout, installed, make_checkpoint, megatron_to_hf
from qwen3vl_convert.errors import NotInstalled, OutputError, UsageError
from qwen3vl_convert.huggingface.safetensors import read_header
from qwen3vl_convert.megatron.checkpoint import read_megatron
from qwen3vl_convert.megatron.metadata import read_metadata
from qwen3vl_convert.models.auto_bridge import NOT_HERE
from qwen3vl_convert.models.bridge_arguments import INSTEAD, LIVE, LOADING
from qwen3vl_convert.reader import are_equal

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "drop_in.py"
PAGE = ROOT / "docs" / "from-megatron-bridge.md"
THEIRS, OURS = "from megatron.bridge import AutoBridge", "from qwen3vl_convert import AutoBridge"
CASES = {"dense": "dense_tp1pp1", "dense-tied": "dense_tied_tp1pp1", "moe": "moe_tp1pp1"}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(case: str, golden_huggingface: Path) -> Path:
    return golden_huggingface / case


@pytest.fixture(scope="module")
def theirs(case: str, golden_megatron: Path) -> Path:
    return golden_megatron / CASES[case]


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the script ran: `megatron` and `back`."""
    place = tmp_path_factory.mktemp("drop-in")
    text = SCRIPT.read_text()
    assert text.count(THEIRS) == 1
    (place / "script.py").write_text(text.replace(THEIRS, OURS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "script.py", str(source), "megatron", "back"]
    run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
    return place


# ---- the folders -----------------------------------------------------------------------------------------------------


def test_the_checkpoint_has_their_tensors_bit_for_bit(done: Path, theirs: Path) -> None:
    ours, golden = read_megatron(done / "megatron").tensors, read_megatron(theirs).tensors
    assert ours.keys() == golden.keys()
    assert [key for key in golden if not are_equal(ours[key], golden[key])] == []
    assert {key: boxes(one) for key, one in ours.items()} == {key: boxes(one) for key, one in golden.items()}


def boxes(tensor: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(chunk.offsets, chunk.sizes) for chunk in tensor.chunks}


def test_the_checkpoint_has_their_objects(done: Path, theirs: Path) -> None:
    """Among them the `_extra_state` that its strict reader insists on."""
    ours, golden = (read_metadata(f / "iter_0000000" / ".metadata").objects for f in (done / "megatron", theirs))
    assert ours.keys() == golden.keys()


def test_the_checkpoint_has_their_files(done: Path, theirs: Path) -> None:
    """And of its own: `common.pt`, for Megatron-Core before 0.19, the manifest, and config and tokenizer for the way
    back.
    """
    ours, golden = set(files(done / "megatron")), set(files(theirs))
    assert golden - ours <= {"iter_0000000/.metadata"}, "a golden checkpoint may leave out what is a dot file"
    own = {name for name in ours - golden if not name.startswith("iter_0000000/hf/")}
    assert own <= {"iter_0000000/common.pt", "iter_0000000/qwen3vl_convert.json", "iter_0000000/.metadata"}


def files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_run_config_says_what_theirs_says(done: Path, theirs: Path) -> None:
    """All that ours says, apart from what stands here with its reason."""
    ours, golden = (
        dict(leaves(yaml.safe_load((f / "iter_0000000" / "run_config.yaml").read_text())))
        for f in (done / "megatron", theirs)
    )
    different = {key: (value, golden.get(key)) for key, value in ours.items() if golden.get(key) != value}
    expected: dict[str, tuple[Any, Any]] = {
        # Theirs is null until the process groups are known.
        "model.pipeline_dtype._call_": (False, None),
        "model.pipeline_dtype._target_": ("torch.bfloat16", None),
    }
    if "moe" in theirs.name:
        expected |= {
            # The class defaults of its MoE provider: what is loaded with them trains the mergers alone.
            "model.freeze_language_model": (False, True),
            "model.freeze_vision_model": (False, True),
            # Its config class's default; the model is not tied.
            "model.hf_text_config.tie_word_embeddings": (False, True),
        }
    assert different == expected
    assert len(ours) > 80


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), node


def test_the_way_back_is_the_source(done: Path, source: Path) -> None:
    same_folder(done / "back", source)


def same_folder(back: Path, source: Path) -> None:
    """The same files, byte for byte (an index in its own order); Megatron-Bridge rewrites config and tokenizer."""
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in back.iterdir()} == names | {"qwen3vl_convert.json"}
    for name in names:
        if name.endswith(".index.json"):
            assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())
        else:
            assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_their_checkpoint_comes_back_too(source: Path, theirs: Path, tmp_path: Path) -> None:
    AutoBridge.from_hf_pretrained(source).export_ckpt(theirs, tmp_path / "back")
    same_folder(tmp_path / "back", source)


# ---- the methods of Megatron-Bridge 0.6.2 ----------------------------------------------------------------------------

# Read from its wheel: arguments in their order, with their defaults.
SIGNATURES = {
    "list_supported_models": (),
    "supports": ("config",),
    "from_auto_config": ("megatron_path", "hf_model_id", "trust_remote_code=False"),
    "from_hf_config": ("config",),
    "from_hf_pretrained": ("path", "**kwargs"),
    "can_handle": ("path", "trust_remote_code=False"),
    "load_hf_weights": ("model", "hf_path=None", "allowed_mismatched_params=None"),
    "export_hf_weights": (
        "model", "cpu=False", "show_progress=True", "conversion_tasks=None", "merge_adapter_weights=True",
        "weight_dtype=None",
    ),
    "save_hf_pretrained": (
        "model", "path", "show_progress=True", "source_path=None", "strict=True", "merge_adapter_weights=True",
        "distributed_save=False", "save_every_n_ranks=1", "weight_dtype=None",
    ),
    "save_megatron_model": (
        "model", "path", "hf_tokenizer_path=None", "low_memory_save=False", "hf_tokenizer_kwargs=None",
    ),
    "load_megatron_model": ("path", "mp_overrides=None", "**kwargs"),
    "import_ckpt": ("hf_model_id", "megatron_path", "**kwargs"),
    "export_ckpt": ("megatron_path", "hf_path", "show_progress=True", "strict=False", "source_path=None"),
    "to_megatron_model": ("load_weights=True", "hf_path=None", "**kwargs"),
    # True there, where it speaks of provide_distributed_model alone: that fills the model here too.
    "to_megatron_provider": ("load_weights=None", "hf_path=None"),
    "get_hf_model_id_from_checkpoint": ("path",),
}  # fmt: skip
NOT_THERE = {
    "export_adapter_ckpt", "export_adapter_weights", "export_hf_weights_modelopt", "export_hf_weights_quant",
    "get_conversion_tasks", "push_to_hub", "save_hf_adapter", "save_hf_weights",
}  # fmt: skip


@pytest.mark.parametrize("method", SIGNATURES)
def test_takes_the_arguments_of_megatron_bridge_in_its_order(method: str) -> None:
    found = inspect.signature(getattr(AutoBridge, method)).parameters.values()
    written = [as_written(one) for one in found if one.name != "self"]
    theirs = SIGNATURES[method]
    assert [one for one in written if one in theirs] == list(theirs)
    own = [one for one in found if one.name != "self" and as_written(one) not in theirs]
    assert all(one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD) for one in own), "what is ours is passed by name"


def as_written(one: inspect.Parameter) -> str:
    if one.kind is one.VAR_KEYWORD:
        return f"**{one.name}"
    return one.name if one.default is one.empty else f"{one.name}={one.default!r}"


def test_every_other_method_is_refused_by_name() -> None:
    assert set(NOT_HERE) == NOT_THERE


def test_the_page_shows_the_script_and_names_every_method() -> None:
    page = PAGE.read_text()
    assert SCRIPT.read_text().partition('"""\n\n')[2] in page
    assert [name for name in (*SIGNATURES, *NOT_THERE) if f"`{name}" not in page] == []
    assert [name for name in (*LOADING, *LIVE, *INSTEAD) if f"`{name}" not in page] == []


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "hf", "tiny-moe")
    return tmp_path / "hf"


def test_what_has_no_effect_is_said_once(tiny: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without effect") as heard:
        AutoBridge.import_ckpt(tiny, tmp_path / "m", device_map="auto", trust_remote_code=True, max_memory=None)
    (one,) = heard
    assert one.filename == __file__, "it points to the line of the caller"
    assert "import_ckpt: without effect here: device_map: " in str(one.message)
    assert "trust_remote_code: no code" in str(one.message)
    assert "max_memory" not in str(one.message)


def test_what_is_unknown_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"import_ckpt: devicemap='auto' is unknown. Expected one of .*device_map"):
        AutoBridge.import_ckpt(tiny, tmp_path / "m", devicemap="auto")
    with pytest.raises(UsageError, match=r"from_hf_pretrained: cache_dir='/x' is not taken: set HF_HOME"):
        AutoBridge.from_hf_pretrained(tiny, cache_dir="/x")
    with pytest.raises(UsageError, match=r"torch_dtype='int8': expected one of auto, bfloat16"):
        AutoBridge.import_ckpt(tiny, tmp_path / "m", torch_dtype="int8")
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast'"):
        AutoBridge.from_hf_pretrained(tiny).export_ckpt(tmp_path / "m", tmp_path / "b", fast=True)  # type: ignore[call-arg]
    assert not (tmp_path / "m").exists()


def test_a_method_takes_its_own_arguments_alone(tiny: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(tiny)
    expected = "wrap_with_ddp, use_cpu_initialization"
    said = rf"load_megatron_model: distributed_save=True is unknown. Expected one of {expected}\.$"
    with pytest.raises(UsageError, match=said):
        bridge.load_megatron_model(tmp_path, distributed_save=True)


@pytest.mark.parametrize("method", NOT_HERE)
def test_what_is_not_here_says_what_to_do_instead(tiny: Path, method: str) -> None:
    with pytest.raises(UsageError, match=rf"AutoBridge\.{method} is not here: \w"):
        getattr(AutoBridge.from_hf_pretrained(tiny), method)("anything", key=1)


def test_nothing_is_overwritten_unless_asked_for(tiny: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(tiny, tmp_path / "m")
    with pytest.raises(OutputError, match=r"exists. .*pass --overwrite \(from Python overwrite=True\) to replace it"):
        AutoBridge.import_ckpt(tiny, tmp_path / "m")
    AutoBridge.import_ckpt(tiny, tmp_path / "m", overwrite=True, layout=ParallelLayout(ep=2))
    assert (tmp_path / "m" / "iter_0000000" / "__1_0.distcp").is_file()


def test_dtype(tiny: Path, tmp_path: Path) -> None:
    class Float32:
        """As torch's prints itself."""

        def __str__(self) -> str:
            return "torch.float32"

    AutoBridge.import_ckpt(tiny, tmp_path / "m", torch_dtype=Float32())
    assert {tensor.dtype for tensor in read_megatron(tmp_path / "m").tensors.values()} == {"float32"}
    AutoBridge.from_hf_pretrained(tiny, torch_dtype="bfloat16")
    with pytest.raises(UsageError, match="expected the weights' own, bfloat16"):
        AutoBridge.from_hf_pretrained(tiny, torch_dtype=Float32())


def test_a_revision_of_a_folder_is_the_folder(tiny: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(tiny, tmp_path / "m", revision="main")
    AutoBridge.from_hf_pretrained(tiny, revision="main").export_ckpt(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_without_megatron_core_live_models_say_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda module: not module.startswith("megatron"))
    bridge = AutoBridge.from_hf_pretrained(tiny)
    for action in (bridge.to_megatron_provider, lambda: bridge.load_megatron_model(tiny)):
        with pytest.raises(NotInstalled, match="AutoBridge, for live models, needs megatron-core"):
            action()


# ---- bridges without weights -----------------------------------------------------------------------------------------


def test_a_config_alone_exports(tiny: Path, tmp_path: Path) -> None:
    AutoBridge.import_ckpt(tiny, tmp_path / "m")
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "tokenizer.json").write_text("{}")
    bridge = AutoBridge.from_hf_config(config)
    bridge.export_ckpt(tmp_path / "m", tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "config.json", "model.safetensors", "qwen3vl_convert.json"
    }  # fmt: skip
    bridge.export_ckpt(tmp_path / "m", tmp_path / "beside", source_path=tiny)
    assert (tmp_path / "beside" / "tokenizer.json").read_text() == "{}"
    for folder in ("alone", "beside"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / folder / "config.json").read_text()) == config


def test_sizes_that_only_the_checkpoint_knows(golden_megatron: Path, golden_huggingface: Path, tmp_path: Path) -> None:
    checkpoint, source = golden_megatron / "dense_tp2pp1", golden_huggingface / "dense"
    make_checkpoint(tmp_path / "other", "tiny")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    bridge = AutoBridge.from_auto_config(checkpoint, tmp_path / "other")
    bridge.export_ckpt(checkpoint, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    megatron_to_hf(checkpoint, tmp_path / "expected", config=source)
    ours = read_header(tmp_path / "back" / "model.safetensors").tensors
    assert ours.keys() == read_header(source / "model.safetensors").tensors.keys()


@pytest.mark.parametrize("layout", ["hub", "v5", "per-expert"])
def test_experts_are_written_as_the_source_has_them(layout: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "tiny-moe", experts_layout=layout)
    AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "m")
    AutoBridge.from_hf_pretrained(tmp_path / "hf").export_ckpt(tmp_path / "m", tmp_path / "back")
    source, back = (read_header(tmp_path / name / "model.safetensors").tensors for name in ("hf", "back"))
    assert {n: e.shape for n, e in source.items()} == {n: e.shape for n, e in back.items()}
    # without the weights, by what the checkpoint says of its source; Megatron-Bridge's says nothing: as on the Hub
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    result = AutoBridge.from_hf_config(config).export_ckpt(tmp_path / "m", tmp_path / "again")
    assert result.experts_layout == layout
    (tmp_path / "m" / "iter_0000000" / "qwen3vl_convert.json").unlink()
    result = AutoBridge.from_hf_config(config).export_ckpt(tmp_path / "m", tmp_path / "unknown")
    assert result.experts_layout == "hub"


def test_what_a_bridge_and_a_checkpoint_say_of_themselves(golden_megatron: Path, tmp_path: Path) -> None:
    assert AutoBridge.get_hf_model_id_from_checkpoint(golden_megatron / "dense_tp2pp1") == "hub_dense"
    make_checkpoint(tmp_path / "hf", "tiny")
    AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "m")
    assert AutoBridge.get_hf_model_id_from_checkpoint(tmp_path / "m") is None
    architecture = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"][0]
    assert architecture in AutoBridge.list_supported_models()
    assert AutoBridge.can_handle(tmp_path / "hf")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert not AutoBridge.can_handle(tmp_path / "m", trust_remote_code=True)
    assert "trust_remote_code" in str(heard[0].message)
