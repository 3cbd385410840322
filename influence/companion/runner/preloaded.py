"""What the process that kernels are forked from imports, and works out, once for all of them.

Neither pyplot nor `companion.style`, which ask for the kernel.
"""

import ipykernel.ipkernel
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_pdf
import matplotlib.figure
import pyarrow.parquet
import scipy.stats

from ..ledger import cache, paths
from . import kernels

__all__ = ["ipykernel", "kernels", "matplotlib", "pyarrow", "scipy"]

# Not `package_hash`: each kernel reads the files anew, so that an edit made meanwhile is seen.
for _file in paths.PACKAGE.rglob("*.py"):
    cache.code_digest(_file.read_text(encoding="utf-8"))
