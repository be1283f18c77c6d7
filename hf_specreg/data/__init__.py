"""Image sets, and their way to [0, 1] pixels."""
