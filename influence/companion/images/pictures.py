"""Images as rows of a table, so that a file of the table shows them again."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor


def packed(images: Tensor) -> pd.DataFrame:
    """One row per image of (N, C, H, W) uint8: bytes (raw, in the order (H, W, C)), height, width, channels."""
    _, channels, height, width = images.shape
    content = [image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images]
    return pd.DataFrame({"bytes": content, "height": height, "width": width, "channels": channels})


def unpacked(row: pd.Series) -> np.ndarray:
    """The image of a row of `packed`, (H, W, C) uint8."""
    shape = (int(row["height"]), int(row["width"]), int(row["channels"]))
    return np.frombuffer(row["bytes"], dtype=np.uint8).reshape(shape)
