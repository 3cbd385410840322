"""`influence`: run the notebooks, score a model and data of one's own, make the report.

Everything that can be wrong with a request is said in one line, with exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ledger import manifest, paths
from ..ledger.notebook import NotebookError
from . import run

if TYPE_CHECKING:
    from ..own_model.material import Examples, Material

# Of 64 examples with 10 classes: seconds to minutes of work in a file.
_MOST_BATCHES = 8

_ABOUT = """\
Sensitivity (Shu & Zhu 2019) and stability (Zheng et al. 2016) of classifiers.

  influence run                       regenerate the artifacts of the papers (what run_all.sh calls)
  influence list                      name them
  influence check                     is every results file owned by a notebook?
  influence zoo                       the trained networks: recipes, accuracies, gates; `zoo train`, `zoo check`
  influence score --model M --data D  influence of every example of your own data on your own model
  influence report                    all artifacts as one static site

`influence COMMAND --help` explains each with an example.
"""
_SCORE = """\
Compute the influence measure FI of every example and write it as Parquet files, one row for each example and block;
`example` is its number in the data, or in their part, counted from 0, which a sample keeps. A run that was interrupted
goes on where it stopped when the same command is given again.

MODEL is one of
  torchvision:resnet18            random weights; torchvision:resnet18@DEFAULT for trained ones
  my_module:my_function           a function of yours, in the current folder, that returns a torch.nn.Module
  weights.pt, weights.safetensors a checkpoint of weights; name what they belong to with --architecture
  companion:resnet50              the network that the companion trains on one of its sets
