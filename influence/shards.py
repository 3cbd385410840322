"""The files of a run of ``score``: which batches they hold, whether they are of the same model and data, writing."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from influence.inputs import Inputs
from influence.measures import log_ceiling

TEMPORARY = ".tmp-"
_RUN = "_run.json"
# Where a file says which batches it was made from.
_MADE_FROM = b"influence.made_from"
# Batches of finished files that are loaded again to see whether they are the same.
_MOST_COMPARED = 32
# Difference of the log of a ceiling, in units of the largest logit, that another device may make.
_ROUNDING = 5e-3
# Under which names a batch that is a mapping holds its labels.
_TARGETS = ("labels", "label")
# Where data sets keep their labels, or all they hold.
_LABELS = ("targets", "labels", "tensors")
# What else decides how a DataLoader makes a batch.
_LOADING = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")


@dataclass(frozen=True)
class Batch:
    """Batch number ``place`` of a loader, with the numbers of its examples; ``wanted``: its file is ours to write."""

    place: int
    numbers: Sequence[int]
    inputs: Inputs
    labels: Tensor | None
    wanted: bool
    is_last: bool

    def __post_init__(self) -> None:
        """Refuse examples without a number."""
        if len(self.inputs) != len(self.numbers):
            count = len(self.inputs)
            raise ValueError(f"loader must keep the examples of a batch, got {count} of {len(self.numbers)}.")

    @property
    def digest(self) -> str:
        """Of all that its rows are made from."""
        named = list(self.inputs.names) if self.inputs.by_keyword else []
        return _digest([*self.numbers, *named], *self.inputs.tensors, self.labels)


def batches(
    loader: Iterable[Any], folder: Path, labels: str, per_file: int, mine: Callable[[int], bool]
) -> Iterator[Batch]:
    """Yield the batches of the files that are ours, and of the others those that cost nothing, or a sample first.

    Raises:
        ValueError: If the loader yields something else, or there are files beyond the end of the data.
    """
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None and not isinstance(dataset, IterableDataset):
        # Batches of other files are not even loaded.
        indices = [list(batch) for batch in loader.batch_sampler]
        places, last = range(len(indices)), len(indices) - 1
        _require_end(folder, last, per_file)
        finished = [i for i in places if file_of(folder, i // per_file).exists()]
        sample = torch.linspace(0, len(finished) - 1, min(_MOST_COMPARED, len(finished))).round().long()
        chosen = [(finished[i], False) for i in sample] + [(i, True) for i in places if mine(i // per_file)]
        options: dict[str, Any] = {name: getattr(loader, name) for name in _LOADING}
        part = DataLoader(loader.dataset, batch_sampler=[indices[i] for i, _ in chosen], **options)
        has_numbers = all(isinstance(index, int | np.integer) for index in itertools.chain(*indices))
        ends = list(itertools.accumulate(map(len, indices)))
        for (i, wanted), content in zip(chosen, part, strict=True):
            counted = range(ends[i] - len(indices[i]), ends[i])
            numbers = [int(index) for index in indices[i]] if has_numbers else counted
            yield Batch(i, numbers, *_unpack(content, labels, numbers), wanted, i == last)
        return
    start, i, wanted = 0, -1, False
    for i, (content, following) in enumerate(itertools.pairwise(itertools.chain(loader, [None]))):
        wanted = mine(i // per_file) if i % per_file == 0 else wanted
        inputs, given = _unpack(content, labels, range(start, sys.maxsize))
        yield Batch(i, range(start, start + len(inputs)), inputs, given, wanted, following is None)
        start += len(inputs)
    _require_end(folder, i, per_file)


def _require_end(folder: Path, last: int, per_file: int) -> None:
    """Refuse data without a batch, and files beyond the last batch."""
    if last < 0:
        raise ValueError("loader must yield some examples, got none. Check the data set and its path.")
    for file in _files(folder):
        if file > file_of(folder, last // per_file):
            _refuse(file)


def _unpack(batch: Any, labels: str, numbers: Sequence[int]) -> tuple[Inputs, Tensor | None]:
    """Inputs and labels of what a loader yielded; no labels where they are "predicted"."""
    if isinstance(batch, Mapping):
        without = {name: value for name, value in batch.items() if name not in _TARGETS}
        parts: list[Any] = [without, *(batch[name] for name in _TARGETS if name in batch)]
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else [batch]
    if not parts or not isinstance(parts[0], Tensor | list | tuple | Mapping):
        found = type(parts[0] if parts else batch).__name__
        raise ValueError(
            "loader must yield x, (x, labels, ...) or a mapping with 'labels', x as for metric_tensor, got "
            f"{found}. Use a collate_fn that returns these."
        )
    inputs = Inputs.of(parts[0], numbers)
    if labels == "predicted":
        second = None if isinstance(batch, Mapping) or len(parts) < 2 else parts[1]
        if isinstance(second, Tensor) and (second.ndim != 1 or second.is_floating_point()):
            raise ValueError(
                f"loader must yield x alone or (x, labels, ...), got {second.dtype} {tuple(second.shape)} in the place "
                "of the labels, which the model would never see. Put several inputs in a tuple of their own, as in "
                "((x, mask),), or leave the rest out."
            )
        return inputs, None
    if len(parts) < 2:
        raise ValueError(
            "loader must yield (x, labels, ...), or 'labels' in a mapping, got x alone. Give it the labels, or pass "
            "labels='predicted' for the classes that the model predicts."
        )
    return inputs, torch.as_tensor(parts[1])


# -- what a file was made from, and all that must be the same in one folder --------------------------------------------


def _digest(numbers: Sequence[int | str], *tensors: Tensor | None) -> str:
    result = hashlib.sha256(repr(list(numbers)).encode())
    for tensor in tensors:
        if tensor is not None:
            result.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous()
            result.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


@contextlib.contextmanager
def _intact(file: Path, remedy: str = "Delete it and run influence.score again.") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}). {remedy}") from None


def _read(file: Path, columns: list[str] | None = None) -> pd.DataFrame:
    with _intact(file):
        return pd.read_parquet(file, columns=columns)


def _made_from(file: Path) -> dict[str, Any]:
    """First and last example of a file, digests of its batches, and whether the data end with it."""
    with _intact(file):
        kept = (pq.read_schema(file).metadata or {}).get(_MADE_FROM)
    if kept is None:
        raise ValueError(f"{file} does not say which data it is of. Delete the folder and run influence.score.")
    return json.loads(kept)


def require_same(file: Path, place: int, batch: Batch) -> None:
    """Refuse a file that was made from another batch than this one at a place in it."""
    before = _made_from(file)
    ends = before["is_last"] and place == len(before["digests"]) - 1
    if before["digests"][place : place + 1] != [batch.digest] or batch.is_last != ends:
        _refuse(file)


def require_same_model(file: Path, numbers: Sequence[int], logits: Tensor) -> None:
    """Refuse a file with other ceilings of some of its examples than those of what the model computes now.

    Code and plain attributes are in no fingerprint.
    """
    table = _read(file, columns=["example", "label", "ceiling"])
    rows = table.drop_duplicates("example").set_index("example").loc[list(numbers)]
    labels = torch.tensor(rows["label"].to_numpy(), device=logits.device)
    before = torch.tensor(rows["ceiling"].to_numpy(), device=logits.device).log()
    # A ceiling beyond the largest float64 was stored as infinity; through exp and log today's becomes infinite, too.
    now = log_ceiling(logits.double().log_softmax(1), labels).exp().log()
    rounding = max(_ROUNDING, torch.finfo(logits.dtype).eps ** 0.5) * max(1.0, float(logits.abs().max()))
    if not bool(torch.isclose(before, now, rtol=0, atol=rounding).all()):
        raise ValueError(
            f"the model computes something else now than when {file} was made: its code or a setting has changed. "
            "Choose another path or delete the folder."
        )


def _refuse(file: Path) -> NoReturn:
    before = _made_from(file)
    first, last = before["numbers"]
    raise ValueError(
        f"{file.parent} holds scores of other data: {file.name} was made from examples {first} to {last} of them"
        f"{', the last ones' if before['is_last'] else ''}, and the loader yields others in their place, or the same "
        "in other batches, or changes them at random. Choose another path or delete it."
    )


def fingerprint(model: nn.Module) -> str:
    """Of the modules with their settings, as they print, and of all numbers they hold."""
    result = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, value in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        result.update(f"{name} {_digest((), value) if isinstance(value, Tensor) else value!r}".encode())
    return result.hexdigest()


def labels_of(loader: Iterable[Any]) -> str | None:
    """Digest of the labels that the data set of a loader keeps, if it keeps them where others do."""
    dataset = getattr(loader, "dataset", None)
    for held in (getattr(dataset, name, None) for name in _LABELS):
        if held is not None:
            try:
                return _digest((), *map(torch.as_tensor, held if isinstance(held, tuple) else [held]))
            except (TypeError, ValueError, RuntimeError):  # no numbers
                return None
    return None


def require_order(loader: Iterable[Any]) -> None:
    """Refuse with ValueError a loader that goes through its data in another order each time, or leaves some to others.

    That is known beforehand of the samplers of data with indices.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSampler):
        raise ValueError(
            "loader must go through all of the data, got a DistributedSampler. Leave it out: the processes share the "
            "batches by RANK and WORLD_SIZE."
        )
    source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    first, again = ("\n".join(map(str, source)) for _ in range(2))
    # A few examples may come in the same order twice by chance.
    if first != again or isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            "loader must go through the data in the same order each time, got shuffle=True or a random sampler. Switch "
            "it off."
        )


