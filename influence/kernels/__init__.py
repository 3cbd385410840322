"""Batched K x K algebra: each kernel one file."""
