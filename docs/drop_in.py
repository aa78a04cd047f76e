"""Hugging Face to Megatron and back, as a script for Megatron-Bridge does it.

python drop_in.py HUGGING_FACE_FOLDER MEGATRON_FOLDER FOLDER_FOR_THE_WAY_BACK
"""

import sys

from megatron.bridge import AutoBridge  # or: from qwen3vl_convert import AutoBridge


def main(hf: str, megatron: str, back: str) -> None:
    """There and back."""
    AutoBridge.import_ckpt(hf, megatron, torch_dtype="auto", trust_remote_code=False)
    bridge = AutoBridge.from_hf_pretrained(hf)
    bridge.export_ckpt(megatron, back, show_progress=False, strict=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
