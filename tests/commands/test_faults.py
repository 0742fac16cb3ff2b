"""Signals, full disks, and what a killed command leaves: one line, the right status, and the next run works."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from forked_commands import run_forked

from twinserve.settings.errors import InputError
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "hung up")}
ORDER = """
import os
from twinserve.policies.orders import FirstCome

class Ends(FirstCome):
    left = 5

    def pop_next(self):
        Ends.left -= 1
        if not Ends.left:
            os.kill(os.getpid(), {number})
        return super().pop_next()
"""

BEHIND = """
from twinserve import cli

def signalled(*given, does=cli.{name}, left=[15]):
    if left:
        os.kill(os.getpid(), left.pop())
    return does(*given)

cli.{name} = signalled
"""


def command(*arguments: object, folder: Path, limit: int | None = None, **environment: str):
    """Run a command in a process of its own, which can write no file longer than `limit` bytes; with variables of the
    environment in one that imports all anew."""
    (folder / "tmp").mkdir(exist_ok=True)
    words = [*map(str, arguments)]
    if not environment:
        return run_forked(words, folder, limit)
    python = [sys.executable, "-m", "twinserve"]
    return subprocess.run([*python, *words], capture_output=True, text=True, env=os.environ | environment, check=False)


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in ("tmp", "lock"))


def said(result) -> str:
    """The one line by which a command ended."""
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr, result.stderr
    assert [line for line in lines if line.startswith("twinserve: ")] == lines[-1:], result.stderr
    return lines[-1]


@pytest.fixture
def folder(tmp_path) -> Path:
    (made := tmp_path / "folder").mkdir()
    return made


@pytest.mark.parametrize("fleet", [(), ("--replicas", 2)], ids=["replica", "fleet"])
@pytest.mark.parametrize("number", [*ENDS, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("has_out", [True, False])
def test_a_signal_in_a_run_leaves_nothing(folder, tmp_path, trace, latency, fleet, number, has_out):
    (tmp_path / "order.py").write_text(ORDER.format(number=int(number)))
    out = ("--out", folder / "run") if has_out else ()
    arguments = ("sim", trace, "--latency", latency, *fleet)
    result = command(*arguments, *out, "--scheduling-policy", f"{tmp_path / 'order.py'}:Ends", folder=folder)
    if number is signal.SIGKILL:
        assert result.returncode == -9
        assert {name.split("/")[0] for name in left(folder)} <= {"run.partial"}
    else:
        status, word = ENDS[number]
        told = f"; {folder / 'run'} was not written" if has_out else ""
        assert (result.returncode, said(result)) == (status, f"twinserve: {word}{told}")
        assert left(folder) == []
    assert list((folder / "tmp").iterdir()) == []
    again = command(*arguments, *out, folder=folder)
    assert again.returncode == 0, again.stderr
    assert {name.split("/")[0] for name in left(folder)} == ({"run"} if has_out else set())


def test_what_a_stopped_command_was_to_replace_is_as_it_was(folder, tmp_path, trace, latency):
    arguments = ("sim", trace, "--latency", latency, "--out", folder / "run", "--force")
    assert command(*arguments, folder=folder).returncode == 0
    before = (folder / "run" / "run.json").read_bytes()
    (tmp_path / "order.py").write_text(ORDER.format(number=int(signal.SIGINT)))
    result = command(*arguments, "--scheduling-policy", f"{tmp_path / 'order.py'}:Ends", folder=folder)
    assert (result.returncode, said(result)) == (130, f"twinserve: interrupted; {folder / 'run'} is as it was")
    assert (folder / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("module", ["typer", "simpy", "numpy"])
def test_a_signal_during_an_import_is_one_line(folder, trace, latency, number, module):
    (folder / f"{module}.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    result = command("sim", trace, "--latency", latency, "--out", folder / "run", folder=folder, PYTHONPATH=str(folder))
    status, word = ENDS[number]
    assert (result.returncode, said(result)) == (status, f"twinserve: {word}")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_signal_where_nothing_can_be_raised_ends_the_command_all_the_same(
    folder, tmp_path, trace, latency, is_compiled
):
    """In a destructor, say; compiled code, as Cython makes it, prints the exception before."""
    text = ORDER.format(number=15).replace("os.kill(os.getpid(), 15)", "Dies()")
    dies = "class Dies:\n    def __del__(self):\n        os.kill(os.getpid(), 15)\n        [n for n in range(9)]\n\n"
    if is_compiled:
        lines = dies.splitlines()
        tried = ["        try:", *("    " + line for line in lines[2:4]), "        except BaseException as error:"]
        printed = "            __import__('sys').excepthook(type(error), error, None)\n            raise\n\n"
        dies = "\n".join([*lines[:2], *tried, printed])
    (tmp_path / "order.py").write_text(text.replace("class Ends", dies + "class Ends"))
    arguments = ("sim", trace, "--latency", latency, "--scheduling-policy", f"{tmp_path / 'order.py'}:Ends")
    result = command(*arguments, folder=folder)
    assert (result.returncode, said(result)) == (143, "twinserve: terminated")


@pytest.mark.parametrize("name", ["_say", "_Signals.end", "_Signals.remove"])
def test_a_signal_behind_the_work_is_one_line_too(folder, tmp_path, trace, latency, name):
    """While it is said what was wrong, when all is done, and when nothing has to be cleaned up any more."""
    text = ORDER.format(number=0).replace("if not Ends.left", "if False") + BEHIND.format(name=name)
    (tmp_path / "order.py").write_text(text + ("raise ValueError\n" if name == "_say" else ""))
    arguments = ("sim", trace, "--latency", latency, "--scheduling-policy", f"{tmp_path / 'order.py'}:Ends")
    result = command(*arguments, folder=folder)
    assert (result.returncode, said(result)) == (143, "twinserve: terminated")


@pytest.fixture
def record(tmp_path, twinserve, trace, latency) -> Path:
    assert twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "record").code == 0
    return tmp_path / "record"


@pytest.fixture
def plan(tmp_path, trace, latency) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(f"trace = {str(trace)!r}\nlatency = {str(latency)!r}\n[grid]\nmax_num_seqs = [1, 2]\n")
    return path


@pytest.mark.parametrize(
    ("name", "limit"),
    [("sim", 900), ("sim", 4000), ("fleet", 900), ("make", 900), ("convert", 300), ("report", 900), ("sweep", 100)],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(folder, trace, latency, record, plan, name, limit):
    commands = {
        "sim": ("sim", trace, "--latency", latency, "--out", folder / "out"),
        "fleet": ("sim", trace, "--latency", latency, "--replicas", 2, "--out", folder / "out"),
        "make": ("trace", "make", "--requests", 2000, "--out", folder / "out"),
        "convert": ("trace", "convert", trace, folder / "out"),
        "report": ("report", record, "--out", folder / "out"),
        "sweep": ("sweep", plan, "--out", folder / "out", "--jobs", 1),
    }
    result = command(*commands[name], folder=folder, limit=limit)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert said(result).endswith("cannot be written: File too large")
    assert left(folder) == []
    assert list((folder / "tmp").iterdir()) == []
    again = command(*commands[name], folder=folder)
    assert again.returncode == 0, again.stderr
    assert not [entry for entry in left(folder) if entry.endswith(".partial")]


def search(name: str, trace: Path, out: Path) -> tuple[object, ...]:
    """A command that asks many simulations."""
    aim = ("--objective", "p99 TTFT <= 1 s", "--jobs", 1)
    roofline = ("--latency", "roofline:qwen3-0.6b@h100")
    return {
        "plan": ("plan", trace, *aim, "--model", "qwen3-0.6b", "--devices", "h100", "--price", 2, "--out", out),
        "capacity": ("capacity", trace, *aim, *roofline, "--tolerance", 0.5, "--out", out),
        "upgrade": ("upgrade", trace, *roofline, "--jobs", 1),
        "tune": ("tune", trace, *aim, *roofline),
    }[name]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("plan", signal.SIGTERM), ("plan", signal.SIGKILL), ("capacity", signal.SIGINT), ("upgrade", signal.SIGTERM),
        ("tune", signal.SIGINT), ("tune", signal.SIGKILL),
    ],
)  # fmt: skip
def test_a_signal_in_a_search_is_one_line_and_the_next_one_goes_on(folder, tmp_path, trace, name, number):
    arguments = search(name, trace, folder / "out")
    (tmp_path / "order.py").write_text(ORDER.format(number=int(number)))
    result = command(*arguments, "--scheduling-policy", f"{tmp_path / 'order.py'}:Ends", folder=folder)
    if number is signal.SIGKILL:
        assert result.returncode == -9
    else:
        status, word = ENDS[number]
        kept = [*(folder / "out" / "points").iterdir()] if (folder / "out").exists() else []
        told = f"; the same command goes on with what is in {folder / 'out'}" if kept else ""
        assert (result.returncode, said(result)) == (status, f"twinserve: {word}{told}")
        assert not [entry for entry in left(folder) if entry.endswith(".partial")]
    assert not {"out/results.jsonl", "out/page.html"} & {*left(folder)}
    assert list((folder / "tmp").iterdir()) == []
    if name == "plan":
        again = command(*arguments, folder=folder)
        assert again.returncode == 0, again.stderr
        assert {"out/results.jsonl", "out/page.html"} < {*left(folder)}


@pytest.mark.parametrize(("name", "limit"), [("plan", 100), ("plan", 20_000), ("capacity", 100)])
def test_a_full_disk_in_a_search_is_one_line_and_the_next_one_goes_on(folder, trace, name, limit):
    arguments = search(name, trace, folder / "out")
    result = command(*arguments, folder=folder, limit=limit)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert said(result).endswith("cannot be written: File too large")
    assert not [entry for entry in left(folder) if entry.endswith((".partial", "page.html"))]
    again = command(*arguments, folder=folder)
    assert again.returncode == 0, again.stderr


def test_a_full_disk_ends_a_server_that_records_and_what_is_whole_is_kept(folder, latency):
    words = [sys.executable, "-m", "twinserve", "serve", "--simulate", "--latency", latency, "--port", "0"]
    words += ["--num-gpu-blocks", 640, "--time-scale", 0.01, "--record", folder / "run", "--record-segment-s", 1]
    prepare = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    server = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("listening at"))
        while not (folder / "run" / "segments" / "000000").exists():
            answered(url, [[7]])
        while server.poll() is None:
            answered(url, [[number] * 5 for number in range(200)])
        lines = server.stderr.read().splitlines()
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 2, lines
    assert [line for line in lines if line.startswith("twinserve: ")] == lines[-1:]
    assert lines[-1] == f"twinserve: {folder / 'run'}: cannot be written: File too large"
    assert not [entry for entry in left(folder) if entry.endswith(".partial")]
    assert replay(load_record(folder / "run")).is_exact


def answered(url: str, prompts: list[list[int]]) -> None:
    """Ask for two tokens behind each prompt, of a server that may begin yet, or end."""
    body = json.dumps({"prompt": prompts, "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=60).read()
    except urllib.error.HTTPError as error:
        assert error.code in (500, 503), error.read()
    except (OSError, http.client.HTTPException):
        pass
    time.sleep(0.05)


def test_a_model_that_was_measured_is_printed_where_it_cannot_be_saved(tmp_path, capsys):
    from shell import fitted

    from twinserve.commands.latencies import _shown

    (tmp_path / "file").touch()
    model = fitted()
    with pytest.raises(InputError, match="cannot be written: Not a directory"), _shown(model, False):
        model.save(tmp_path / "file" / "latency.json")
    assert json.loads(capsys.readouterr().out) == model.data


@pytest.mark.parametrize("number", [None, signal.SIGKILL, *ENDS], ids=str)
def test_what_lies_beside_a_latency_is_not_there_without_it(twinserve, trace, latency, tmp_path, monkeypatch, number):
    """So the next run of the same command is refused for neither of its files."""
    from shell import fitted

    from twinserve.settings import files
    from twinserve.worlds import run

    name_too = files._name_too

    def stopped(partial: Path, path: Path) -> None:
        name_too(partial, path)
        if number is None:
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), number)

    drafts = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "synthetic_acceptance_rate": 0.5})
    drafted = tmp_path / "drafted"
    assert twinserve("sim", trace, "--latency", latency, "--speculative-config", drafts, "--out", drafted).code == 0
    model, out = fitted(), tmp_path / "out"
    monkeypatch.setattr(run, "fit_runs", lambda *given: model)
    command = ("fit", drafted, "--out", out / "new.json", "--acceptance", out / "law.json")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_name_too", stopped)
        if number is signal.SIGKILL:
            if not (child := os.fork()):
                twinserve(*command)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert left(out) == ["law.json", "law.json.partial", "new.json.partial"]
        else:
            assert twinserve(*command).code == (2 if number is None else ENDS[number][0])
            assert left(out) == []
    assert twinserve(*command).code == 0
    assert left(out) == ["law.json", "new.json"]


@pytest.mark.parametrize("arguments", ["--version", "trace stat {trace}", "trace stat {trace} --json"])
def test_results_that_cannot_be_printed_are_one_line(folder, trace, arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "twinserve", *arguments.format(trace=trace).split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, "twinserve: No space left on device\n")


def test_without_a_stderr_results_are_alone_on_stdout(folder, trace, latency):
    words = f'exec "{sys.executable}" -m twinserve sim "{trace}" --latency "{latency}" --json 2>&-'
    result = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert json.loads(result.stdout)["requests"] == 12
