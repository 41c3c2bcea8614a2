"""Megatron-Core models that are built, filled and saved from Hugging Face folders."""
