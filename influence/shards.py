"""The files of a run of ``score``: which batches they hold, whether they are of the same model and data, writing."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

_RUN = "_run.json"
# Where a file says which batches it was made from.
_MADE_FROM = b"influence.made_from"
# Batches of finished files that are loaded again to see whether they are the same.
_MOST_COMPARED = 32
# Where data sets keep their labels, or all they hold.
_LABELS = ("targets", "labels", "tensors")


@dataclass(frozen=True)
class Batch:
    """A batch of a loader.

    Attributes:
        shard: Number of its file.
        numbers: Of its examples.
        content: What the loader yielded.
        wanted: Whether its file is ours to write.
        ends_file: Whether it is the last of its file.
        is_last: Whether it is the last of all.
    """

    shard: int
    numbers: Sequence[int]
    content: Any
    wanted: bool
    ends_file: bool
    is_last: bool


def batches(
    loader: Iterable[Any], folder: Path, labels: str, per_shard: int, mine: Callable[[int], bool]
) -> Iterator[Batch]:
    """Yield the batches of the files that are ours, and of the others what a loader makes anyway.

    Raises:
        ValueError: If a file that is there was made from other batches, in a sample of them.
    """
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None and hasattr(loader.dataset, "__getitem__"):
        # Batches of other files are not even loaded.
        indices = [list(batch) for batch in loader.batch_sampler]
        numbers: list[Sequence[int]]
        if all(isinstance(index, int | np.integer) for batch in indices for index in batch):
            numbers = [[int(index) for index in batch] for batch in indices]
        else:
            ends = list(itertools.accumulate(map(len, indices)))
            numbers = [range(end - len(batch), end) for batch, end in zip(indices, ends, strict=True)]
        _compare_sample(loader, indices, numbers, folder, labels, per_shard)
        chosen = [i for i in range(len(indices)) if mine(i // per_shard)]
        for i, content in zip(chosen, _load(loader, [indices[i] for i in chosen]), strict=True):
            is_last = i + 1 == len(indices)
            yield Batch(i // per_shard, numbers[i], content, True, is_last or (i + 1) % per_shard == 0, is_last)
        return
    start, waiting = 0, None
    wanted = False
    for i, content in enumerate(loader):
        if waiting is not None:
            # Whether a batch is the last shows only when the next one comes.
            yield replace(waiting, ends_file=i % per_shard == 0)
        wanted = mine(i // per_shard) if i % per_shard == 0 else wanted
        stop = start + len(unpack(content, "predicted")[0])
        waiting = Batch(i // per_shard, range(start, stop), content, wanted, False, False)
        start = stop
    if waiting is not None:
        yield replace(waiting, ends_file=True, is_last=True)


def unpack(batch: Any, labels: str) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of what a loader yielded; no labels where they are "predicted"."""
    if isinstance(batch, Tensor):
        batch = [batch]
    if not isinstance(batch, list | tuple) or not batch or not isinstance(batch[0], Tensor):
        raise ValueError(
            f"loader must yield x or (x, labels, ...), got {type(batch).__name__}. Use a collate_fn that returns these."
        )
    if labels == "predicted":
        return batch[0], None
    if len(batch) < 2:
        raise ValueError(
            "loader must yield (x, labels, ...), got x alone. Give it the labels, or pass labels='predicted' for the "
            "classes that the model predicts."
        )
    return batch[0], torch.as_tensor(batch[1])


