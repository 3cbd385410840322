"""How exact results are, by precision of the network and by device: one table for the library and its tests."""

from __future__ import annotations

from collections import defaultdict

import torch

_CPU, _CUDA, _DOUBLE, _SINGLE = "cpu", "cuda", torch.float64, torch.float32
# Largest error of a Gram relative to its largest entry, against float64 brute force.
GRAM = {(_DOUBLE, _CPU): 1e-10, (_DOUBLE, _CUDA): 1e-10, (_SINGLE, _CPU): 1e-4, (_SINGLE, _CUDA): 1e-4}
# A Triton kernel against its PyTorch reference, relative to the largest entry: the order of sums, nothing else.
KERNEL = {(_DOUBLE, _CPU): 1e-13, (_DOUBLE, _CUDA): 1e-12, (_SINGLE, _CPU): 1e-5, (_SINGLE, _CUDA): 1e-5}
# Our reverse pass against PyTorch's, relative to the largest entry; worse, and a layer takes the autograd path. What is
# looked for is another gradient, not rounding: cuDNN may choose another algorithm for another batch.
REVERSE = defaultdict(lambda: 5e-2, {torch.float64: 1e-9, torch.float32: 1e-3})
