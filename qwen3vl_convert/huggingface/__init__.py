"""Folders of safetensors as transformers and the Hub know them: read strictly, checked, and planned byte for byte.

Nothing here copies a weight: reading ends at headers, writing at the bytes that stand before and beside the data.
"""

from qwen3vl_convert.huggingface.config import config_json, portable_config, rebuild_config
from qwen3vl_convert.huggingface.experts import LAYOUTS, experts_layout
from qwen3vl_convert.huggingface.files import INDEX_FILE, MANIFEST_FILE, SINGLE_FILE
from qwen3vl_convert.huggingface.folder import HuggingFaceCheckpoint, read_folder
from qwen3vl_convert.huggingface.hub import Resolved, resolve
from qwen3vl_convert.huggingface.safetensors import (
    METADATA,
    Entry,
    Header,
    HeaderEntry,
    file_order,
    header_bytes,
    read_header,
)
from qwen3vl_convert.huggingface.writer import file_names, hub_order, index_json, plan_files, split_files

__all__ = [
    "INDEX_FILE",
    "LAYOUTS",
    "MANIFEST_FILE",
    "METADATA",
    "SINGLE_FILE",
    "Entry",
    "Header",
    "HeaderEntry",
    "HuggingFaceCheckpoint",
    "Resolved",
    "config_json",
    "experts_layout",
    "file_names",
    "file_order",
    "header_bytes",
    "hub_order",
    "index_json",
    "plan_files",
    "portable_config",
    "read_folder",
    "read_header",
    "rebuild_config",
    "resolve",
    "split_files",
]
