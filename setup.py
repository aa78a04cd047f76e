"""The list of packages, which pyproject.toml cannot say: the rooms found here, and the two that stand beside them.

Both are found through their symlinks in a checkout, and named because a source distribution carries no symlinks.
"""

from setuptools import find_packages, setup

BESIDE = ["qwen3vl_convert.mappings", "qwen3vl_convert.cli"]

setup(packages=sorted({*find_packages(include=["qwen3vl_convert", "qwen3vl_convert.*"]), *BESIDE}))
