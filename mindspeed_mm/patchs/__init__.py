"""Empty modules at the paths that published scripts import for their side effects.

There they change Megatron and torch in memory. Here nothing is patched, and the imports stay valid so that such a
script runs unchanged.
"""
