"""Exact Grams of the parameters, read off the autograd graph of one forward pass: each family of layers one file."""
