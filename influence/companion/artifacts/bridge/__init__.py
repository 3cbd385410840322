"""The metric tensor and the stability loss."""
