"""Switches of the device that change numbers."""

from __future__ import annotations

import os

import torch


def use_deterministic_algorithms() -> None:
    """Choose deterministic kernels and collectives; an operation that has none raises when it is used.

    Call this before the first kernel runs: the libraries read their variables once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    os.environ.setdefault("CLOSE_MATMUL_K_SHIFT", "1")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    torch.backends.cudnn.benchmark = False


def allow_tf32() -> None:
    """Let float32 matrix products round their inputs to 10 bits of mantissa where that is faster."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
