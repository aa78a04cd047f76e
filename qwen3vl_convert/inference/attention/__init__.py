"""Attention of the text decoder over keys and values in a pool: the layer, and the kernels that can carry it out."""
