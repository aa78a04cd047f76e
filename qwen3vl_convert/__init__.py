"""Checkpoint conversion for Qwen3-VL: Hugging Face safetensors <-> Megatron distributed checkpoints."""
