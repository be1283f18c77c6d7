"""Encoders with their reports and cards on the Hugging Face Hub."""
