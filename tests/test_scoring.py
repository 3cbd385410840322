"""Scores of a data set: the same table however the work was cut, shared or interrupted."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import influence
from influence import scoring

WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_scoring import data, network
import influence, influence.shards as shards

write, folder = shards.atomically, Path(sys.argv[1])

def killed(path, writer):
    write(path, writer)
    if path.suffix == ".parquet":
        while not any(folder.glob(".tmp-*-part-000002.parquet")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

def stopped(path, writer):
    def half(part):
        part.write_bytes(b"PAR1")
        time.sleep(300)  # until the test stops this process, as the other one died
    write(path, half if path.name == "part-000002.parquet" else writer)

if "DYING" in os.environ:
    shards.atomically = killed if os.environ["RANK"] == "1" else stopped
influence.score(network(), data(), folder, wrt="layers", batches_per_shard=2, progress=False)
"""


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def data(count: int = 29, batch_size: int = 3, *, seed: int = 1, wrong: int | None = None) -> DataLoader:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(seed))[:count]
    labels = torch.arange(count) % 4
    if wrong is not None:
        labels[wrong] = (labels[wrong] + 1) % 4
    return DataLoader(TensorDataset(x, labels), batch_size=batch_size)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_table_is_that_of_the_measures(tmp_path: Path) -> None:
    table = influence.read_scores(influence.score(network(), data(), tmp_path, wrt="layers", progress=False))
    x, labels = data().dataset.tensors
    metric = influence.metric_tensor(network(), x, wrt="layers")
    expected = influence.first_order_influence(metric, labels).to_dataframe()
    expected["trace"], expected["lambda_max"] = metric.trace().flatten(), metric.lambda_max().flatten()
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path), table)


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_any_iterable_of_batches(tmp_path: Path, labels: str) -> None:
    options = {"wrt": "layers", "batches_per_shard": 3, "progress": False, "labels": labels}
    first = influence.score(network(), data(), tmp_path / "loader", **options)
    second = influence.score(network(), list(data()), tmp_path / "list", **options)
    files = [{k: v for k, v in contents(folder).items() if k != "_run.json"} for folder in (first, second)]
    assert len(files[0]) == 4
    assert files[0] == files[1]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = {"wrt": "input", "batches_per_shard": 2, "progress": False}
    whole = contents(influence.score(network(), data(), tmp_path / "whole", **options))
    folder = influence.score(network(), data(), tmp_path / "part", **options)
    (folder / "part-000001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks file part-000001"):
        influence.read_scores(folder)
    kept = (folder / "part-000003.parquet").stat().st_mtime_ns
    influence.score(network(), data(), folder, **options)
    assert contents(folder) == whole
    assert (folder / "part-000003.parquet").stat().st_mtime_ns == kept


def test_another_run_is_refused(tmp_path: Path) -> None:
    influence.score(network(), data(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="another run, with other wrt"):
        influence.score(network(), data(), tmp_path, wrt="layers", progress=False)
    other = network()
    nn.init.zeros_(other[0].bias)
    with pytest.raises(ValueError, match="with other model"):
        influence.score(other, data(), tmp_path, progress=False)
    # The same numbers, but other layers.
    with pytest.raises(ValueError, match="with other model"):
        influence.score(nn.Sequential(network()[0], nn.Sigmoid(), network()[2]), data(), tmp_path, progress=False)


class Tempered(nn.Module):
    """A setting that neither prints nor is a tensor; `squeeze` drops the dimension of a single example."""

    def __init__(self, temperature: float = 1.0, *, squeeze: bool = False) -> None:
        super().__init__()
        self.network, self.temperature, self.squeeze = network(), temperature, squeeze

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x) / self.temperature
        return logits.squeeze() if self.squeeze else logits


@pytest.mark.parametrize("as_loader", [True, False], ids=["loader", "list"])
@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_a_setting_that_does_not_print_is_seen(tmp_path: Path, labels: str, as_loader: bool) -> None:
    loader = data() if as_loader else list(data())
    options = {"batches_per_shard": 2, "progress": False, "labels": labels}
    before = contents(influence.score(Tempered(), loader, tmp_path, **options))
    (tmp_path / "part-000003.parquet").unlink()
    with pytest.raises(ValueError, match="the model computes something else now than when"):
        influence.score(Tempered(1.1), loader, tmp_path, **options)
    assert contents(influence.score(Tempered(), loader, tmp_path, **options)) == before


