"""Sensitivity (Shu & Zhu 2019) and stability (Zheng et al. 2016) of classifiers.

  influence run                       regenerate the artifacts of the papers (what run_all.sh calls)
  influence list                      name them
  influence check                     are the published results what their ledger says, and what the code computes?
  influence zoo                       the trained networks: recipes, accuracies, gates; `zoo train`, `zoo check`
  influence score --model M --data D  influence of every example of your own data on your own model
  influence report                    all artifacts as one static site

`influence COMMAND --help` explains each with an example.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..ledger import manifest, paths
from ..ledger.notebook import NotebookError
from ..ledger.results import COMMITTED
from . import listing, run

if TYPE_CHECKING:
    from ..own_model.material import Examples, Material

_PLAIN = argparse.RawDescriptionHelpFormatter
# Of 64 examples with 10 classes: seconds to minutes of work in a file.
_MOST_BATCHES = 8
_MOST_NAMED = 20  # classes
_WITHOUT_SIZE = ("digits", "mnist", "cifar10")

_SCORE_EXAMPLES = """\
examples:
  influence score --model companion:resnet50 --data digits --part test --images 64 --out build/scores
  influence score --model my_module:my_network --data photos/ --size 64 --wrt layers --out scores
  influence score --model weights.pt --architecture torchvision:resnet18 --data data.npz --mean .5 --std .2
  torchrun --nproc-per-node 4 -m influence.companion score --model ... --data ... --out scores

  python -c "import influence; print(influence.read_scores('build/scores').nlargest(5, 'fi'))"

Where the metric tensor has full rank (K - 1), FI is (1 - P)/P: --closed-form then takes two forward passes (one proves
that examples are independent) instead of K - 1 backward passes, after checking --check examples. A network whose last
layer sees fewer than K - 1 features never has full rank for its input: there FI is that of the features, from these
passes too, where the checked examples agree. Where neither holds, the run is refused, with the rank that was found.
Trace and lambda_max are then missing.
"""
_RUN_EXAMPLES = """\
examples:
  influence run                                             the smoke profile: minutes, no download, no GPU
  influence run --only sensitivity/fig_outlier_ranking
  influence run --profile cpu --data ~/data                 MNIST and CIFAR-10 in torchvision's layout
"""
_CHECK_EXAMPLES = """\
examples:
  influence check
  influence check --recompute 20
  influence check --recompute 100 --only sensitivity/fig_label_noise --seed 7
"""
_ZOO_EXAMPLES = """\
examples:
  influence zoo
  influence zoo train paper-resnet50-mnist-0 --data ~/data    with one thread: OMP_NUM_THREADS=1
  influence zoo check
"""
_REPORT_EXAMPLES = """\
examples:
  influence report                    the smoke profile; open build/site/smoke/index.html
  influence report --profile cpu --out /tmp/site
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns the exit status (0 well, 1 something failed, 2 bad usage, 130 interrupted)."""
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        options = _parser().parse_args(words or ["--help"])
        status: int = options.carry_out(options)
        return status
    except (run.UsageError, NotebookError, manifest.ManifestError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("\ninterrupted: what has finished is kept, the same command goes on from here", file=sys.stderr)
        return 130


def _refuse(error: Exception | str) -> int:
    """Say in one line what is wrong with a request."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _list(options: argparse.Namespace) -> int:
    if options.profile is not None:
        run.profile_of(options.profile)
    print(listing.show(options.profile, markdown=options.markdown, claims=options.claims))
    return 0


def _check(options: argparse.Namespace) -> int:
    """Is every file in results/ owned by a notebook, and as its ledger says?

    Which tables were computed by other code than today's is named as well, which is no fault. With --recompute, N
    random examples of every published table that has rows of single examples are computed anew, on the published
    networks and the data sets in INFLUENCE_DATA, and compared, each value within what rounding can do. Exit status: 1
    where a file or a value is not what it should be.
    """
    from . import audit

    chosen = options.profile or COMMITTED
    if options.profile or options.only or options.recompute:
        run.plan(chosen, options.only)  # are there such?
    problems = listing.problems()
    print("\n".join(problems) or "results: every file is owned by a notebook and as its ledger says")
    for profile in listing.profiles():
        if profile != run.SMOKE:  # is computed anew at every run
            print(audit.changed(profile))
    if options.recompute:
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        print(f"profile {chosen}: {options.recompute} examples of each table computed anew, --seed {seed}")
        for line, wrong in audit.audit(chosen, options.recompute, seed=seed, only=options.only):
            print(line, flush=True)
            problems += [line] if wrong else []
    return 1 if problems else 0


