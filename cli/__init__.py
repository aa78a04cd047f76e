"""The command line: parse, call, print. What it calls are the functions of the Python API."""
