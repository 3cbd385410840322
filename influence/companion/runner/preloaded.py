"""What the process that kernels are forked from imports, and works out, once for all of them.

Neither pyplot nor `companion.style`, which ask for the kernel.
"""

import ipykernel.ipkernel
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_pdf
import matplotlib.figure
import pyarrow.parquet
import scipy.stats

from ..ledger import cache
from . import kernels

__all__ = ["ipykernel", "kernels", "matplotlib", "pyarrow", "scipy"]

cache.package_hash()