DATA is one of
  digits, photos, mnist, cifar10  the companion's sets
  torchvision:FashionMNIST        a set of torchvision with training and test part
  FOLDER                          CLASS/*.jpg, or train/CLASS/*.jpg and test/CLASS/*.jpg; sorted by name
  FILE.npz                        arrays images and labels (and test_images, test_labels, classes)
  my_module:my_function           a function of yours that returns (inputs, labels), or a pair of these: train and test
"""
_SCORE_EXAMPLES = """\
examples:
  influence score --model companion:resnet50 --data digits --part test --images 64 --out build/scores
  influence score --model my_module:my_network --data photos/ --size 64 --wrt layers --out scores
  influence score --model weights.pt --architecture torchvision:resnet18 --data data.npz --mean .5 --std .2
  torchrun --nproc-per-node 4 -m influence.companion score --model ... --data ... --out scores

  python -c "import influence; print(influence.read_scores('build/scores').nlargest(5, 'fi'))"

Where the metric tensor has full rank (K - 1), FI is (1 - P)/P: --closed-form then takes one forward pass instead of
K - 1 backward passes, after checking --check examples. A network whose last layer sees fewer than K - 1 features never
has full rank for its input: there FI is that of the features, from one forward pass too, where the checked examples
agree. Where neither holds, the run is refused, with the rank that was found. Trace and lambda_max are then missing.
"""
_RUN_EXAMPLES = """\
examples:
  influence run                                             the smoke profile: minutes, no download, no GPU
  influence run --only sensitivity/fig_outlier_ranking
  influence run --profile cpu --data ~/data                 MNIST and CIFAR-10 in torchvision's layout
"""
_ZOO = """\
The trained networks that the artifacts rest on, in results/zoo: weights, histories and a ledger. `list` shows recipe,
data, epochs, hours, accuracies and gate of each; `train` trains some by name, going on where a former call was
interrupted; `check` measures the published ones anew and ends with 1 where a gate or a stored accuracy is missed.
"""
_ZOO_EXAMPLES = """\
examples:
  influence zoo
  influence zoo train paper-resnet50-mnist-0 --data ~/data    with one thread: OMP_NUM_THREADS=1
  influence zoo check
"""
_REPORT = """\
Make one static site of the artifacts of a profile: a gallery with figure, table, the paper's value, ours and the
verdict, and every notebook as it was executed. It needs no network to read and goes to build/site/PROFILE/.
"""
_REPORT_EXAMPLES = """\
examples:
  influence report                    the smoke profile; open build/site/smoke/index.html
  influence report --profile cpu --out /tmp/site
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns the exit status (0 well, 1 something failed, 2 bad usage, 130 interrupted)."""
    try:
        # Only this one is told from `run`'s own commands.
        words = list(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(words or ["--help"])
        if options.command in ("run", "list", "check"):
            return run.main(words, parser=_parser())
        return {"score": _score, "report": _report, "zoo": _zoo}[options.command](options)
    except (run.UsageError, NotebookError, manifest.ManifestError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("\ninterrupted: what has finished is kept, the same command goes on from here", file=sys.stderr)
        return 130


def _refuse(error: Exception | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


# -- score ------------------------------------------------------------------------------------------------------------


def _score(options: argparse.Namespace) -> int:
    import influence

    from ..own_model import loading

    logging.basicConfig(format="%(message)s")
    try:
        if options.device:
            run.check_device(options.device)
        model, loader, found = _prepared(options)
        print(f"{found['which']} of shape {found['shape']}, K = {found['classes']}: {options.wrt}")
        folder = influence.score(
            model,
            loader,
            options.out,
            wrt=_wrt(options.wrt),
            estimator=_estimator(options),
            labels="predicted" if options.predicted else "given",
            closed_form=options.check if options.closed_form else None,
            batches_per_shard=_batches_per_file(options, found["classes"]),
            chunk_size=options.chunk_size,
            progress=sys.stderr.isatty(),
        )
        print(f"written to {folder}: influence.read_scores({str(folder)!r})")
        return 0
    except (ValueError, TypeError, loading.AdaptError, OSError) as error:
        return _refuse(error)
    except RuntimeError as error:
        return _refuse(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _prepared(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from torch.utils.data import DataLoader

    from ..images import data
    from ..own_model import loading

    if not _writable(options.out):
        raise loading.AdaptError(f"--out {options.out}: cannot be made a folder")
    root = Path(options.root).expanduser() if options.root else None
    found = loading.load_data(options.data, size=options.size, root=root)
    everything, examples, which = _part(options, found)
    model = loading.load_model(
        options.model,
        classes=options.classes or len(found.classes),
        architecture=options.architecture,
        profile=options.profile,
        dataset=options.data if options.data in data.NAMES else "digits",
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    own = options.model.startswith("companion:")
    model = loading.prepare(
        model, examples, scale=1.0 if own else options.scale, mean=options.mean or (), std=options.std or ()
    )
    classes = loading.check(model, examples)
    # Of a part of the examples, each keeps its number.
    loader = DataLoader(everything, batch_size=options.batch_size, sampler=examples.numbers, collate_fn=_collate)
    which = f"{len(examples)} of {len(everything)} examples{which}"
    return model, loader, {"which": which, "shape": tuple(examples[0][0].shape), "classes": classes}


def _part(options: argparse.Namespace, found: Material) -> tuple[Examples, Examples, str]:
    """All examples of the data or of their part, those of them that are scored, and words that say which part it is."""
    from ..own_model import loading

    part = options.part or next(iter(found.parts))
    if part in found.parts:
        everything = found.parts[part]
        return everything, everything.sample(options.images), "" if part == "all" else f" of part {part!r}"
    halves = found.train.hold_out()
    if halves is None:
        raise loading.AdaptError(
            f"--part {part}: the data have no parts and too few examples to draw some: leave it out"
        )
    chosen = halves[("train", "test").index(part)].sample(options.images)
    return found.train, chosen, f", of part {part!r} after a fifth of each class was drawn at random as the test part"


def _batches_per_file(options: argparse.Namespace, classes: int) -> int:
    """What is lost at most when a run is interrupted: minutes, whatever the number of backward passes."""
    given: int | None = options.batches_per_file
    if given:
        return given
    return _MOST_BATCHES if options.closed_form else max(1, min(_MOST_BATCHES, 10 * _MOST_BATCHES // classes))


def _collate(rows: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    from torch.utils.data import default_collate

    from ..own_model.material import as_input

    inputs, labels = default_collate(rows)
    return as_input(inputs), labels


def _writable(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _wrt(word: str) -> Any:
    import influence

    kind, _, size = word.partition(":")
    if kind == "patches":
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--wrt {word}: expected patches:K with K >= 1, such as patches:3")
        return influence.Patches(size=int(size))
    return word if word in ("input", "parameters", "layers") else word.split(",")


def _estimator(options: argparse.Namespace) -> Any:
    import influence

    if options.released is not None:
        return influence.Released(epsilon=options.released)
    return influence.Exact()


# -- report -----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
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
    from ..images import data
    from ..zoo import published, recipes, training

    data_dir = Path(options.data).expanduser() if options.data else None
    try:
        if options.device:
            run.check_device(options.device)
        where: dict[str, Any] = {"device": options.device or "cpu", "data_dir": data_dir}
        if options.action == "list":
            print(published.listing())
        elif options.action == "train":
            if not options.names:
                raise recipes.RecipeError("name the networks to train; `influence zoo` lists them all")
            for name in [recipes.named(name).name for name in options.names]:
                print(published.train(name, **where), flush=True)
        else:
            problems = 0
            for line in published.check(options.names, **where):
                problems += 1
                print(line, flush=True)
            if problems:
                return 1
            print("zoo: every published network meets its gate and the accuracy that its ledger has")
        return 0
    except (recipes.RecipeError, data.DataError, training.TrainingError, OSError) as error:
        return _refuse(error)


# -- the command line -------------------------------------------------------------------------------------------------


def _parser() -> run.Parser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = run.Parser(prog="influence", description=_ABOUT, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run.add_commands(commands, epilog=_RUN_EXAMPLES)
    _add_score(commands, plain)
    zoo = commands.add_parser(
        "zoo", help="the trained networks", description=_ZOO, epilog=_ZOO_EXAMPLES, formatter_class=plain
    )
    zoo.add_argument("action", nargs="?", choices=("list", "train", "check"), default="list", help="default: list")
    zoo.add_argument("names", nargs="*", metavar="NAME", help="of networks; for check: none for all")
    zoo.add_argument("--data", metavar="DIR", help="folder of the data sets (default: INFLUENCE_DATA)")
    zoo.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    report = commands.add_parser(
        "report",
        help="all artifacts as one static site",
        description=_REPORT,
        epilog=_REPORT_EXAMPLES,
        formatter_class=plain,
    )
    report.add_argument("--profile", default="smoke", help="smoke, cpu or paper (default: smoke)")
    report.add_argument("--out", metavar="DIR", help="folder of the site (default: build/site/PROFILE)")
    return parser


def _add_score(commands: Any, plain: type[argparse.HelpFormatter]) -> None:
    score = commands.add_parser(
        "score",
        help="influence of your data on your model",
        description=_SCORE,
        epilog=_SCORE_EXAMPLES,
        formatter_class=plain,
    )
    score.add_argument("--model", required=True, help="see above")
    score.add_argument("--data", required=True, help="see above")
    score.add_argument("--out", default="scores", metavar="DIR", help="folder for the files (default: scores)")
    score.add_argument("--architecture", metavar="MODEL", help="what a checkpoint's weights belong to")
    score.add_argument(
        "--wrt",
        default="input",
        help="what is perturbed: input (default), parameters, layers, patches:K, or NAME,NAME...",
    )
    score.add_argument(
        "--part",
        choices=("train", "test"),
        help="train (default where the data have parts) or test; of data without parts, a fifth drawn as test",
    )
    score.add_argument(
        "--images", type=_count, default=0, metavar="N", help="a random sample of N; 0 for all (default)"
    )
    score.add_argument("--predicted", action="store_true", help="f = -log P of the predicted class, not of the label")
    score.add_argument("--released", type=float, metavar="E", help="the authors' released estimator with constant E")
    score.add_argument("--closed-form", action="store_true", help="one forward pass where that is enough (see below)")
    score.add_argument(
        "--check", type=_positive, default=4, metavar="N", help="examples whose rank is checked (default: 4)"
    )
    score.add_argument("--classes", type=_count, default=0, metavar="K", help="outputs of a torchvision network")
    score.add_argument("--size", type=_count, default=0, metavar="PIXELS", help="height and width of a folder's images")
    score.add_argument("--scale", type=float, default=0, help="factor for the data (default: 1/255 for bytes, else 1)")
    score.add_argument("--mean", type=float, nargs="+", metavar="M", help="mean of each channel after scaling")
    score.add_argument("--std", type=float, nargs="+", metavar="S", help="standard deviation of each channel")
    score.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="examples in a batch (default: 64)"
    )
    score.add_argument(
        "--batches-per-file", type=_positive, metavar="N", help="default: 8, fewer for more than 10 classes"
    )
    score.add_argument("--chunk-size", type=_positive, metavar="N", help="examples computed at once (default: chosen)")
    score.add_argument("--root", metavar="DIR", help="folder of torchvision's sets (default: INFLUENCE_DATA)")
    score.add_argument("--profile", default="smoke", help="of companion:NAME (default: smoke)")
    score.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
