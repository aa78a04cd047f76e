"""From what a user says and shows to what the engine takes: token ids and pixels, by the checkpoint's own files.

Needs transformers and, for pictures, pillow; both are imported when something is first asked of them.
"""

from qwen3vl_convert.inference.processing.files import find_files
from qwen3vl_convert.inference.processing.processing import Processing, open_processing
from qwen3vl_convert.inference.processing.prompts import Message, Prepared, Spoken

__all__ = ["Message", "Prepared", "Processing", "Spoken", "find_files", "open_processing"]
