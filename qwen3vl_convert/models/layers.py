"""The two transformer layers: Megatron-Core's, with deepstack going in (text) and coming out (vision).

Both send it along `context`, the second stream that Megatron-Core carries from layer to layer beside the hidden states
(for cross-attention, which Qwen3-VL has not). So activation recompute, virtual pipelines and every schedule treat it as
they treat hidden states, and no forward of Megatron-Core had to be written again.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class Qwen3VLTransformerLayer(TransformerLayer):
    """A text layer. `context` is [deepstack features, S, B, h], zero at text tokens; layer i adds slice i."""

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(hidden states [S, B, h] after this layer and its deepstack feature, `context` unchanged)."""
        hidden_states, _ = super().forward(*args, context=None, **kwargs)
        if context is not None and self.layer_number <= len(context):
            hidden_states = hidden_states + context[self.layer_number - 1]
        return hidden_states, context


class Qwen3VLVisionTransformerLayer(TransformerLayer):
    """A vision layer. `context` collects [taps, S, 1, v]: what the layers of `deepstack_visual_indexes` gave.

    The last layer returns the taps and its own output end to end, [(taps + 1) * S, 1, v], since only hidden states
    leave Megatron-Core's block.
    """

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(hidden states [S, 1, v], or of the last layer [(taps + 1) * S, 1, v]; the taps so far)."""
        hidden_states, _ = super().forward(*args, context=None, **kwargs)
        if self.layer_number - 1 in self.config.deepstack_visual_indexes:
            tap = hidden_states[None]
            context = tap if context is None else torch.cat((context, tap))
        if self.layer_number == self.config.num_layers and context is not None:
            hidden_states = torch.cat((*context, hidden_states))
        return hidden_states, context
