"""Vision models, and where their feature space is."""
