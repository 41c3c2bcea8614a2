"""The documented import path of a few data helpers."""
