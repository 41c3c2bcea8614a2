"""Precision alignment: what a run computes is written down, so that two runs can be compared."""