# -- score ------------------------------------------------------------------------------------------------------------


def _score(options: argparse.Namespace) -> int:
    """Compute the influence measure FI of every example and write it as Parquet files.

    The files have one row for each example and block; `example` is its number in the data, or in their part, counted
    from 0, which a sample keeps. A run that was interrupted goes on where it stopped when the same command is given
    again.

    MODEL is one of
      torchvision:resnet18            random weights; torchvision:resnet18@DEFAULT for trained ones
      my_module:my_function           a function of yours, in the current folder, that returns a torch.nn.Module
      weights.pt, weights.safetensors a checkpoint of weights; name what they belong to with --architecture
      companion:resnet50              the network that the companion trains on one of its sets
    DATA is one of
      digits, photos, mnist, cifar10  the companion's sets
      torchvision:FashionMNIST        a set of torchvision with training and test part
      FOLDER                          CLASS/*.jpg, or train/CLASS/*.jpg and test/CLASS/*.jpg; sorted by name. Which
                                      file each example is, _examples.csv beside the scores says
      FILE.npz                        arrays images and labels (and test_images, test_labels, classes)
      my_module:my_function           a function of yours that returns (inputs, labels), or a pair: train and test
    """
    import influence
    from influence.shards import atomically

    from ..own_model.material import described, own_line

    _require_used(options)
    logging.basicConfig(format="%(message)s")
    try:
        model, loader, classes, files = _prepared(options)
        # What is lost at most when a run is interrupted: minutes, whatever the number of backward passes.
        most = _MOST_BATCHES if options.closed_form else max(1, min(_MOST_BATCHES, 10 * _MOST_BATCHES // classes))
        folder = influence.score(
            model,
            loader,
            options.out,
            wrt=_wrt(options.wrt, model),
            estimator=influence.Exact() if options.released is None else influence.Released(epsilon=options.released),
            labels="predicted" if options.predicted else "given",
            closed_form=options.check if options.closed_form else None,
            batches_per_shard=options.batches_per_file or most,
            chunk_size=options.chunk_size,
            progress=sys.stderr.isatty(),
        )
        if len(files):
            atomically(folder / "_examples.csv", partial(files.to_csv, index=False))
        print(f"written to {folder}: influence.read_scores({str(folder)!r})")
        return 0
    except (ValueError, TypeError, OSError) as error:
        return _refuse(error)
    except RuntimeError as error:
        return _refuse(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    except Exception as error:
        if not own_line(error):
            raise
        return _refuse(described(error))


def _require_used(options: argparse.Namespace) -> None:
    """Refuse an option that would change nothing."""
    model, network, data = options.model, options.architecture or options.model, options.data
    bytes_as_they_are = model.startswith("companion:") and "the companion's networks take bytes as they are"
    unused = {
        "architecture": ":" in model and "it belongs to a checkpoint",
        "classes": ":" in network and not re.match("torchvision:[^@]+$", network) and "the model has its K",
        "profile": not network.startswith("companion:") and "it belongs to companion:NAME",
        **dict.fromkeys(("scale", "mean", "std"), bytes_as_they_are),
        "size": (data in _WITHOUT_SIZE or ":" in data or Path(data).is_file()) and "it belongs to a folder of images",
        "root": not re.match("(mnist|cifar10|torchvision:.*)$", data) and "it belongs to sets of torchvision",
    }
    for name, reason in unused.items():
        if reason and getattr(options, name):
            raise run.UsageError(f"--{name} would change nothing: {reason}. Leave it out.")


def _prepared(options: argparse.Namespace) -> tuple[Any, Any, int, Any]:
    """The model, a loader of the examples, K, and a table of the examples that are files; says what is to be scored."""
    import pandas as pd
    import torch
    from torch.utils.data import DataLoader

    from ..own_model import loading, material

    if options.device:
        run.check_device(options.device)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError:
        raise material.AdaptError(f"--out {options.out}: cannot be made a folder") from None
    root = Path(options.root).expanduser() if options.root else None
    found = material.load_data(options.data, size=options.size, root=root)
    everything, examples, which = _part(options, found)
    model, classes = loading.load_model(
        options.model,
        examples,
        classes=options.classes or len(found.classes),
        dataset=options.data,
        architecture=options.architecture,
        profile=options.profile or run.SMOKE,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        scale=options.scale,
        mean=options.mean or (),
        std=options.std or (),
    )
    shape = tuple(examples[0][0].shape)
    scale = model.scale if isinstance(model, loading.Prepared) else 1
    which += f" of shape {shape} times {scale:.6g}"
    print(f"{len(examples)} of {len(everything)} examples{which}, K = {classes}: {options.wrt}")
    if found.classes != tuple(map(str, range(len(found.classes)))):
        named = [f"{k} = {name}" for k, name in enumerate(found.classes)]
        print(f"classes: {', '.join(named[:_MOST_NAMED])}{', ...' * (len(named) > _MOST_NAMED)}")
    # Of a part of the examples, each keeps its number.
    loader = DataLoader(
        everything, batch_size=options.batch_size, sampler=examples.numbers, collate_fn=material.collate
    )
    numbers = examples.numbers if examples.files else []
    files = pd.DataFrame({"example": numbers, "file": [examples.files[number] for number in numbers]})
    return model, loader, classes, files


def _part(options: argparse.Namespace, found: Material) -> tuple[Examples, Examples, str]:
    """All examples of the data or of their part, those of them that are scored, and words that say which part it is."""
    from ..own_model.material import AdaptError

    part = options.part or next(iter(found.parts))
    if part in found.parts:
        everything = found.parts[part]
        return everything, everything.sample(options.images), "" if part == "all" else f" of part {part!r}"
    halves = found.train.hold_out()
    if halves is None:
        reason = "the data have no parts and too few examples to draw some: leave it out"
        raise AdaptError(f"--part {part}: {reason}")
    chosen = halves[("train", "test").index(part)].sample(options.images)
    return found.train, chosen, f", of part {part!r} after a fifth of each class was drawn at random as the test part"


def _wrt(word: str, model: Any) -> Any:
    import influence

    from ..own_model.loading import Prepared

    kind, _, size = word.partition(":")
    if kind == "patches":
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--wrt {word}: expected patches:K with K >= 1, such as patches:3")
        return influence.Patches(size=int(size))
    if word in ("input", "parameters", "layers"):
        return word
    names = [name.strip() for name in word.split(",")]
    if not isinstance(model, Prepared):
        return names
    # Names of the reader's own model, which preprocessing holds as `model`.
    own = {name for name, _ in [*model.model.named_modules(), *model.model.named_parameters()]}
    return [f"model.{name}" if name in own else name for name in names]


# -- report -----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    """Make one static site of the artifacts of a profile.

    It has a gallery with figure, table, the paper's value, ours and the verdict, and every notebook as it was executed,
    needs no network to read, and goes to build/site/PROFILE/.
    """
    from . import report

    try:
        index = report.build(options.profile, Path(options.out).expanduser() if options.out else None)
    except (report.ReportError, OSError, ValueError) as error:
        return _refuse(error)
    shown = index.relative_to(paths.ROOT) if index.is_relative_to(paths.ROOT) else index
    print(f"{shown}: open it in a browser, no network needed")
    return 0


# -- zoo --------------------------------------------------------------------------------------------------------------


def _zoo(options: argparse.Namespace) -> int:
    """The trained networks that the artifacts rest on, in results/zoo: weights, histories and a ledger.

    `list` shows recipe, data, epochs, hours, accuracies and gate of each; `train` trains some by name, going on where a
    former call was interrupted; `check` measures the published ones anew and ends with 1 where a gate or a stored
    accuracy is missed.
    """
    from ..images import data
    from ..zoo import published, recipes, training

    try:
        if options.device:
            run.check_device(options.device)
        folder = Path(options.data).expanduser() if options.data else None
        where: dict[str, Any] = {"device": options.device or "cpu", "data_dir": folder}
        if options.action == "list":
            print(published.listing())
        elif options.action == "train":
            if not options.names:
                raise recipes.RecipeError("name the networks to train; `influence zoo` lists them all")
            for name in [recipes.named(name).name for name in options.names]:
                print(published.train(name, **where), flush=True)
        else:
            problems = False
            for line in published.check(options.names, **where):
                problems = True
                print(line, flush=True)
            if problems:
                return 1
            print("zoo: every published network meets its gate and the accuracy that its ledger has")
        return 0
    except (recipes.RecipeError, data.DataError, training.TrainingError, OSError) as error:
        return _refuse(error)


# -- the command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise run.UsageError(f"{message} (--help shows the options)")


def _parser() -> _Parser:
    parser = _Parser(prog="influence", description=__doc__, formatter_class=_PLAIN)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, carry_out: Callable[..., int], said: str, examples: str | None = None) -> Callable[..., Any]:
        made = commands.add_parser(
            name, help=said, description=getdoc(carry_out), epilog=examples, formatter_class=_PLAIN
        )
        made.set_defaults(carry_out=carry_out)
        return made.add_argument

    add = command("run", run.run, "regenerate what has changed", _RUN_EXAMPLES)
    add("--profile", default=run.SMOKE, help="smoke, cpu or paper (default: smoke)")
    add("--only", nargs="+", default=[], metavar="STEM", help="these notebooks alone")
    add("--recompute", action="store_true", help="compute what other profiles than smoke only draw (needs the data)")
    add("--retrain", action="store_true", help="the same on networks that are trained here for it")
    add("--force", action="store_true", help="run what is unchanged as well")
    add("--data", metavar="DIR", help="folder of the data sets (default: INFLUENCE_DATA)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--time-limit", type=_seconds, metavar="SECONDS", help="for each notebook")
    add("--refresh-notebooks", action="store_true", help="for maintainers: keep the outputs in notebooks/")
    add = command("list", _list, "name every notebook")
    add("--profile", help="with what each came to in this profile")
    add("--markdown", action="store_true", help="as the README's table")
    add("--claims", action="store_true", help="what each claim came to in the committed results")
    add = command("check", _check, "are the published results what their ledger says?", _CHECK_EXAMPLES)
    add("--recompute", type=_positive, metavar="N", help="compute N random examples of each published table anew")
    add("--profile", help=f"whose tables (default: {COMMITTED})")
    add("--only", nargs="+", default=[], metavar="STEM", help="tables of these notebooks alone")
    add("--seed", type=_count, metavar="S", help="of the choice of examples (default: another each time)")
    add = command("score", _score, "influence of your data on your model", _SCORE_EXAMPLES)
    add("--model", required=True, help="see above")
    add("--data", required=True, help="see above")
    add("--out", default="scores", metavar="DIR", help="folder for the files (default: scores)")
    add("--architecture", metavar="MODEL", help="what a checkpoint's weights belong to")
    perturbed = "what is perturbed: input (default), parameters, layers, patches:K, or NAME,NAME..."
    add("--wrt", default="input", help=perturbed)
    parts = "train (default where the data have parts) or test; of data without parts, a fifth drawn as test"
    add("--part", choices=("train", "test"), help=parts)
    add("--images", type=_count, default=0, metavar="N", help="a random sample of N; 0 for all (default)")
    add("--predicted", action="store_true", help="f = -log P of the predicted class, not of the label")
    add("--released", type=float, metavar="E", help="the authors' released estimator with constant E")
    add("--closed-form", action="store_true", help="forward passes alone where they are enough (see below)")
    add("--check", type=_positive, default=4, metavar="N", help="examples whose rank is checked (default: 4)")
    add("--classes", type=_count, default=0, metavar="K", help="outputs of a torchvision network")
    add("--size", type=_count, default=0, metavar="PIXELS", help="height and width of a folder's images")
    add("--scale", type=float, default=0, help="factor for the data (default: 1/255 for bytes, else 1)")
    add("--mean", type=float, nargs="+", metavar="M", help="mean of each channel after scaling")
    add("--std", type=float, nargs="+", metavar="S", help="standard deviation of each channel")
    add("--batch-size", type=_positive, default=64, metavar="N", help="examples in a batch (default: 64)")
    add("--batches-per-file", type=_positive, metavar="N", help="default: 8, fewer for more than 10 classes")
    add("--chunk-size", type=_positive, metavar="N", help="examples computed at once (default: chosen)")
    add("--root", metavar="DIR", help="folder of torchvision's sets (default: INFLUENCE_DATA)")
    add("--profile", help="of companion:NAME (default: smoke)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add = command("zoo", _zoo, "the trained networks", _ZOO_EXAMPLES)
    add("action", nargs="?", choices=("list", "train", "check"), default="list", help="default: list")
    add("names", nargs="*", metavar="NAME", help="of networks; for check: none for all")
    add("--data", metavar="DIR", help="folder of the data sets (default: INFLUENCE_DATA)")
    add("--device", help="cpu, cuda or cuda:N (default: cpu)")
    add = command("report", _report, "all artifacts as one static site", _REPORT_EXAMPLES)
    add("--profile", default=run.SMOKE, help="smoke, cpu or paper (default: smoke)")
    add("--out", metavar="DIR", help="folder of the site (default: build/site/PROFILE)")
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def _count(text: str, *, least: int = 0) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")


def _positive(text: str) -> int:
    return _count(text, least=1)
