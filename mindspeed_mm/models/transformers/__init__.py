"""What connects Hugging Face models to the trainer: mixins, and what is known about each family."""