@pytest.mark.parametrize("closed_form", [None, 2])
def test_a_model_that_squeezes_a_single_example(tmp_path: Path, closed_form: int | None) -> None:
    options = {"closed_form": closed_form, "progress": False}
    found = [
        influence.read_scores(influence.score(model, data(7, 3), tmp_path / str(number), **options))
        for number, model in enumerate((Tempered(squeeze=True), Tempered()))
    ]
    pd.testing.assert_frame_equal(*found)


class OfWords(nn.Module):
    """A classifier of padded tokens that is called as those of transformers are."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, features), nn.Linear(features, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        words = self.body(self.table(input_ids)) * attention_mask[..., None]
        return self.head(torch.tanh(words.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)))


def words(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 11, (20, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) <= torch.arange(20)[:, None] % 7).float()
    return {"input_ids": (ids * mask.long())[rows], "attention_mask": mask[rows], "labels": torch.arange(20)[rows] % 4}


@pytest.mark.parametrize("closed_form", [None, 3])
def test_batches_of_several_tensors(tmp_path: Path, closed_form: int | None) -> None:
    model, options = OfWords(5).eval(), {"wrt": "layers", "batches_per_shard": 1, "progress": False}
    everything = words()
    labels = everything.pop("labels")
    metric = influence.metric_tensor(model, everything, wrt="layers")
    expected = influence.first_order_influence(metric, labels).to_dataframe()

    # As a collator does, which pads to the longest of a batch.
    def collated() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, 20, 6):
            batch = words(slice(start, start + 6))
            longest = int(batch["attention_mask"].sum(dim=1).max())
            yield {name: value[:, :longest] if value.ndim > 1 else value for name, value in batch.items()}

    loaders = {
        "mapping": list(collated()),
        "pair": [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in collated()],
        "tuple": [((b["input_ids"], b["attention_mask"]), b["labels"]) for b in collated()],
        "singular": [{"label" if k == "labels" else k: v for k, v in b.items()} for b in collated()],
    }
    for name, loader in loaders.items():
        path = influence.score(model, loader, tmp_path / name, closed_form=closed_form, **options)
        found = influence.read_scores(path)
        pd.testing.assert_frame_equal(found[list(expected)], expected, check_exact=False, rtol=1e-4)
        if closed_form is None:
            assert np.allclose(found["trace"], metric.trace().flatten(), rtol=1e-4)
    kept = tmp_path / "mapping" / "part-000002.parquet"
    kept.unlink()
    influence.score(model, loaders["mapping"], tmp_path / "mapping", closed_form=closed_form, **options)
    assert kept.exists()
    loaders["mapping"][0]["attention_mask"][3, 0] = 0.5
    with pytest.raises(ValueError, match="holds scores of other data"):
        influence.score(model, loaders["mapping"], tmp_path / "mapping", closed_form=closed_form, **options)


def test_one_of_several_tensors_is_perturbed(tmp_path: Path) -> None:
    model, batch = OfWords(5).eval(), words()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    estimator = influence.Released(0.01)
    path = influence.score(model, [batch], tmp_path, wrt="input", estimator=estimator, progress=False)
    metric = influence.metric_tensor(model.double(), {**given, "attention_mask": given["attention_mask"].double()})
    expected = influence.first_order_influence(metric, batch["labels"], estimator=estimator)
    assert np.allclose(influence.read_scores(path)["fi"], expected.fi[:, 0], rtol=1e-3)


class OfItsBatch(nn.Module):
    """Features that look at the largest of the batch."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, features), nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(self.body(x))
        return self.head((features + features.amax(dim=0, keepdim=True)) / 2)


@pytest.mark.parametrize(("features", "classes"), [(5, 3), (3, 10)])
def test_no_closed_form_of_examples_that_depend_on_each_other(tmp_path: Path, features: int, classes: int) -> None:
    model = OfItsBatch(features, classes).eval()
    for rows in (7, 20):
        batch = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))]
        with pytest.raises(RuntimeError, match="depend on the other examples"):
            influence.score(model, batch, tmp_path, closed_form=1, labels="predicted", progress=False)


