"""Draw the pictures of docs/verify.md from a real run: what `verify --logits --json` found of a faulty checkpoint.

docs/verify_figures.py                 make a small checkpoint, plant a fault, verify it, draw what was found
docs/verify_figures.py found.json      draw what an earlier run found (verify ... --logits --json > found.json)

Writes docs/images/verify-layers.svg, verify-tokens.svg and verify-ulps.svg.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen3vl_convert.verify.report import kl_picture, layer_picture, stand_alone, ulp_picture
from qwen3vl_convert.verify.result import (
    Difference,
    LogitsReport,
    Place,
    PointResult,
    PromptResult,
    Side,
    Verification,
    WeightsReport,
)

IMAGES = Path(__file__).resolve().parent / "images"
FAULT = "model.language_model.layers.2.self_attn.k_proj.weight"
"""Its first two heads are exchanged: a thing that real converters got wrong, and that no shape gives away."""
_COMMANDS = (
    "make-checkpoint model --size tiny-moe --dtype fp32",
    "hf-to-megatron model checkpoint --tp 2",
)


def draw(found: Verification, folder: Path = IMAGES) -> list[Path]:
    """Write every picture that there is something to draw for."""
    pictures = {"verify-ulps": ulp_picture(found.weights)} if any(found.weights.ulps) else {}
    if found.logits is not None:
        pictures |= {"verify-layers": layer_picture(found.logits), "verify-tokens": kl_picture(found.logits)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.svg").write_text(
            stand_alone(picture, 760 if name == "verify-ulps" else 960), encoding="utf-8"
        )
    return [folder / f"{name}.svg" for name in pictures]


def from_json(value: dict[str, Any]) -> Verification:
    """What `Verification.to_json` was made of."""
    weights, logits = dict(value["weights"]), value["logits"]
    weights["differences"] = tuple(_difference(one) for one in weights["differences"])
    kept = {name: value[name] for name in ("huggingface", "megatron", "model", "versions")}
    sides = tuple(Side(**one) for one in value["sides"])
    return Verification(**kept, weights=WeightsReport(**weights), logits=logits and _logits(dict(logits)), sides=sides)


def _difference(value: dict[str, Any]) -> Difference:
    return Difference(**{**value, "shape": tuple(value["shape"]), "first": tuple(value["first"])})


def _logits(value: dict[str, Any]) -> LogitsReport:
    place = value["place"]
    if place is not None:
        point = place["point"] and PointResult(**place["point"])
        place = Place(point, place["text"], tuple(place["parameters"]))
    prompts = tuple(PromptResult(**one) for one in value["prompts"])
    points = tuple(PointResult(**one) for one in value["points"])
    lists = {name: tuple(value[name]) for name in ("programs", "deepstack")}
    return LogitsReport(**{**value, **lists, "prompts": prompts, "points": points, "place": place})


def verified(folder: Path) -> Verification:
    """A tiny checkpoint with a fault in it, verified by the program itself."""
    program = [sys.executable, "-m", "qwen3vl_convert.cli.app"]
    for command in _COMMANDS:
        subprocess.run([*program, *command.split()], cwd=folder, check=True)
    plant(folder / "model", FAULT)
    command = [*program, "verify", "model", "checkpoint", "--logits", "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=False)
    if done.returncode != 1:
        raise SystemExit(
            f"verify ended with exit code {done.returncode}: expected 1, for a checkpoint that is different"
        )
    return from_json(json.loads(done.stdout))


def plant(model: Path, name: str) -> None:
    """Exchange the first two heads of a projection in a Hugging Face folder."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((model / "config.json").read_text())["text_config"]
    size = config["head_dim"]
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][: 2 * size] = tensors[name][: 2 * size].reshape(2, size, -1)[::-1].reshape(2 * size, -1)
            save_file(tensors, path, metadata={"format": "pt"})


def main(arguments: list[str]) -> int:
    if arguments:
        found = from_json(json.loads(Path(arguments[0]).read_text()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = verified(Path(folder))
    for path in draw(found):
        print(f"{path.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
