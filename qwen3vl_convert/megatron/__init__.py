"""Megatron distributed checkpoints (torch_dist): read and laid out without torch or Megatron, nothing unpickled."""
