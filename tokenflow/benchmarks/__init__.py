"""Timing and memory of the pipeline."""
