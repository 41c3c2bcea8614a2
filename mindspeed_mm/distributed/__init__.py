"""Process groups, sharding by FSDP2, and what works across ranks."""