def _load(loader: DataLoader[Any], indices: list[list[Any]]) -> Iterable[Any]:
    """These batches alone, made as the loader makes its own."""
    return DataLoader(
        loader.dataset,
        batch_sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


# -- what a file was made from ----------------------------------------------------------------------------------------


@dataclass
class MadeFrom:
    """The batches of a file.

    Attributes:
        numbers: Of the first and the last example.
        sizes: Examples in each batch.
        digests: Of the numbers, examples and labels of each batch.
        is_last: Whether the data end with it.
    """

    numbers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    is_last: bool = False

    @classmethod
    def of(cls, file: Path) -> MadeFrom:
        """What a file says.

        Raises:
            ValueError: If it says nothing.
        """
        kept = (pq.read_schema(file).metadata or {}).get(_MADE_FROM)
        if kept is None:
            raise ValueError(f"{file} does not say which data it is of. Delete the folder and run influence.score.")
        return cls(**json.loads(kept))

    def add(self, numbers: Sequence[int], x: Tensor, labels: Tensor | None) -> None:
        """Count one more batch."""
        self.numbers = [*self.numbers[:1], *numbers]
        self.numbers = [self.numbers[0], self.numbers[-1]]
        self.sizes.append(len(x))
        self.digests.append(_digest(numbers, x, labels))

    def require_same(self, file: Path) -> None:
        """Refuse a file that was made from other batches."""
        if MadeFrom.of(file) != self:
            raise _other_data(file)


def _digest(numbers: Sequence[int], *tensors: Tensor | None) -> str:
    digest = hashlib.sha256(repr(list(numbers)).encode())
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _compare_sample(
    loader: DataLoader[Any],
    indices: list[list[Any]],
    numbers: list[Sequence[int]],
    folder: Path,
    labels: str,
    per_shard: int,
) -> None:
    """Refuse files whose batches have other sizes, or in a sample other examples, than the loader's."""
    finished: dict[int, str] = {}
    for shard in range(-(-len(indices) // per_shard)):
        file = file_of(folder, shard)
        if file.exists():
            first, end = shard * per_shard, min((shard + 1) * per_shard, len(indices))
            before = MadeFrom.of(file)
            sizes = [len(batch) for batch in indices[first:end]]
            if (before.sizes, before.is_last) != (sizes, end == len(indices)):
                raise _other_data(file)
            finished.update(zip(range(first, end), before.digests, strict=True))
    require_no_more(folder, (len(indices) - 1) // per_shard)
    places = torch.linspace(0, len(finished) - 1, min(_MOST_COMPARED, len(finished))).round().long()
    sample = [list(finished)[place] for place in places]
    for i, content in zip(sample, _load(loader, [indices[i] for i in sample]), strict=True):
        if _digest(numbers[i], *unpack(content, labels)) != finished[i]:
            raise _other_data(file_of(folder, i // per_shard))


def require_no_more(folder: Path, last: int) -> None:
    """Refuse files beyond the end of the data."""
    for file in sorted(folder.glob("part-*.parquet")):
        if file > file_of(folder, last):
            raise _other_data(file)


def _other_data(file: Path) -> ValueError:
    before = MadeFrom.of(file)
    first, last = before.numbers
    return ValueError(
        f"{file.parent} holds scores of other data: {file.name} was made from examples {first} to {last} of them"
        f"{', the last ones' if before.is_last else ''}, and the loader yields others in their place, or the same in "
        "other batches, or changes them at random. Choose another path or delete it."
    )


# -- model, and all that must be the same in one folder ----------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """Of the modules with their settings, as they print, and of all numbers they hold."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    held = {**dict(model.named_buffers()), **model.state_dict()}
    for name, value in sorted(held.items()):
        digest.update(f"{name} {_digest((), value) if isinstance(value, Tensor) else value!r}".encode())
    return digest.hexdigest()


def labels_of(loader: Iterable[Any]) -> str | None:
    """Digest of the labels that the data set of a loader keeps, if it keeps them where others do."""
    dataset = getattr(loader, "dataset", None)
    for name in _LABELS:
        held = getattr(dataset, name, None)
        if held is not None:
            try:
                return _digest((), *map(torch.as_tensor, held if isinstance(held, tuple) else [held]))
            except (TypeError, ValueError, RuntimeError):  # no numbers
                return None
    return None


def claim(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a folder of other scores, mark an empty one as ours."""
    text = json.dumps(key, indent=1, sort_keys=True)
    mark = folder / _RUN
    if not mark.exists():
        atomically(mark, lambda part: part.write_text(text))
    if mark.read_text() != text:
        before = json.loads(mark.read_text())
        changed = [name for name in key if before.get(name) != key[name]]
        raise ValueError(
            f"{folder} holds scores of another run, with other {', '.join(changed)}. Choose another path or delete it."
        )


# -- files -------------------------------------------------------------------------------------------------------------


def file_of(folder: Path, shard: int) -> Path:
    """Where a file of a run is."""
    return folder / f"part-{shard:06d}.parquet"


def write(file: Path, table: pd.DataFrame, made_from: MadeFrom) -> None:
    """Write a file, whole or not at all, with the batches that it was made from."""
    for left in file.parent.glob(f".{file.name}.*"):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    columns = pa.Table.from_pandas(table, preserve_index=False)
    kept = {**(columns.schema.metadata or {}), _MADE_FROM: json.dumps(vars(made_from)).encode()}
    atomically(file, partial(pq.write_table, columns.replace_schema_metadata(kept)))


def read_all(folder: Path) -> pd.DataFrame:
    """All rows; raises as ``read_scores`` says."""
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no scores. Run influence.score(model, loader, {str(folder)!r}).")
    there = len(files) if MadeFrom.of(files[-1]).is_last else len(files) + 1
    missing = [name for name in (file_of(folder, i) for i in range(there)) if name not in files]
    if missing:
        raise ValueError(f"{folder} lacks file {missing[0].name}. Run influence.score again to go on.")
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let something write a file beside it, then move it to its place."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