def claim(folder: Path, key: dict[str, Any], *, begin: bool = True) -> None:
    """Refuse a folder of other scores; to `begin` with, mark one without any as ours."""
    text = json.dumps(key, indent=1, sort_keys=True)
    mark, whole = folder / _RUN, "Choose another path or delete the folder."
    if begin and not _files(folder):
        atomically(mark, lambda part: part.write_text(text))
    if not mark.exists():
        raise ValueError(f"{folder} holds scores, but no {_RUN}, which says what they are of. {whole}")
    if mark.read_text() != text:
        with _intact(mark, whole):
            before = json.loads(mark.read_text())
        changed = [name for name in key if before.get(name) != key[name]]
        raise ValueError(f"{folder} holds scores of another run, with other {', '.join(changed)}. {whole}")


# -- files -------------------------------------------------------------------------------------------------------------


def file_of(folder: Path, number: int) -> Path:
    """Where a file of a run is."""
    return folder / f"part-{number:06d}.parquet"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def write(file: Path, table: pd.DataFrame, digests: Sequence[str], *, is_last: bool) -> None:
    """Write a file, whole or not at all, with the digests of its batches and whether the data end with it."""
    for left in file.parent.glob(f"{TEMPORARY}*-{file.name}"):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    made_from = {"numbers": table["example"].iloc[[0, -1]].tolist(), "digests": digests, "is_last": is_last}
    columns = pa.Table.from_pandas(table, preserve_index=False)
    kept = {**(columns.schema.metadata or {}), _MADE_FROM: json.dumps(made_from).encode()}
    atomically(file, partial(pq.write_table, columns.replace_schema_metadata(kept)))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader, or a run after `kill -9`, sees all of it or the former one.

    Args:
        path: the file to write; its folder is made.
        write: writes the content to the temporary path that it is given, in the same folder, with the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read what ``score`` wrote, in the order of the loader: one row for each example and block.

    Raises:
        ValueError: If there are no scores, or a file is missing. ``pandas.read_parquet`` reads what there is.
    """
    folder = Path(path)
    files = _files(folder)
    if not files:
        raise ValueError(f"{folder} holds no scores. Run influence.score(model, loader, {str(folder)!r}).")
    there = len(files) if _made_from(files[-1])["is_last"] else len(files) + 1
    missing = [file.name for file in (file_of(folder, i) for i in range(there)) if file not in files]
    if missing:
        raise ValueError(f"{folder} lacks file {missing[0]}. Run influence.score again to go on.")
    return pd.concat(map(_read, files), ignore_index=True)
