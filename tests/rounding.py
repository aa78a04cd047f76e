"""Where a tensor's numbers are rounded: on the host or on the device, for which the meta device stands."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Roundings(TorchDispatchMode):
    """Notes on which device each change of dtype was computed: of a copy from the host that changes it, on the host, as
    it is where the device is a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        source: Tensor | None = {"aten::_to_copy": args[0], "aten::copy_": args[-1]}.get(name) if args else None
        if isinstance(source, Tensor) and source.dtype != found.dtype:
            self.devices.append(source.device.type)
        return found
