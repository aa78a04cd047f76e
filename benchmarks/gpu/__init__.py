"""The checks that need a GPU, in parts: `parts` lists them, the modules named there carry them out, each in a process
of its own (`part`), `driver` runs them with time limits, and `page` makes a page of what they found.
"""