def test_a_run_that_left_no_scores_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown module"):
        influence.score(network(), data(), tmp_path, wrt=["nothing"], progress=False)

    def another_begins() -> Iterator[list[torch.Tensor]]:
        yield list(data().dataset.tensors)
        influence.shards.claim(tmp_path, {"wrt": "'layers'"})

    with pytest.raises(ValueError, match="another run, with other"):
        influence.score(network(), another_begins(), tmp_path, progress=False)
    assert len(influence.read_scores(influence.score(network(), data(), tmp_path, progress=False))) == 29


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("_run.json", None, "holds scores, but no _run.json"),
        ("_run.json", b"{", "_run.json is damaged .*delete the folder"),
        ("part-000001.parquet", b"PAR1", r"part-000001.parquet is damaged .*Delete it and run influence.score again"),
    ],
)
def test_damaged_files_say_what_to_do(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    influence.score(network(), data(), tmp_path, batches_per_shard=2, progress=False)
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        influence.score(network(), data(), tmp_path, batches_per_shard=2, progress=False)
    if "part" in name:
        with pytest.raises(ValueError, match=reason):
            influence.read_scores(tmp_path)


def test_nan_is_named_by_its_number_in_the_data(tmp_path: Path) -> None:
    loader = data()
    loader.dataset.tensors[0][17, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in example 17"):
        influence.score(network(), loader, tmp_path, progress=False)


@pytest.mark.parametrize("loader", [[], DataLoader(torch.zeros(0, 6))], ids=["list", "loader"])
def test_no_examples_are_refused(tmp_path: Path, loader: object) -> None:
    with pytest.raises(ValueError, match="loader must yield some examples"):
        influence.score(network(), loader, tmp_path, labels="predicted", progress=False)


OTHER = {
    "other examples": {"seed": 2},
    "another label": {"wrong": 13},
    "more": {"count": 31},
    "more, from the end of a file on": {"count": 36},
    "fewer": {"count": 26},
    "fewer, up to the end of a file": {"count": 24},
}


@pytest.mark.parametrize("as_loader", [True, False], ids=["loader", "list"])
@pytest.mark.parametrize("change", list(OTHER))
def test_other_data_are_refused(tmp_path: Path, change: str, as_loader: bool) -> None:
    """Files of 6 examples; each kind of iterable is told from the other's data as well."""
    options = {"batches_per_shard": 2, "progress": False}
    count = 30 if change == "more, from the end of a file on" else 29

    def hidden(loader: DataLoader) -> DataLoader | list:
        """The loader with nothing to see at its data set, or a list."""
        whole = torch.utils.data.Subset(loader.dataset, range(len(loader.dataset)))
        return DataLoader(whole, batch_size=3) if as_loader else list(loader)

    before = contents(influence.score(network(), hidden(data(count)), tmp_path, **options))
    other = hidden(data(**{"count": count, **OTHER[change]}))
    with pytest.raises(ValueError, match=r"holds scores of other data: part-00000\d.parquet was made from examples"):
        influence.score(network(), other, tmp_path, **options)
    assert contents(tmp_path) == before
    influence.score(network(), hidden(data(count)), tmp_path, **options)
    assert contents(tmp_path) == before


def test_a_label_that_was_put_right_is_seen_among_many(tmp_path: Path) -> None:
    influence.score(network(), data(100, 1), tmp_path, progress=False, closed_form=1)
    with pytest.raises(ValueError, match="another run, with other data"):
        influence.score(network(), data(100, 1, wrong=50), tmp_path, progress=False, closed_form=1)


def test_of_many_batches_a_sample_is_compared(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        read = 0

        def __len__(self) -> int:
            return 300

        def __getitem__(self, n: int) -> tuple[torch.Tensor, int]:
            Rows.read += 1
            return torch.full((6,), n / 300), n % 4

    loader = DataLoader(Rows(), batch_size=2)
    influence.score(network(), loader, tmp_path, progress=False, closed_form=1)
    assert Rows.read == 300
    influence.score(network(), loader, tmp_path, progress=False, closed_form=1)
    assert Rows.read == 300 + 2 * 32


def test_labels_are_required_or_called_predicted(tmp_path: Path) -> None:
    x = data().dataset.tensors[0]
    with pytest.raises(ValueError, match=r"x alone.*labels='predicted'"):
        influence.score(network(), [x], tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="labels must be 'given' or 'predicted', got True"):
        influence.score(network(), [x], tmp_path / "b", labels=True, progress=False)  # type: ignore[arg-type]
    table = influence.read_scores(influence.score(network(), [x], tmp_path / "c", labels="predicted", progress=False))
    assert table["label"].tolist() == network()(x).argmax(dim=1).tolist()


@pytest.mark.parametrize("second", [torch.ones(29, 6), torch.ones(29, 6, dtype=torch.long), torch.ones(29)])
def test_a_second_input_is_not_taken_for_labels_that_nobody_wants(tmp_path: Path, second: torch.Tensor) -> None:
    x = data().dataset.tensors[0]
    given = DataLoader(TensorDataset(x, second), batch_size=8)
    with pytest.raises(ValueError, match=r"in the place of the labels.*\(\(x, mask\),\)"):
        influence.score(network(), given, tmp_path, labels="predicted", progress=False)


def test_an_unfinished_run_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    folder = influence.score(network(), data(), tmp_path, batches_per_shard=2, progress=False)
    assert len(influence.read_scores(folder)) == 29
    (folder / "part-000004.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks file part-000004"):
        influence.read_scores(folder)


def test_errors(tmp_path: Path) -> None:
    shuffled = DataLoader(torch.zeros(4, 6), shuffle=True)
    with pytest.raises(ValueError, match="shuffle"):
        influence.score(network(), shuffled, tmp_path)
    with pytest.raises(ValueError, match="batches_per_shard"):
        influence.score(network(), data(), tmp_path, batches_per_shard=0)
    with pytest.raises(ValueError, match=r"loader must yield .* got int"):
        influence.score(network(), [1], tmp_path, progress=False)
    with pytest.raises(TypeError, match=r"x must hold tensors .*, got int as 'x'"):
        influence.score(network(), [{"x": 1}], tmp_path, progress=False)
    with pytest.raises(ValueError, match="'labels' in a mapping, got x alone"):
        influence.score(network(), [{"input": torch.zeros(2, 6)}], tmp_path, progress=False)
    with pytest.raises(ValueError, match="no scores"):
        influence.read_scores(tmp_path / "nowhere")


def test_released_near_its_cut_is_computed_in_double_precision(tmp_path: Path) -> None:
    model, x = network(), data().dataset.tensors[0]
    estimator = influence.Released(1e-3)
    exact = influence.metric_tensor(network().double(), x.double())
    result = influence.first_order_influence(influence.metric_tensor(model, x), estimator=estimator)
    marked = torch.zeros_like(result.near_cut)
    marked[[2, 7]] = True
    spoiled = influence.Influence(
        result.fi + 1, result.ceiling, result.alignment, result.rank, marked, result.labels, result.blocks
    )
    better = influence.refine(spoiled, model, x, estimator=estimator)
    truth = influence.first_order_influence(exact, result.labels, estimator=estimator)
    torch.testing.assert_close(better.fi[[2, 7]], truth.fi[[2, 7]], rtol=1e-12, atol=0)
    assert torch.equal(better.fi[3:7], spoiled.fi[3:7])
    assert not better.near_cut[[2, 7]].any()
    assert next(model.parameters()).dtype == torch.float32


def test_two_processes_one_of_them_killed(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    root = str(Path(influence.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [str(script), str(tmp_path / "two")]
    whole = contents(
        influence.score(network(), data(), tmp_path / "one", wrt="layers", batches_per_shard=2, progress=False)
    )
    assert len(whole) == 6
    stopped, killed = (
        subprocess.Popen([sys.executable, *command], env={**environment, "DYING": "1", "RANK": rank, "WORLD_SIZE": "2"})
        for rank in "01"
    )
    assert killed.wait(timeout=300) == -signal.SIGKILL and stopped.poll() is None
    stopped.terminate()
    stopped.wait(timeout=300)
    part = [name.rpartition(".parquet")[0] for name in contents(tmp_path / "two") if "part" in name]
    assert part[0].startswith(".tmp-") and part[0].endswith("-part-000002")
    assert part[1:] == ["part-000000", "part-000001"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*launch, *command], env=environment, capture_output=True, timeout=300, check=True)
    assert contents(tmp_path / "two") == whole


STREAM = """
import sys
from pathlib import Path
from statistics import median
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import influence

torch.set_num_threads(1)

class Images(Dataset):
    resident = {}

    def __len__(self):
        return 2048

    def __getitem__(self, n):
        if n % 128 == 127:
            self.resident[n] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return torch.rand(3, 64, 64), n % 5

images = Images()
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
loader = DataLoader(images, batch_size=32)
influence.score(model, loader, sys.argv[1], batches_per_shard=4, progress=False)
usual = [median(size for n, size in images.resident.items() if (n < 1024) == first) for first in (True, False)]
print(int(usual[1] - usual[0]))
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """The second 1,024 images of 49 kB each, 50 MB, need no more than the first.

    The allocator gives every block above 64 kB back as it is freed. By itself it keeps 24 MB more in one run of three.
    """
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STREAM, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **returned}, capture_output=True, text=True, check=True)
    assert len(influence.read_scores(tmp_path)) == 2048
    assert int(done.stdout) < 5e6


def test_a_data_set_without_indices(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from data().dataset

    whole = influence.read_scores(influence.score(network(), data(), tmp_path / "a", progress=False))
    loader = DataLoader(Stream(), batch_size=3)
    for _ in range(2):
        influence.score(network(), loader, tmp_path / "b", progress=False)
        pd.testing.assert_frame_equal(influence.read_scores(tmp_path / "b"), whole)


def test_examples_that_a_loader_drops_are_refused(tmp_path: Path) -> None:
    dropping = DataLoader(data().dataset, batch_size=3, collate_fn=lambda rows: torch.stack([x for x, _ in rows[1:]]))
    with pytest.raises(ValueError, match=r"loader must keep the examples of a batch, got 2 of 3"):
        influence.score(network(), dropping, tmp_path, labels="predicted", progress=False)


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        (lambda d: {"sampler": SubsetRandomSampler(range(20)), "batch_size": 2}, "same order"),
        (lambda d: {"sampler": WeightedRandomSampler([1.0] * 20, 20), "batch_size": 2}, "same order"),
        (lambda d: {"batch_sampler": BatchSampler(RandomSampler(d), 2, drop_last=False)}, "same order"),
        (lambda d: {"sampler": RandomSampler(d, num_samples=1), "batch_size": 1}, "same order"),
        (lambda d: {"sampler": DistributedSampler(d, num_replicas=2, rank=0), "batch_size": 2}, "share the batches"),
        (
            lambda d: {
                "batch_sampler": BatchSampler(DistributedSampler(d, num_replicas=2, rank=0), 2, drop_last=False)
            },
            "share the batches",
        ),
    ],
    ids=["subset", "weighted", "batches", "one", "distributed", "distributed batches"],
)
def test_samplers_that_lose_or_repeat_examples_are_refused(tmp_path: Path, sampled: Any, words: str) -> None:
    """Two processes that share the batches of such a loader would score some examples twice and others never."""
    dataset = TensorDataset(torch.randn(20, 6), torch.arange(20) % 4)
    with pytest.raises(ValueError, match=words):
        influence.score(network(), DataLoader(dataset, **sampled(dataset)), tmp_path, progress=False)


class InSinglePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.float())


def test_a_model_of_one_precision_keeps_what_lies_near_a_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring._warn_of_precision.cache_clear()
    plain = scoring.first_order_influence

    def near(*args: Any, **options: Any) -> influence.Influence:
        found = plain(*args, **options)
        return replace(found, near_cut=torch.ones_like(found.near_cut))

    monkeypatch.setattr(scoring, "first_order_influence", near)
    with caplog.at_level(logging.WARNING, logger="influence"):
        for name, model in (("a", network()), ("b", InSinglePrecision().eval())):
            influence.score(model, data(), tmp_path / name, estimator=influence.Released(), progress=False)
    ours, refined = (influence.read_scores(tmp_path / name) for name in ("b", "a"))
    assert ours["near_cut"].all() and np.allclose(ours["fi"], refined["fi"], rtol=1e-3, atol=0)
    assert "InSinglePrecision cannot be computed in float64" in caplog.text and "Sequential" not in caplog.text
