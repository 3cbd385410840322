"""Zheng et al. (2016)."""
