"""Records of models of megatron-core layers, in the names of the Hugging Face model."""
