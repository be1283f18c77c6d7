"""What each command of hf-specreg does."""
