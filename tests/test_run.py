"""The runner: what runs, what does not, what it says, and what is left after an interruption."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from influence.companion.ledger import notebook, paths
from influence.companion.runner import cli, kernels, run
from workspace import BODY, PARAMETERS, Workspace

ROOT = Path(__file__).resolve().parents[1]


def _wait(condition: object, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


# -- one run of good and bad notebooks, looked at by several tests ----------------------------------------------------


@pytest.fixture(scope="module")
def first(shared_workspace: Workspace) -> tuple[Workspace, int, str]:
    shared_workspace.notebook("sensitivity/good")
    shared_workspace.notebook("sensitivity/broken", body=f'{BODY}\nraise ValueError("bad luck")')
    shared_workspace.notebook("stability/forgetful", save="table")
    shared_workspace.notebook("00_overview")
    shared_workspace.profile("cpu", {"sensitivity/good": {"scale": 3}})
    process = shared_workspace.start(computing=True)
    output, errors = process.communicate(timeout=300)
    assert errors == ""
    return shared_workspace, process.returncode, output


def test_others_run_when_one_fails(first: tuple[Workspace, int, str]) -> None:
    workspace, status, output = first
    assert status == 1
    assert set(workspace.manifest()) == {"sensitivity/good", "00_overview"}
    lines = output.splitlines()
    ended = [
        ["sensitivity/broken", "failed"],
        ["sensitivity/good", "ok"],
        ["stability/forgetful", "failed"],
        ["00_overview", "ok"],
    ]
    assert sorted(line.split()[:2] for line in lines[:3]) == ended[:3]  # side by side: as they end
    assert lines[3].split()[:2] == ended[3]  # it tells of the others
    table = lines[lines.index("") + 2 : -1]
    assert [line.split()[:2] for line in table] == ended
    assert "ValueError: bad luck (see build/logs/smoke/sensitivity/broken.log)" in table[0]
    assert "ended without run.save()" in table[2]
    assert lines[-1] == "profile smoke: 2 ok, 0 unchanged, 2 failed"
    assert output.count("not judged") == 4  # the verdict: in the line, and in the table


def test_log_has_output_and_traceback(first: tuple[Workspace, int, str]) -> None:
    log = (first[0].root / "build/logs/smoke/sensitivity/broken.log").read_text()
    assert "profile smoke, device" in log
    assert 'raise ValueError("bad luck")' in log
    assert "\x1b" not in log


def test_second_run_changes_nothing(first: tuple[Workspace, int, str], capsys: pytest.CaptureFixture[str]) -> None:
    workspace = first[0]
    before, executed = workspace.contents(), workspace.root / "build/notebooks/smoke/sensitivity/good.ipynb"
    stamp = executed.stat().st_mtime_ns
    assert workspace.run("--only", "sensitivity/good", "00_overview") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "profile smoke: 0 ok, 2 unchanged, 0 failed"
    assert workspace.contents() == before
    assert executed.stat().st_mtime_ns == stamp


def test_forced_run_gives_the_same_bytes_and_refreshes(first: tuple[Workspace, int, str]) -> None:
    workspace = first[0]
    before, path = workspace.contents(), workspace.root / "notebooks/sensitivity/good.ipynb"
    assert workspace.run("--only", "sensitivity/good", "--refresh-notebooks") == 0
    assert workspace.contents() == before  # figures and ledger as well
    refreshed = nbformat.read(path, as_version=4)
    nbformat.validate(refreshed)
    code = [c for c in refreshed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2, 3, 4, 5]
    assert "verdict: not judged" in code[-1].outputs[0].text
    assert "papermill" not in path.read_text() and "execution" not in code[0].metadata
    assert workspace.run("--only", "sensitivity/good") == 0
    assert workspace.contents() == before  # outputs are no part of the key


def test_profiles_keep_apart(first: tuple[Workspace, int, str]) -> None:
    workspace = first[0]
    before = workspace.contents()
    assert workspace.run("--profile", "cpu") == 0
    assert workspace.contents() == before
    assert set(workspace.manifest("cpu")) == {"sensitivity/good"}  # a profile is what its file lists
    assert workspace.manifest("cpu")["sensitivity/good"]["parameters"]["scale"] == 3.0
    assert "1.0" in (workspace.results / "cpu/tables/sensitivity/good.csv").read_text()


def test_lost_or_changed_file_runs_again(first: tuple[Workspace, int, str]) -> None:
    workspace = first[0]
    job = run.plan("smoke", ["sensitivity/good"])[0]
    table = workspace.results / "smoke/tables/sensitivity/good.csv"
    content = table.read_bytes()
    assert run._up_to_date(job)
    table.write_bytes(content + b"1,c\n")
    assert not run._up_to_date(job)
    table.unlink()
    assert not run._up_to_date(job)
    table.write_bytes(content)
    assert run._up_to_date(job)


def test_key_follows_code_parameters_and_reference(first: tuple[Workspace, int, str]) -> None:
    workspace = first[0]
    path = workspace.root / "notebooks/sensitivity/good.ipynb"
    original = path.read_text()

    def same() -> bool:
        return run._up_to_date(run.plan("smoke", ["sensitivity/good"])[0])

    path.write_text(original.replace("# Title of", "# Another title of"))
    assert same()  # prose
    path.write_text(original.replace("scale / 3", "scale / 4"))
    assert not same()
    path.write_text(original.replace("scale: float = 2.0", "scale: float = 2.5"))
    assert not same()
    path.write_text(original)
    workspace.reference("sensitivity/good,auc,value,0.9,0.1,printed,table 1")
    assert not same()
    workspace.reference("sensitivity/other,auc,value,0.9,0.1,printed,table 1")
    assert same()


# -- further notebooks in the same workspace: its kernels are forked from a process that is there ----------------------


def test_progress_bars_are_silent(shared_workspace: Workspace) -> None:
    loop = "from influence.progress import progress_bar\n\nfor _ in progress_bar(range(2)):\n    pass"
    shared_workspace.notebook("sensitivity/slow", body=f"{BODY}\n{loop}")
    assert shared_workspace.run("--only", "sensitivity/slow") == 0
    executed = nbformat.read(shared_workspace.root / "build/notebooks/smoke/sensitivity/slow.ipynb", as_version=4)
    cell = next(c for c in executed.cells if "progress_bar" in c.source)
    assert [output.output_type for output in cell.outputs] == ["display_data"]
    assert "image/png" in cell.outputs[0].data  # the figure
    assert "widgets" not in executed.metadata


def test_time_limit(shared_workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    shared_workspace.notebook("sensitivity/endless", body="import time\ntime.sleep(60)")
    begun = time.monotonic()
    assert shared_workspace.run("--only", "sensitivity/endless", "--time-limit", "2") == 1
    assert time.monotonic() - begun < 40
    assert "TimeoutError: over its limit of 2 s" in capsys.readouterr().out


def test_goes_on_after_kill(shared_workspace: Workspace) -> None:
    workspace, command = shared_workspace, ("--only", "sensitivity/quick", "stability/long")
    runs, gate = workspace.root / "runs", workspace.root / "gate"
    count = f"from pathlib import Path\nwith open({str(runs)!r}, 'a') as file:\n    file.write('{{}} ')\n"
    wait = f"import time\nwhile not Path({str(gate)!r}).exists():\n    time.sleep(0.05)\n"
    workspace.notebook("sensitivity/quick", body=count.format("quick") + BODY)
    workspace.notebook("stability/long", body=count.format("long") + wait + BODY)
    process = workspace.start(*command)
    _wait(lambda: runs.exists() and "long" in runs.read_text() and "sensitivity/quick" in workspace.manifest(), process)
    before = workspace.contents()
    assert "stability/long" not in workspace.manifest()
    process.kill()
    process.communicate()
    half_written = workspace.results / "smoke" / "tables" / ".tmp-0-long.csv"
    half_written.write_text("x,")
    time.sleep(1.5)  # the kernel sees within a second that its parent has gone
    gate.touch()
    assert workspace.run(*command) == 0
    assert sorted(runs.read_text().split()) == ["long", "long", "quick"]
    after = workspace.contents()
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert after["tables/stability/long.csv"] == before["tables/sensitivity/quick.csv"]
    assert not half_written.exists()


# -- interruptions and edits ------------------------------------------------------------------------------------------


def test_interrupt_is_one_line(workspace: Workspace) -> None:
    started = workspace.root / "started"
    workspace.notebook("sensitivity/long", body=f"import time\nopen({str(started)!r}, 'w').close()\ntime.sleep(60)")
    process = workspace.start()
    _wait(started.exists, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == ""
    assert errors.strip() == "interrupted: what has finished is kept, the same command goes on from here"


def test_one_run_at_a_time(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.notebook("sensitivity/good")
    paths.BUILD.mkdir()
    with run._alone():
        assert workspace.run() == 2
    assert "another run is under way" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["measures.py", "companion/style.py"])  # loaded before the fork, and after it
def test_code_edited_during_a_run_is_seen(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A notebook that was computed by other code than the run began with must not end as up to date."""
    shutil.copytree(ROOT / "influence", tmp_path / "influence")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = workspace.notebook("sensitivity/good")
    book = nbformat.read(path, as_version=4)
    book.cells[1].source = f'open("{tmp_path}/influence/{file}", "a").write("EDITED = 1\\n")\n{book.cells[1].source}'
    nbformat.write(book, path)
    output, _ = workspace.start("--force").communicate(timeout=300)
    assert "RuntimeError: ended without run.save(), or a file it depends on was edited meanwhile" in output


