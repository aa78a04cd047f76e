"""transformers and what it needs, imported when it is needed, with an error that says what to install."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen3vl_convert.errors import InputError, UsageError
from qwen3vl_convert.inference.processing.files import read_json
from qwen3vl_convert.installed import explained, need

_SETTINGS = "tokenizer_config.json"
_NAMED = ("eos_token", "pad_token", "bos_token")


@contextmanager
def transformers(about: str) -> Iterator[Any]:
    """The module, silent; what it raises about a stranger's files becomes an `InputError` about `about`.

    Its warnings are about its own future and about classes that it would rather have used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = import_module("transformers")
        log = module.utils.logging
        before = log.get_verbosity()
        log.set_verbosity(log.CRITICAL)
        try:
            yield module
        except (KeyboardInterrupt, SystemExit, GeneratorExit, UsageError, InputError):
            raise
        except ModuleNotFoundError as cause:
            raise explained(cause, "transformers") or cause from cause
        except BaseException as cause:  # a panic of tokenizers is no Exception
            raise InputError(f"{about}: {in_short(cause)}") from cause
        finally:
            log.set_verbosity(before)


def in_short(cause: BaseException) -> str:
    """One line, without what could move a terminal's cursor."""
    line = "".join(char for char in str(cause).strip().partition("\n")[0] if char.isprintable())
    return f"{type(cause).__name__}: {line[:300]}"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers, from its files alone."""
    need("A tokenizer", "transformers")
    with transformers(f"{folder}: transformers cannot make a tokenizer of these files") as module:
        try:
            return module.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            if not (folder / "tokenizer.json").is_file():
                raise
            # 4.57 does not know the class that 5.x names in tokenizer_config.json; the file itself has not changed
            named = {name: one for name, one in read_json(folder / _SETTINGS).items() if name in _NAMED}
            return module.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
