"""Classes that trained networks predict for all 10,000 test images, in a file: `python tests/predicted_classes.py`.

To ask nine networks about all test images takes minutes. This script does so once. It writes the file only where every
network has the accuracy that is stated for it; tests then ask a network about 500 images, and count the others in the
file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from influence.companion.images import data
from influence.companion.images.data import Split
from influence.companion.ledger import paths
from influence.companion.zoo import pretrained, published, recipes, training

FILE = Path(__file__).with_suffix(".parquet")
# One of each architecture; `influence zoo check` measures all that are published, which takes a quarter of an hour.
_BY_ARCHITECTURE = {recipe.architecture: recipe for recipe in reversed([*recipes.everything()]) if recipe.published}
PUBLISHED = tuple(recipe.name for recipe in _BY_ARCHITECTURE.values())

# Two largest logits nearer than this are a tie. Rounding moves a logit by 1e-5; a few images of 10,000 are tied.
_TIE = 0.01
_EVENLY = 40  # every 40th image is asked about,
_CLOSEST = 250  # and those whose class changes first where a network changes


def asked(logits: Tensor) -> Tensor:
    """Mask (N,) of the images that tests ask about."""
    largest = logits.topk(2).values
    margin = largest[:, 0] - largest[:, 1]
    sure = margin > _TIE
    limit = margin[sure].sort().values[_CLOSEST]
    return sure & ((torch.arange(len(logits)) % _EVENLY == 0) | (margin < limit))


def accuracy(name: str, model: nn.Module, part: Split) -> float:
    """Accuracy of the classes in the file, which `model` must predict as well for every image it is asked about."""
    columns = pd.read_parquet(FILE, columns=[name, f"{name}, asked"])
    classes, chosen = (torch.from_numpy(columns[column].to_numpy(copy=True)) for column in columns)
    assert len(classes) == len(part) == 10_000 and chosen.sum() > 450
    answers = training.predict(model, part.images[chosen]).argmax(1)
    others = int((answers != classes[chosen]).sum())
    assert not others, f"{name}: {others} of {len(answers)} images have another class than in {FILE.name}"
    return float((classes == part.labels).double().mean())


def _network(name: str, folder: Path | None) -> tuple[nn.Module, Split, float, float]:
    """A network, its test images, the accuracy stated for it and how far a measured one may be from that."""
    if name in pretrained.SOURCES:
        source = pretrained.SOURCES[name]
        return pretrained.load(name, folder)[0], data.load(source.data, folder).test, source.test_accuracy, 0.0005
    recipe = recipes.named(name)
    dataset = recipe.dataset(folder)
    trained = published.load(training.identity(recipe, dataset), recipe.build(dataset))
    assert trained is not None, f"{name}: the published network is of another recipe or of other data"
    return trained.model, dataset.test, published.ledger()[name]["accuracy"]["test"], 0.001


def main() -> None:
    columns = {}
    for name in (*pretrained.NAMES, *PUBLISHED):
        model, test, stated, tolerance = _network(name, paths.data_dir())
        logits = training.predict(model, test.images)
        classes = logits.argmax(1)
        found = float((classes == test.labels).double().mean())
        if abs(found - stated) > tolerance:
            sys.exit(f"{name}: test accuracy {100 * found:.2f}%, stated is {100 * stated:.2f}%: nothing is written")
        columns[name], columns[f"{name}, asked"] = classes.byte().numpy(), asked(logits).numpy()
        print(f"{name}: {100 * found:.2f}%")
    pd.DataFrame(columns).to_parquet(FILE, index=False, compression="zstd")


if __name__ == "__main__":
    main()
