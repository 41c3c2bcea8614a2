"""What every model shares: the base class and the model hub."""
