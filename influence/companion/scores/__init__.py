"""Scores of images, layers and pixels, and how well they find something."""
