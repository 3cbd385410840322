"""Benchmarks against peers; see run.py."""
