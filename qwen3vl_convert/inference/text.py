"""The text decoder. Axes: T tokens of all sequences of a batch, h features, n deepstack layers, D head_dim."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen3vl_convert.inference.attention.radix_attention import RadixAttention
from qwen3vl_convert.inference.forward_batch import ForwardBatch
from qwen3vl_convert.inference.layers import GatedMLP, Linear, MergedLinear, RMSNorm, Slots, method_for, module_slots
from qwen3vl_convert.inference.moe import SparseMLP
from qwen3vl_convert.inference.quantization import QuantizationConfig
from qwen3vl_convert.inference.rope import CosSin, mrope, rotate

ROPE_THETA = 5000000.0
MROPE_SECTION = (24, 20, 20)


class Qwen3VLAttention(nn.Module):
    """Attention with norms on each head's query and key before they are turned by M-RoPE.

    `quant_config` and `prefix`, the name of the layer in the model, decide how its weights are kept. cos and sin of the
    positions are computed once per forward and shared by all layers, so `max_position_embeddings` costs no memory.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_id: int,
        rope_theta: float = ROPE_THETA,
        rms_norm_eps: float = 1e-6,
        mrope_section: Sequence[int] = MROPE_SECTION,
        mrope_interleaved: bool = True,
        max_position_embeddings: int = 32768,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_size, self.kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.scaling = head_dim**-0.5
        self.rope_theta, self.max_position_embeddings = rope_theta, max_position_embeddings
        self.mrope_section, self.mrope_interleaved = list(mrope_section), mrope_interleaved
        self.use_fused_qkv = True
        sizes = (self.q_size, self.kv_size, self.kv_size)
        self.qkv_proj = MergedLinear(hidden_size, sizes, attention_bias, method_for(quant_config, f"{prefix}.qkv_proj"))
        self.o_proj = Linear(self.q_size, hidden_size, attention_bias, method_for(quant_config, f"{prefix}.o_proj"))
        self.q_norm, self.k_norm = RMSNorm(head_dim, rms_norm_eps), RMSNorm(head_dim, rms_norm_eps)
        self.attn = RadixAttention(num_heads, head_dim, self.scaling, num_kv_heads, layer_id)

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """positions [3, T] or [T], hidden_states [T, h]."""
        q, k, v = self.qkv_proj(hidden_states).split(self.qkv_proj.sizes, dim=-1)
        q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim))
        k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim))
        cos, sin = self._rotary(positions, q.dtype, forward_batch)
        return self.o_proj(self.attn(rotate(q, cos, sin), rotate(k, cos, sin), v, forward_batch))  # type: ignore[no-any-return]

    def _rotary(self, positions: Tensor, dtype: torch.dtype, batch: ForwardBatch) -> CosSin:
        """Of this forward, rounded to the dtype that the model computes in, as it was trained."""
        wanted = (self.head_dim, self.rope_theta, tuple(self.mrope_section), self.mrope_interleaved)
        key = (wanted, positions.data_ptr(), positions.shape, dtype)
        if batch.rotary is None or batch.rotary[0] != key:
            cos, sin = mrope(positions, *wanted)
            batch.rotary = (key, positions, (cos.to(dtype), sin.to(dtype)))
        found: CosSin = batch.rotary[2]
        return found

    def slots(self, prefix: str) -> Slots:
        yield from self.qkv_proj.slots(*(f"{prefix}.{name}_proj" for name in "qkv"))
        yield from self.o_proj.slots(f"{prefix}.o_proj")
        for name in ("q_norm", "k_norm"):
            yield from module_slots(self.get_submodule(name), f"{prefix}.{name}")


class Qwen3VLDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual. With `num_experts` the MLP is a mixture of experts
    of `moe_intermediate_size`, of which each token gets `num_experts_per_tok`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        layer_id: int,
        rope_theta: float = ROPE_THETA,
        rms_norm_eps: float = 1e-6,
        mrope_section: Sequence[int] = MROPE_SECTION,
        mrope_interleaved: bool = True,
        max_position_embeddings: int = 32768,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_bias: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
    ) -> None:
        super().__init__()
        self.self_attn = Qwen3VLAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            layer_id,
            rope_theta,
            rms_norm_eps,
            mrope_section,
            mrope_interleaved,
            max_position_embeddings,
            quant_config,
            f"{prefix}.self_attn",
            attention_bias,
        )
        self.mlp: GatedMLP | SparseMLP
        if num_experts:
            sizes = (moe_intermediate_size, num_experts, num_experts_per_tok)
            self.mlp = SparseMLP(hidden_size, *sizes, quant_config, f"{prefix}.mlp")
        else:
            self.mlp = GatedMLP(hidden_size, intermediate_size, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        deepstack_embeds: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [T, h]. `deepstack_embeds` [T, h], zeros for text, is added to what comes out."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(positions, normed, forward_batch)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states if deepstack_embeds is None else hidden_states + deepstack_embeds

    def slots(self, prefix: str) -> Slots:
        for name in ("self_attn", "mlp"):
            part: Any = self.get_submodule(name)
            yield from part.slots(f"{prefix}.{name}")
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from module_slots(self.get_submodule(name), f"{prefix}.{name}")


class Qwen3VLTextModel(nn.Module):
    """Embedding, decoder layers and the final norm."""

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 32,
        head_dim: int = 128,
        rope_theta: float = ROPE_THETA,
        rms_norm_eps: float = 1e-6,
        mrope_section: Sequence[int] = MROPE_SECTION,
        mrope_interleaved: bool = True,
        max_position_embeddings: int = 32768,
        quant_config: QuantizationConfig | None = None,
        attention_bias: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size).requires_grad_(False)
        self.layers = nn.ModuleList(
            Qwen3VLDecoderLayer(
                hidden_size,
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                intermediate_size,
                number,
                rope_theta,
                rms_norm_eps,
                mrope_section,
                mrope_interleaved,
                max_position_embeddings,
                quant_config,
                f"model.layers.{number}",
                attention_bias,
                num_experts,
                num_experts_per_tok,
                moe_intermediate_size,
            )
            for number in range(num_hidden_layers)
        )
        self.norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        input_deepstack_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids [T], positions [3, T] or [T], to hidden states [T, h] after the final norm.

        `input_embeds` [T, h]: instead of the embedding of `input_ids`. `input_deepstack_embeds` [T, n * h], zeros for
        text: the i-th h of them are added to what comes out of layer i; of more than there are layers, the rest is not
        used.
        """
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        added = () if input_deepstack_embeds is None else torch.split(input_deepstack_embeds, self.hidden_size, dim=-1)
        for number, layer in enumerate(self.layers):
            deepstack = added[number] if number < len(added) else None
            hidden_states = layer(positions, hidden_states, forward_batch, deepstack)
        return self.norm(hidden_states)  # type: ignore[no-any-return]

    def slots(self, prefix: str) -> Slots:
        for name in ("embed_tokens", "norm"):
            yield from module_slots(self.get_submodule(name), f"{prefix}.{name}")
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Qwen3VLDecoderLayer)
            yield from layer.slots(f"{prefix}.layers.{number}")
