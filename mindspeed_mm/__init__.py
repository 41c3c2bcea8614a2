"""MindSpeed-MM: multimodal training on NPU, CUDA and CPU.

Importing this package is cheap on purpose: neither torch, megatron nor transformers is loaded until a
module that needs it is imported.
"""

__version__ = "0.1.0"
