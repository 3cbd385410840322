"""The Triton kernels: in their interpreter where Triton is installed, and optional where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import influence
from benchmarks import kernels
from influence.kernels import backend

ROOT = str(Path(influence.__file__).parents[1])


def run(arguments: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, **extra}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_kernels.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_library_does_without_triton() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, influence\n"
        "from influence.kernels import backend\n"
        "assert not backend.HAS_TRITON\n"
        "x = torch.zeros(2, 5)\n"
        "print(influence.metric_tensor(torch.nn.Linear(5, 3), x, wrt='layers').rank().tolist())\n"
        "try: influence.metric_tensor(torch.nn.Linear(5, 3), x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run(["-c", code])
    assert done.stdout.splitlines()[0] == "[[2], [2]]", done.stderr
    assert "not installed" in done.stdout


def test_unknown_backend_and_no_device() -> None:
    model, x = nn.Linear(4, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="backend must be one of"):
        influence.metric_tensor(model, x, backend="jax")
    if backend.HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="needs a GPU"):
            influence.metric_tensor(model, x, wrt="layers", backend="triton")


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    "variant", kernels.variants() if backend.HAS_TRITON else (), ids=lambda v: f"{v.name}, {v.text}"
)
def test_kernels_compile_without_spills(variant: kernels.Variant) -> None:
    version = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    if variant.name == "gram" and version < (3, 8):
        pytest.skip("Triton 3.6 has float64 tensor cores for sm_80 alone, and spills up to 72 bytes without them")
    for capability in kernels.TARGETS:
        found = kernels.compile_for(variant, capability)
        assert found.spilled == 0, found
        assert 0 < found.registers < 255
        assert found.tensor_cores == (variant.name == "gram")


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_every_kernel_is_compiled_and_a_spill_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = list(kernels.variants())
    sources = [file.read_text() for file in Path(backend.__file__).parent.glob("*.py")]
    assert len({id(variant.kernel) for variant in everything}) == sum(text.count("@triton.jit") for text in sources)
    # All classes of a block in the registers of a quarter of its threads.
    largest = next(v for v in everything if "1024 classes" in v.text)
    monkeypatch.setattr(kernels, "variants", lambda: [replace(largest, warps=1), replace(largest, signature={})])
    assert kernels.main(["--targets", "90", "--out", str(tmp_path / "k.json")]) == 1
    said = capsys.readouterr().out
    assert "spills" in said and "stability_loss (float32, KL, 1024 classes), capability 90:" in said


def test_auto_keeps_what_agrees_and_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def kernel(name: str, seconds: float, factor: float = 1.0) -> backend.Kernel:
        def run(*_: object) -> tuple[torch.Tensor, ...]:
            calls.append(name)
            time.sleep(seconds)
            return (factor * torch.ones(3, dtype=torch.float64),)

        return run

    def fails() -> tuple[torch.Tensor, ...]:
        raise ValueError("no")

    reference = kernel("torch", 2e-3)
    assert backend.is_better("k", kernel("triton", 0), reference) is True
    assert backend.is_better("k", kernel("triton", 2e-2), reference) is False
    assert backend.is_better("k", kernel("triton", 0, 1 + 1e-9), reference) is False
    assert backend.is_better("k", fails, reference) is False
    # Zeros would agree with anything that does nothing.
    assert backend.is_better("k", kernel("triton", 0, 0.0), kernel("torch", 1e-3, 0.0)) is None

    # On a GPU: found once for each kind, and kept.
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "_BETTER", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    given = SimpleNamespace(device=torch.device("cuda"))
    calls.clear()
    for kind, better in ((1, True), (1, True), (2, True)):
        assert backend.takes_triton(kind, kernel("triton", 0), reference, given) is better
    assert calls.count("triton") == 2 * (1 + backend._REPEATS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls.clear()
    assert backend.takes_triton(3, kernel("triton", 0), reference, given) is False
    assert not calls and len(backend._BETTER) == 2
