"""Pixels as the model takes them: the checkpoint's settings, transformers' code.

Only Qwen's own classes run. Where torchvision is missing, transformers' variant on pillow makes pixels of pictures,
which differ by a rounding of the resizing; for videos there is no such variant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_convert.errors import ConfigError, InputError
from qwen3vl_convert.inference.processing.files import processor_settings
from qwen3vl_convert.inference.processing.libraries import transformers
from qwen3vl_convert.inference.processing.media import load_image, load_video, shown
from qwen3vl_convert.installed import is_installed, need

if TYPE_CHECKING:
    from torch import Tensor

    from qwen3vl_convert.dims import Dims

IMAGE_CLASSES = {
    True: ("Qwen2VLImageProcessorFast", "Qwen2VLImageProcessor"),
    False: ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor"),
}
"""With torchvision, or without: what 4.57 and 5.x call it, in the order in which to ask for them."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """One picture or video: patches [n, values], the grid [1, 3] of n patches in time, height and width.

    `seconds`: of a video, when each step of the grid in time is.
    """

    patches: "Tensor"
    grid: "Tensor"
    seconds: tuple[float, ...] = ()

    def tokens_of_frame(self, spatial_merge: int) -> int:
        _, height, width = self.grid[0].tolist()
        return int(height) * int(width) // spatial_merge**2


class Eyes:
    """What makes pixels of files by the settings in a folder. Each file is looked at once."""

    def __init__(self, folder: Path, dims: "Dims") -> None:
        self.folder, self.dims = folder, dims
        self._processors: dict[str, Any] = {}
        self._seen: dict[tuple[str, str], Pixels] = {}

    def image(self, source: str | Path) -> Pixels:
        """Raises `InputError`'s kinds, or `UsageError` for what is not installed."""
        return self._once("image", source)

    def video(self, source: str | Path) -> Pixels:
        return self._once("video", source)

    def _once(self, kind: str, source: str | Path) -> Pixels:
        key = kind, str(source)
        if key not in self._seen:
            found = self._look(source) if kind == "image" else self._watch(source)
            self._check(found, shown(source))
            self._seen[key] = found
        return self._seen[key]

    def _look(self, source: str | Path) -> Pixels:
        image = load_image(source)
        settings = processor_settings(self.folder, "image_processor")
        with transformers(f"{shown(source)}: transformers cannot make pixels of it") as module:
            processor = self._processors.get("image") or _image_processor(module, settings)
            self._processors["image"] = processor
            # said again here, since the class without torchvision in 4.57 leaves out what its settings say of sizes
            answer = processor(images=[image], size=_size(settings, processor), return_tensors="pt")
            return Pixels(answer["pixel_values"].float(), answer["image_grid_thw"])

    def _watch(self, source: str | Path) -> Pixels:
        need(f"The video {source}", "PIL", "torchvision")
        settings = processor_settings(self.folder, "video_processor")
        with transformers(f"{self.folder}: transformers cannot process videos by these settings") as module:
            processor = self._processors.get("video") or module.Qwen3VLVideoProcessor(**_arguments(settings))
            self._processors["video"] = processor
        frames, metadata = load_video(source, lambda metadata, **_: processor.sample_frames(metadata))
        with transformers(f"{source}: transformers cannot make pixels of it"):
            answer = processor(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
            seconds = timestamps(list(metadata.frames_indices), metadata.fps or 24.0, self.dims.temporal_patch)
            return Pixels(answer["pixel_values_videos"].float(), answer["video_grid_thw"], seconds)

    def _check(self, pixels: Pixels, where: str) -> None:
        """The pixels are of this model's patches."""
        dims = self.dims
        expected = int(pixels.grid.prod()), dims.channels * dims.temporal_patch * dims.patch**2
        if tuple(pixels.patches.shape) != expected:
            raise InputError(
                f"{where}: {self.folder} makes patches of {pixels.patches.shape[1]} values, expected {expected[1]}, "
                f"which the model takes. Pass --config with the files of this model."
            )
        if int(pixels.grid[0, 1]) % dims.spatial_merge or int(pixels.grid[0, 2]) % dims.spatial_merge:
            raise InputError(
                f"{where}: {self.folder} makes a grid of {pixels.grid[0].tolist()} patches, expected sides that "
                f"{dims.spatial_merge} divides. Pass --config with the files of this model."
            )


def _image_processor(module: Any, settings: dict[str, Any]) -> Any:
    for name in IMAGE_CLASSES[is_installed("torchvision")]:
        found = getattr(module, name, None)
        if found is not None:
            return found(**_arguments(settings))
    raise InputError(f"transformers {module.__version__} has no image processor of Qwen-VL. Install 4.57 or newer.")


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the names of classes, of which only ours run."""
    return {name: value for name, value in settings.items() if not name.endswith(("_type", "_class", "auto_map"))}


def _size(settings: dict[str, Any], processor: Any) -> dict[str, int]:
    """The least and the most pixels of a picture, in all the spellings."""
    known = dict(settings.get("size") or {})
    least = known.get("shortest_edge") or settings.get("min_pixels") or dict(processor.size)["shortest_edge"]
    most = known.get("longest_edge") or settings.get("max_pixels") or dict(processor.size)["longest_edge"]
    if type(least) is not int or type(most) is not int or not 0 < least <= most:
        raise ConfigError(f"preprocessor_config.json: size: expected the least and the most pixels, found {known!r}.")
    return {"shortest_edge": least, "longest_edge": most}


def timestamps(frames: list[int], fps: float, together: int) -> tuple[float, ...]:
    """When each step in time is, which `together` frames make: the middle between its first and its last frame."""
    padded = [*frames, *[frames[-1]] * (-len(frames) % together)]
    return tuple((padded[first] + padded[first + together - 1]) / fps / 2 for first in range(0, len(padded), together))
