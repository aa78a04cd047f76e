"""The part of tiny models: all that can be checked in two minutes."""

from gpu.logits import fixed_length_vision, logits_of_tiny_models
from gpu.served import served
from gpu.verified import faults, tiny_moe

CHECKS = (served, logits_of_tiny_models, fixed_length_vision, tiny_moe, faults)
"""Graphs are captured before there are process groups, whose threads must not get in between."""
