"""TokenFlow's support code, in layers.

A module imports only from its own layer and from those before it in this order:
ops, storage, diffusion, cache, editing, evaluation, figures, benchmarks.
"""
