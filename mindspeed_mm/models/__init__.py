"""Models, and how models of others are found, adapted and frozen."""
