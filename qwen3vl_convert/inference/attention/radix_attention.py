"""The attention of one layer of the text decoder, over whatever holds its keys and values."""

from torch import Tensor, nn

from qwen3vl_convert.inference.attention.flash import backend_for
from qwen3vl_convert.inference.forward_batch import ForwardBatch


class RadixAttention(nn.Module):
    """Has no weights: it says which layer asks, and with which heads. The batch's backend does the work."""

    def __init__(self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, layer_id: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scaling, self.layer_id = scaling, layer_id

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, forward_batch: ForwardBatch, save_kv_cache: bool = True
    ) -> Tensor:
        """q [T, num_heads * head_dim], k and v [T, num_kv_heads * head_dim] to [T, num_heads * head_dim].

        `save_kv_cache`: put k and v into the batch's pool, where there is one. Without a backend in the batch: the
        fastest for this device.
        """
        q = q.reshape(-1, self.num_heads, self.head_dim)
        k, v = (one.reshape(-1, self.num_kv_heads, self.head_dim) for one in (k, v))
        backend = forward_batch.attn_backend or backend_for(q.device, q.dtype, self.head_dim)
        return backend.forward(q, k, v, self, forward_batch, save_kv_cache).flatten(1)