# -- data sets that are not there -------------------------------------------------------------------------------------


def test_what_can_be_made_without_the_missing_data_is_made(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stem in ("sensitivity/drawn", "sensitivity/labels", "sensitivity/networks"):
        more = 'recompute: bool = False\nkinds: list[str] = []\nnetworks: list[str] = []\ndataset: str = "digits"'
        workspace.notebook(stem, parameters=f"{PARAMETERS}\n{more}")
    changed = {"sensitivity/labels": {"kinds": ["worse_label"]}, "sensitivity/networks": {"networks": ["resnet20"]}}
    workspace.profile("cpu", {"sensitivity/drawn": {}} | changed)
    ran: list[str] = []

    def execute(job: run.Job, *_: object) -> run.Outcome:
        ran.append(job.notebook.stem)
        return run.Outcome(job.notebook.stem, "ok", 1.0, "checked")

    monkeypatch.setattr(run, "_execute", execute)
    monkeypatch.setattr(kernels, "prepare", lambda *_, **__: None)
    (tmp_path / "empty").mkdir()
    command = ["--profile", "cpu", "--data", str(tmp_path / "empty")]
    assert workspace.run(*command) == 0 and not ran
    assert capsys.readouterr().out.splitlines()[-1] == "profile cpu: 0 ok, 0 unchanged, 0 failed, 3 not there"
    monkeypatch.setattr(run, "published", lambda stem, profile: (tmp_path, {}))
    assert workspace.run(*command) == 0 and len(ran) == 3  # nothing is needed to draw
    assert "needs" not in capsys.readouterr().out
    ran.clear()
    assert workspace.run(*command, "--recompute") == 1 and ran == ["sensitivity/drawn"]
    lines = capsys.readouterr().out.splitlines()
    needed = [line.split()[1] for line in lines if line.startswith("needs")]
    assert needed == ["cifar10n:", "cifar10:", "resnet20:"]
    assert lines[0].endswith("CC BY-NC 4.0") and lines[1].endswith("so not made: sensitivity/labels")
    assert "akamaster" in lines[4] and "resnet20-12fca82f.th" in lines[4] and "BSD" in lines[4]
    assert "sensitivity/networks  no data               needs cifar10, resnet20" in lines
    assert lines[-1] == "profile cpu: 1 ok, 0 unchanged, 0 failed, 2 no data"
    monkeypatch.setattr(run, "_up_to_date", lambda job: job.notebook.stem == "sensitivity/drawn")
    monkeypatch.setattr(run.Job, "verdict", "checked")
    assert workspace.run(*command, "--recompute") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "profile cpu: 0 ok, 1 unchanged, 0 failed, 2 no data"


def test_networks_are_trained_anew_beside_the_published_ones(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for retrain in (True, False):
        assert ("INFLUENCE_ZOO" in run._environment(None, None, retrain=retrain)) == retrain
    kept = paths.cache_dir() / "retrained"
    for name, value in run._environment(None, None, retrain=True).items():
        monkeypatch.setenv(name, value)
    importlib.reload(paths)  # as in a process that starts with these; the workspace reloads it at its end
    assert (paths.ZOO, paths.cache_dir()) == (kept / "zoo", kept)


# -- bad requests: one line, status 2, before any work ----------------------------------------------------------------


@pytest.fixture
def refused(workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    workspace.notebook("sensitivity/good", parameters=f'{PARAMETERS}\ndataset: str = "digits"')
    monkeypatch.setattr(run, "_execute", lambda *_: pytest.fail("work had begun"))

    def check(message: str, *arguments: str) -> None:
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert all(line.startswith(("needs ", "  not there")) for line in captured.out.splitlines())
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        assert message in captured.err

    check.workspace = workspace  # type: ignore[attr-defined]
    return check


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sensitivity/good": {"sclae": 1.0}}, "unknown parameter 'sclae': it has profile, seeds, scale"),
        ({"sensitivity/good": {"scale": "big"}}, "parameter 'scale' is float, got 'big'"),
        ({"sensitivity/good": {"scale": True}}, "parameter 'scale' is float, got True"),
        ({"sensitivity/good": {"seeds": [0, 1.5]}}, "parameter 'seeds' is list[int], got [0, 1.5]"),
        ({"sensitivity/good": {"seeds": 0}}, "parameter 'seeds' is list[int], got 0"),
        ({"sensitivity/good": {"limit": "all"}}, "parameter 'limit' is int | None, got 'all'"),
        ({"sensitivity/bad": {}}, "unknown notebook 'sensitivity/bad'"),
        ({"sensitivity/good": [1]}, "expected a mapping"),
        ({"sensitivity/good": {"dataset": "imagenet"}}, "unknown data set 'imagenet'"),
        ({"sensitivity/good": {"dataset": "mnist"}}, "mnist"),
    ],
)
def test_bad_profile(refused: object, content: dict[str, object], message: str, tmp_path: Path) -> None:
    refused.workspace.profile("cpu", content)  # type: ignore[attr-defined]
    (tmp_path / "empty").mkdir()
    refused(message, "run", "--profile", "cpu", "--data", str(tmp_path / "empty"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "gpu"], "unknown profile 'gpu': there are smoke"),
        (["--only", "fig_good"], "unknown notebook 'fig_good'"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--device", "tpu"], "device 'tpu': expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device 'cuda:99': PyTorch sees"),
        (["--time-limit", "-1"], "expected a positive number"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_option(refused: object, arguments: list[str], message: str) -> None:
    refused(message, "run", *arguments)  # type: ignore[operator]


def test_notebook_outside_the_profile(refused: object) -> None:
    refused.workspace.profile("paper", {})  # type: ignore[attr-defined]
    message = "sensitivity/good is not a part of the profile 'paper'"
    refused(message, "run", "--profile", "paper", "--only", "sensitivity/good")  # type: ignore[operator]


def test_results_folder_not_writable(refused: object) -> None:
    refused.workspace.results.write_text("a file in its place")  # type: ignore[attr-defined]
    refused("cannot write to", "run")  # type: ignore[operator]


def test_damaged_ledger_and_reference(refused: object) -> None:
    workspace = refused.workspace  # type: ignore[attr-defined]
    ledger = workspace.results / "smoke" / "manifest.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_text('{"sensitivity')
    refused("is damaged", "run")  # type: ignore[operator]
    ledger.unlink()
    workspace.reference("sensitivity/good,auc,about,0.9,0.1,printed,table 1")
    refused("kind 'about' is none of", "run")  # type: ignore[operator]


# -- what needs no kernel ---------------------------------------------------------------------------------------------


def test_order(workspace: Workspace) -> None:
    stems = ["bridge/b", "00_overview", "stability/a", "sensitivity/z", "adapt_your_model", "sensitivity/a"]
    for stem in stems:
        workspace.notebook(stem)
    expected = ["sensitivity/a", "sensitivity/z", "stability/a", "bridge/b", "adapt_your_model", "00_overview"]
    assert list(notebook.discover()) == expected
    assert [job.notebook.stem for job in run.plan("smoke")] == expected


def test_integer_becomes_the_float_it_stands_for(workspace: Workspace) -> None:
    workspace.notebook("sensitivity/good")
    workspace.profile("cpu", {"sensitivity/good": {"scale": 2, "limit": 5}})
    job = run.plan("cpu")[0]
    assert job.overrides == {"profile": "cpu", "limit": 5}  # 2 is the default 2.0
    assert type(job.parameters["scale"]) is float


def test_parameters_cell_takes_only_literals(workspace: Workspace) -> None:
    workspace.notebook("sensitivity/odd", parameters='profile: str = "smoke"\nseeds: list[int] = list(range(3))')
    with pytest.raises(notebook.NotebookError, match="only assignments of literals"):
        run.plan("smoke")


def test_list(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.notebook("sensitivity/good")
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == "sensitivity/good  Title of sensitivity/good\n"
    assert cli.main(["list", "--profile", "cpu"]) == 2
    assert "unknown profile 'cpu': there are smoke" in capsys.readouterr().err
    workspace.profile("cpu", {})
    assert cli.main(["list", "--profile", "cpu"]) == 0
    assert capsys.readouterr().out == "sensitivity/good  not run  Title of sensitivity/good\n"
    ledger = workspace.results / "cpu" / "manifest.json"
    ledger.parent.mkdir(parents=True)
    ledger.write_text(json.dumps({"sensitivity/good": {"verdict": "partly"}}))
    assert cli.main(["list", "--profile", "cpu"]) == 0
    assert capsys.readouterr().out == "sensitivity/good  partly  Title of sensitivity/good\n"
    assert cli.main(["list", "--markdown"]) == 0
    row = "| [sensitivity/good](notebooks/sensitivity/good.ipynb) | Title of sensitivity/good | partly † |"
    assert capsys.readouterr().out.splitlines()[2] == row


# -- run_all.sh -------------------------------------------------------------------------------------------------------


def _shell(*arguments: str, path: str = "/usr/bin:/bin", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(ROOT / "run_all.sh"), *arguments]
    environment = {"PATH": path, "HOME": str(Path.home())}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_needs_no_setup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = _shell("--help", cwd=tmp_path)
    assert finished.returncode == 0 and finished.stderr == ""
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--help"])
    accepted = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert ended.value.code == 0 and "--only" in accepted
    for option in accepted:
        assert option in finished.stdout


def test_no_python_is_one_line(tmp_path: Path) -> None:
    for name in ("bash", "cat", "cksum", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    command = ["/bin/bash", str(tmp_path / "run_all.sh"), "setup"]
    finished = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr.startswith("error: no Python >= 3.11 on PATH") and finished.stderr.count("\n") == 1


def test_active_environment_is_used_as_it_is(tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    fake.chmod(0o755)
    command = ["/bin/bash", str(ROOT / "run_all.sh"), "setup"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "VIRTUAL_ENV": str(tmp_path)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout) == (0, f"{fake}\n")
    assert finished.stderr == f"environment: {sys.prefix}, as it is\n"
