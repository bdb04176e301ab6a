"""Stable Diffusion: checkpoints, models, DDIM; knows nothing of TokenFlow."""
