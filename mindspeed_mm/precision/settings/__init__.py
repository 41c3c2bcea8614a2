"""What runs are configured with, whatever each system calls it."""
