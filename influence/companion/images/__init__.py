"""Data sets, distortions and made outliers."""
