"""Self-attention that takes one rotary angle per token, and the attention kernel that runs without Transformer Engine.

Axes: S sequence, B batch, T tokens of a packed batch, N heads, G key-value heads, D head_dim.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen3vl_convert.models.rope import apply_rotary


class Qwen3VLSelfAttention(SelfAttention):
    """Megatron-Core's self-attention with the rotation of Qwen3-VL.

    Megatron-Core takes the angles of a packed batch to be those of 0, 1, 2... in every sequence. Here each token has
    its own (images have equal ones, in three axes), so queries and keys are turned as soon as they are there, and the
    base class gets no angles. Keys enter an inference cache turned.
    """

    _angles: Tensor | None = None
    attn_mask_type: AttnMaskType

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, h], rotary_pos_emb angles [S, B or 1, 1, D]; (output [S, B, h], bias)."""
        usual_mask, self._angles = self.attn_mask_type, rotary_pos_emb
        if attention_mask is not None and usual_mask == AttnMaskType.causal:
            self.attn_mask_type = AttnMaskType.arbitrary  # Transformer Engine ignores the mask of a causal attention
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.attn_mask_type, self._angles = usual_mask, None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query [S, B, N, D], key and value [S, B, G, D] of this rank, query and key turned."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is not None:
            in_fp32 = self.config.apply_rotary_pos_emb_in_fp32
            query, key = (apply_rotary(x, self._angles, in_fp32=in_fp32) for x in (query, key))
        return query, key, *rest


class TorchAttention(MegatronModule):
    """torch's attention kernels behind the interface of Megatron-Core's core attention; packed batches included."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size} needs the attention of Transformer Engine, "
                "which is not in use here: install transformer_engine on a GPU machine, or set it to 1."
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S', B, G, D]; [S, B, N * D]. Packed (thd): no batch axis on either.

        `attention_mask` [B or 1, 1, S, S'], True where a key must not be seen, says all; without it `attn_mask_type`
        decides. `attention_bias` is added to the scaled scores.
        """
        causal = attn_mask_type == AttnMaskType.causal
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, causal).flatten(1)
        mask = attention_bias if attention_mask is None else ~attention_mask
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        attended_BNSD = self._attend(query, key, value, mask, causal and mask is None)
        return attended_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSeqParams, causal: bool
    ) -> Tensor:
        """Each sequence attends to itself. Where the lengths are known to the host, one after another, without waste;
        on a GPU, where asking for them would wait for it, all at once, padded to the longest.
        """
        starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        if starts.device.type != "cpu":
            return self._padded(query_TND, key_TGD, value_TGD, starts, packed.max_seqlen_q, causal)
        lengths = starts.diff().tolist()
        parts = (torch.split(x.transpose(0, 1), lengths, dim=1) for x in (query_TND, key_TGD, value_TGD))
        attended = [self._attend(q[None], k[None], v[None], None, causal)[0] for q, k, v in zip(*parts, strict=True)]
        return torch.cat(attended, dim=1).transpose(0, 1)

    def _padded(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, starts: Tensor, longest: int, causal: bool
    ) -> Tensor:
        """All sequences as one batch of `longest` tokens each; nobody sees a key that is padding."""
        count, tokens = len(starts) - 1, len(query_TND)
        at = torch.arange(tokens, device=starts.device)
        sequence = torch.bucketize(at, starts[1:], right=True)
        row = sequence * longest + at - starts[sequence]
        query_BNSD, key_BGSD, value_BGSD = (
            x.new_zeros(count * longest, *x.shape[1:])
            .index_copy(0, row, x)
            .view(count, longest, *x.shape[1:])
            .transpose(1, 2)
            for x in (query_TND, key_TGD, value_TGD)
        )
        # Under a causal mask the padding comes last and no real token sees it. Equal lengths have none at all.
        mask = None
        if not causal and count * longest != tokens:
            mask = (torch.arange(longest, device=starts.device) < starts.diff()[:, None])[:, None, None]
        attended = self._attend(query_BNSD, key_BGSD, value_BGSD, mask, causal)
        return attended.transpose(1, 2).flatten(0, 1)[row]

    def _attend(self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Any, causal: bool) -> Tensor:
        shared = query_BNSD.shape[1] // key_BGSD.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (key_BGSD, value_BGSD))
        dropout = self.config.attention_dropout if self.training else 0.0
        kernel = {"attn_mask": mask, "is_causal": causal, "dropout_p": dropout, "scale": self.softmax_scale}
        if not dropout or self.config.sequence_parallel:
            return scaled_dot_product_attention(query_BNSD, key, value, **kernel)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # other ranks hold other heads: other dropout
            return scaled_dot_product_attention(query_BNSD, key, value, **kernel)
