"""Compile every Triton kernel ahead of time, no GPU needed: registers, shared memory and spills for each target.

    python -m benchmarks.kernels           # compile, print the table, write the JSON; exit status 1 on a spill
    python -m benchmarks.kernels --table   # Markdown from the JSON file

Triton makes PTX for the target, and the assembler that it ships says what a GPU would need to run it. A kernel that
spills registers to memory, or does not compile, fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from influence.kernels import gram, relu_norm_backward, stability_loss

# Ampere, Hopper, Blackwell.
TARGETS = (80, 90, 100)
RESULT = Path(__file__).parent / "results" / "kernels.json"
_POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class Variant:
    """One kernel as the library launches it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, object]
    warps: int
    text: str


def variants() -> Iterator[Variant]:
    """Every kernel at every block size and number of warps in use."""
    # Strides and sizes as int64: what a tensor of more than 2^31 entries is launched with needs most registers.
    sizes = {
        "classes": "i32",
        **dict.fromkeys(("width", "stride_n", "stride_m"), "i64"),
        "splits": "i32",
        "span": "i32",
    }
    for rows, warps in gram.WARPS.items():
        constants = {"ROWS": rows, "BLOCK": gram.BLOCK}
        signature = {"rows": "*fp32", "out": "*fp64", **sizes}
        yield Variant("gram", gram.gram_kernel, signature, constants, warps, f"{rows} rows, {gram.BLOCK} entries")
    for dtype in ("float32", "float64"):
        signature = dict.fromkeys(("grad", "result", "scale", "masked", "scaled"), _POINTERS[dtype])
        signature |= {"classes": "i32", "entries": "i64", "inner": "i64", "channels": "i32"}
        constants = {"BLOCK": relu_norm_backward.BLOCK}
        text = f"{dtype}, {relu_norm_backward.BLOCK} entries"
        kernel, warps = relu_norm_backward.relu_norm_kernel, relu_norm_backward.WARPS
        yield Variant("relu_norm_backward", kernel, signature, constants, warps, text)
    for block, warps in stability_loss.WARPS.items():
        for dtype, kl in (("float32", True), ("float32", False), ("bfloat16", True), ("float64", True)):
            signature = dict.fromkeys(("z", "w", "grad_z", "grad_w"), _POINTERS[dtype])
            signature = {name: signature.get(name, kind) for name, kind in _LOSS.items()}
            constants = {"KL": kl, "STOP": False, "BLOCK": block}
            text = f"{dtype}, {'KL' if kl else 'CE'}, {block} classes"
            yield Variant("stability_loss", stability_loss.stability_loss_kernel, signature, constants, warps, text)


_LOSS = {
    **{"z": "", "w": "", "labels": "*i64", "losses": "*fp64", "grad_z": "", "grad_w": ""},
    **{"alpha": "*fp64", "classes": "i32", "count": "i32"},
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target: registers a thread, bytes of shared memory a program, bytes spilled."""

    kernel: str
    variant: str
    warps: int
    target: str
    registers: int
    shared: int
    spilled: int
    tensor_cores: bool


def compile_for(variant: Variant, capability: int) -> Compiled:
    """Compile one kernel.

    Raises:
        RuntimeError: If Triton or the assembler refuses it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants)
    options = {"num_warps": variant.warps}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = made.asm["ptx"]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Releases ship an assembler of its own for the newest targets.
    newest = folder / "ptxas-blackwell"
    assembler = newest if capability >= 100 and newest.exists() else folder / "ptxas"
    (name,) = re.findall(r"^\s*\.target (\w+)", text, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(text)
        command = [str(assembler), "-v", f"--gpu-name={name}", str(file), "-o", str(Path(work) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant.name} ({variant.text}) does not assemble for {name}: {done.stderr[-500:]}")
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill", done.stderr))
    return Compiled(
        kernel=variant.name,
        variant=variant.text,
        warps=variant.warps,
        target=name,
        registers=int(registers),
        shared=int(made.metadata.shared),
        spilled=spilled,
        tensor_cores="mma.sync.aligned.m8n8k4" in text,
    )


def table(file: Path = RESULT) -> str:
    """Markdown: registers a thread, and what else a kernel needs, by target."""
    rows = json.loads(file.read_text())["kernels"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| kernel | variant | warps | shared memory | registers ({', '.join(targets)}) | spilled | tensor cores |"
    ]
    lines.append("|" + "---|" * 7)
    for name, variant in dict.fromkeys((row["kernel"], row["variant"]) for row in rows):
        same = [row for row in rows if (row["kernel"], row["variant"]) == (name, variant)]
        shared = max(row["shared"] for row in same)
        registers = ", ".join(str(row["registers"]) for row in same)
        spilled, cores = sum(row["spilled"] for row in same), all(row["tensor_cores"] for row in same)
        cells = (name, variant, same[0]["warps"], f"{shared} B", registers, f"{spilled} B", "yes" if cores else "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a kernel spills or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), metavar="CAPABILITY")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.out))
        return 0
    compiled, failed = [], []
    for variant in variants():
        for capability in options.targets:
            try:
                compiled.append(compile_for(variant, capability))
            except Exception as error:  # the compiler's own errors have no common base
                failed.append(f"{variant.name} ({variant.text}), capability {capability}: {error}")
    failed += [f"{c.kernel} ({c.variant}) spills {c.spilled} bytes on {c.target}" for c in compiled if c.spilled]
    result = {"kernels": [asdict(c) for c in compiled], "triton": metadata.version("triton")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(options.out), *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
