"""Checkpoints: saving and resuming a run, and weights in and out of Hugging Face folders."""
