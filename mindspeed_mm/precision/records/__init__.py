"""What a record is made of: sketches of tensors under names, and the files that hold them."""
