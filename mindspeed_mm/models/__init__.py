"""Models: Hugging Face models as they are, users' own classes, and the hub that finds them."""
