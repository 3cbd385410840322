"""`python -m influence.companion`."""

from __future__ import annotations

if __name__ == "__main__":  # kernels import this file, see runner/kernels.py
    import sys

    from .runner.cli import main

    sys.exit(main())
