"""Kernels that start in half a second: forked from one process that has imported the libraries once for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.provisioning import LocalProvisioner

_CONTEXT = multiprocessing.get_context("forkserver")
_ALWAYS = f"{__package__}.preloaded"
# The first step of an optimizer imports PyTorch's compiler, which takes longer than most steps under smoke.
_COMPUTING = ("torch._dynamo", "torchvision.transforms.v2.functional", "sklearn.datasets")
_BACKEND = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as every kernel sets it
_running: set[BaseProcess] = set()


def prepare(environment: Mapping[str, str], *, computing: bool) -> None:
    """Start the process that all kernels are forked from; what libraries read once, such as threads, is read here.

    `computing` says whether a notebook does more than to draw what is published.
    """
    # Elsewhere than on Linux (Accelerate, Objective-C) libraries that are loaded do not survive a fork.
    modules = [_ALWAYS, *(_COMPUTING if computing else ())] if sys.platform == "linux" else []
    _CONTEXT.set_forkserver_preload(modules)
    with patch.dict(os.environ, {**_BACKEND, **environment}):
        forkserver.ensure_running()


def kill_all() -> None:
    """End every kernel that runs, so that the threads that wait for them end too."""
    for process in tuple(_running):
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def manager(
    environment: Mapping[str, str], folder: Path, log: Path, base: type[KernelManager] = AsyncKernelManager
) -> type[KernelManager]:
    """The class of kernels in a folder, with these variables on top of our own and with their own messages in `log`.

    They run this interpreter, whatever kernels the reader has registered.
    """

    class Manager(base):  # type: ignore[misc, valid-type]
        @property
        def kernel_spec(self) -> KernelSpec:
            """What the forked process gets in the place of a command line."""
            argv = ["-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python", resource_dir="")

        async def _async_pre_start_kernel(self, **options: Any) -> tuple[list[str], dict[str, Any]]:
            """Let the kernel be forked."""
            self.provisioner = _Forked(kernel_id="", kernel_spec=self.kernel_spec, parent=self)
            options |= {"env": {**os.environ, **environment}, "cwd": folder, "log": log}
            return await super()._async_pre_start_kernel(**options)

    return Manager


class _Forked(LocalProvisioner):
    """A kernel in a fork of the prepared process."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        told = cmd, options["env"], options["cwd"], options["log"]
        process = _CONTEXT.Process(target=_serve, args=told)
        process.start()
        _running.add(process)
        self.process = _Handle(process)  # type: ignore[assignment]
        self.pid = process.pid
        return self.connection_info


class _Handle:
    """What `LocalProvisioner` asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        _running.discard(self._process)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, signum)


def _serve(arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # Ctrl-C is for the runner, which ends its kernels
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    IPKernelApp.launch_instance(arguments)


def _end_with(runner: BaseProcess) -> None:
    runner.join()
    os._exit(1)
