"""Scripts that train, evaluate and publish."""
