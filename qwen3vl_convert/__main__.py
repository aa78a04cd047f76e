"""`python -m qwen3vl_convert` is `qwen3vl-convert`."""

from qwen3vl_convert.cli.app import main

if __name__ == "__main__":
    main()
