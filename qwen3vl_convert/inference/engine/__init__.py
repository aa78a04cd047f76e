"""Serving: requests come and go, and every step runs one forward of all that are under way.

Memory for keys and values is given out in pages, and prefixes that were seen before are not computed again.
"""
