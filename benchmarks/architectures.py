"""Networks of other people against autograd: one of each family of timm, and text and image models of transformers.

    python -m benchmarks.architectures            # all of them, an hour of one core; exit status 1 if one is wrong
    python -m benchmarks.architectures levit bert # those whose names hold one of these words; no result is written
    python -m benchmarks.architectures --table    # Markdown from the JSON file

Random weights, float64, three classes, two examples. Held against each other are the squared lengths of the contrasts'
gradients by all parameters and by the image (of text models: by the parameters alone), ours and autograd's. A run that
was interrupted goes on where it stopped; its result is benchmarks/results/architectures/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import influence
from benchmarks import fuzz
from benchmarks.run import environment

RESULTS = Path(__file__).parent / "results" / "architectures" / "cpu.json"
CLASSES, AGREE = 3, 1e-6  # relative, in float64
_SIZES, _MOST, _SECONDS = (64, 96, 128), 45e6, 300
# How the smallest network of a family is called.
_SMALL = tuple("atto femto pico zepto nano xxs xxt tiny mini _xs _s0 _b0 050 18 _s".split())
KINDS = ("right", "announced", "refused", "wrong", "fails", "not finished", "left out")
Batch = Tensor | dict[str, Tensor]
Made = tuple[nn.Module, Batch]


class _LeftOutError(Exception):
    pass


class _TooLongError(BaseException):
    pass


def from_timm() -> Iterator[tuple[str, Callable[[], Made]]]:
    """The network with the smallest name of each module of timm, on the smallest images that it takes."""
    import timm

    def make(name: str) -> Made:
        model = timm.create_model(name, num_classes=CLASSES).eval()
        size = sum(p.numel() for p in model.parameters())
        if size > _MOST:
            raise _LeftOutError(f"{size / 1e6:.0f} million parameters")
        for side in (*_SIZES, model.default_cfg["input_size"][-1]):
            x = torch.randn(2, 3, side, side)
            try:
                with torch.no_grad():
                    timm.create_model(name, num_classes=CLASSES).eval()(x)
            except Exception:  # whatever a network says of images that are too small for it
                continue
            return model, x
        raise _LeftOutError("no size of images that it takes")

    for module in timm.list_modules():
        names = sorted(timm.list_models(module=module), key=len)
        small = [name for word in _SMALL for name in names if word in name]
        for name in (small or names)[:1]:
            yield f"timm:{name}", lambda name=name: make(name)


def from_transformers() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Small classifiers of text, of which the examples have different lengths, and of images."""
    import transformers

    narrow = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**narrow, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    swin = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    options: dict[str, dict[str, Any]] = {
        **{name: text for name in ("Bert", "Roberta", "Electra", "Albert", "DebertaV2", "BigBird", "Llama")},
        **{name: {**text, "num_key_value_heads": 2} for name in ("Mistral", "Qwen2")},
        "ModernBert": {**text, "cls_token_id": 1, "sep_token_id": 2},
        "DistilBert": {**text, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "Longformer": {**text, "attention_window": 4},
        "GPT2": {**text, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "T5": {**text, **t5},
        "XLNet": {**text, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        **{name: {**narrow, "image_size": 32, "patch_size": 8} for name in ("ViT", "DeiT", "Beit", "Dinov2")},
        "Swin": {"image_size": 32, **swin},
        "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }

    def make(name: str) -> Made:
        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options[name])
        texts = "vocab_size" in options[name]
        model = getattr(transformers, f"{name}For{'Sequence' if texts else 'Image'}Classification")(config).eval()
        for parameter in model.parameters():  # theirs are so small that nothing but the last layer counts
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        if not texts:
            return model, torch.randn(2, 3, 32, 32)
        ids, mask = torch.randint(3, 100, (2, 12)), torch.ones(2, 12, dtype=torch.long)
        ids[1, 7:], mask[1, 7:] = 0, 0
        ids[0, 11] = ids[1, 6] = 2  # the end of each
        return model, {"input_ids": ids, "attention_mask": mask}

    for name in options:
        yield f"transformers:{name}", lambda name=name: make(name)


def lengths(model: nn.Module, x: Batch, *, perturb: bool) -> Tensor:
    """Of two examples, ``(2,)``: sum_k |d (z_k - z_y)|^2, y the predicted class, by autograd, class by class.

    Of all parameters, or of the image. Each example is called beside itself: of a single one PyTorch (2.14) has wrong
    gradients where batch normalisation meets channels-last memory, and says nothing.
    """
    found = []
    for n in range(2):
        twice = {k: torch.cat([v[n : n + 1]] * 2) for k, v in (x if isinstance(x, dict) else {"x": x}).items()}
        leaves = [twice["x"].requires_grad_()] if perturb else list(model.parameters())
        output = model(**twice) if isinstance(x, dict) else model(twice["x"])
        logits, total = getattr(output, "logits", output)[0], 0.0
        for contrast in logits - logits.max():
            grads = torch.autograd.grad(contrast, leaves, retain_graph=True, allow_unused=True)
            total += float(sum(grad.square().sum() for grad in grads if grad is not None))
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def judged(make: Callable[[], Made]) -> dict[str, Any]:
    """What became of one network: kind, and more about it."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: "autograd path" in record.getMessage())
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("influence").addHandler(handler)
    torch.manual_seed(0)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of this process: other work beside it does not count
    try:
        model, x = make()
        model, x = model.double(), x.double() if isinstance(x, Tensor) else x
        for parameter in model.parameters():
            if not bool(parameter.any()):  # a layer that begins at zero hides all that is below it
                nn.init.normal_(parameter, std=0.1)
        errors = []
        for wrt in ("parameters", "input") if isinstance(x, Tensor) else ("parameters",):
            gram = influence.metric_tensor(model, x, wrt=wrt).contrast_gram()[:, 0]
            ours, truth = gram.diagonal(dim1=1, dim2=2).sum(dim=1), lengths(model, x, perturb=wrt == "input")
            errors.append((ours - truth).abs() / truth)  # NaN, and wrong, where nothing moves it
        worst = float(torch.cat(errors).max())
    except _TooLongError:
        return {"kind": "not finished", "detail": f"in {_SECONDS} seconds of the processor"}
    except _LeftOutError as error:
        return {"kind": "left out", "detail": str(error)}
    except Exception as error:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        kind = "refused" if where.is_relative_to(Path(influence.__file__).parent) else "fails"
        return {"kind": kind, "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        logging.getLogger("influence").removeHandler(handler)
    kind = "wrong" if not worst <= AGREE else "announced" if heard else "right"
    return {"kind": kind, "error": worst, "detail": "; ".join(heard)[:200]}


def table(networks: dict[str, dict[str, Any]]) -> str:
    """Markdown: how many of each package became what, and a line for each that is not right."""
    lines = [f"| package | networks | {' | '.join(KINDS)} |", "|---|" + "--:|" * (len(KINDS) + 1)]
    for package in dict.fromkeys(name.partition(":")[0] for name in networks):
        kinds = [row["kind"] for name, row in networks.items() if name.startswith(f"{package}:")]
        lines.append(f"| {' | '.join([package, str(len(kinds)), *(str(kinds.count(kind)) for kind in KINDS)])} |")
    odd = [f"* {name}: {row['kind']}: {row['detail']}" for name, row in networks.items() if row["kind"] in KINDS[2:6]]
    return "\n".join([*lines, "", *odd])


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a network is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    run = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.table:
        print(table(run["networks"]))
        return 0
    if options.words or run.get("engine") != fuzz.fingerprint():
        run = {"engine": fuzz.fingerprint(), "environment": environment(torch.device("cpu")), "networks": {}}

    def too_long(*_: object) -> None:
        raise _TooLongError

    signal.signal(signal.SIGPROF, too_long)
    warnings.simplefilter("ignore")
    logging.getLogger("influence").propagate = False
    for name, make in (*from_timm(), *from_transformers()):
        if name in run["networks"] or (options.words and not any(word in name for word in options.words)):
            continue
        run["networks"][name] = found = judged(make)
        print(name, found["kind"], f"{found['error']:.1e}" if "error" in found else "", found["detail"], flush=True)
        if not options.words:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run["networks"]))
    return int(any(row["kind"] in ("wrong", "fails") for row in run["networks"].values()))


if __name__ == "__main__":
    sys.exit(main())
