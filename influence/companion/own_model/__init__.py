"""The reader's own model and data."""
