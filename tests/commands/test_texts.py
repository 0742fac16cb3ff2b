"""Texts are UTF-8 in every locale, with a byte order mark or without, whatever ends their lines."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from valid import DEVICE, DRAFTS, TRACES, json_lines

LOCALES = {
    "utf8": {"LC_ALL": "C.UTF-8"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
}
# Runs commands one after the other, each in the process itself; what each printed, and its status, as JSON.
DRIVER = """
import contextlib, io, json, os, sys
from twinserve.cli import main

said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["twinserve", *(os.fsdecode(word.encode()) for word in arguments)]
    # What is printed is kept as the bytes that are sent.
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=sys.__stdout__.encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as end:
            status = end.code
    for stream in streams:
        stream.flush()
    said.append([status, *(stream.buffer.getvalue().decode("utf-8") for stream in streams)])
sys.__stdout__.buffer.write(json.dumps(said).encode())
"""
ORDER = '"""Café first."""\nfrom twinserve.policies.orders import FirstCome\n\n\nclass Café(FirstCome):\n    pass\n'


@pytest.fixture
def folder(tmp_path, latency) -> Path:
    """Files of all kinds with letters beyond ASCII in their names and in what they say."""
    (made := tmp_path / "é").mkdir()
    rows = [{"arrival_ns": n, "prompt": [[n, 0, 40]], "max_tokens": 5, "salt": "ß", "tenant": "日本"} for n in range(6)]
    (made / "trace é.jsonl").write_text(json_lines([{"format": "twinserve-trace/1", "made_by": "é"}, *rows]), "utf-8")
    (made / "trace é.jsonl").write_text((made / "trace é.jsonl").read_text().replace("\\u00df", "ß"), "utf-8")
    fitted = json.loads(latency.read_text())
    fitted["about"]["model"] = "modèle"
    (made / "latency.json").write_text(json.dumps(fitted, ensure_ascii=False), "utf-8")
    (made / "order.py").write_text(ORDER, "utf-8")
    text = "# réglages\nmax_num_seqs = 3\nscheduling_policy = 'order.py:Café'\n"
    (made / "settings.toml").write_text(text, "utf-8")
    (made / "device.toml").write_text("# appareil: é\n" + DEVICE, "utf-8")
    text = f"# é\ntrace = {str(made / 'trace é.jsonl')!r}\nlatency = {str(made / 'latency.json')!r}\n"
    (made / "plan.toml").write_text(text + "[grid]\nmax_num_seqs = [1, 2]\n", "utf-8")
    return made


def timeless(content: bytes | str) -> str:
    """A text without the seconds that a command took, and without the minute of a record's making."""
    text = content if isinstance(content, str) else content.decode()
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", text)
    return re.sub(r'(wall[_ ]s"?:? *)[0-9.]+', r"\1", text)


def commands(folder: Path) -> list[list[str]]:
    """Commands that read all of these, and write."""
    trace, out = str(folder / "trace é.jsonl"), folder / "out"
    out.mkdir()
    fitted = ["--latency", str(folder / "latency.json")]
    record, aim = str(out / "run é"), ["--objective", "p99 TTFT <= 1 s", "--price", "2", "--jobs", "1", "--limit", "3"]
    roofline = f"roofline:qwen3-0.6b@{folder / 'device.toml'}"
    return [
        ["trace", "stat", trace],
        ["trace", "convert", trace, str(out / "azure é.csv"), "--format", "azure"],
        ["trace", "make", "--out", str(out / "made é.jsonl"), "--requests", "5"],
        ["sim", trace, *fitted, "--config", str(folder / "settings.toml"), "--out", record, "--json"],
        ["replay", record],
        ["compare", record, record],
        ["report", record, "--out", str(out / "report é.html")],
        ["sweep", str(folder / "plan.toml"), "--out", str(out / "sweep é"), "--jobs", "1"],
        ["plan", trace, "--model", "qwen3-0.6b", "--devices", str(folder / "device.toml"), *aim],
        ["upgrade", trace, "--latency", roofline, "--jobs", "1", "--limit", "3"],
        ["model", "describe", roofline.removeprefix("roofline:")],
        ["sim", str(folder / "nowhere é.jsonl")],
        ["sim", trace, "--scheduling-policy", f"{folder / 'order.py'}:Thé"],
    ]


def test_commands_read_write_and_say_the_same_in_every_locale(folder):
    found = {}
    for name, environment in LOCALES.items():
        given = json.dumps(commands(folder))
        result = subprocess.run(
            [sys.executable, "-c", DRIVER, given], capture_output=True, env=os.environ | environment, check=False
        )
        assert result.returncode == 0, result.stderr.decode()
        said = [[status, *map(timeless, texts)] for status, *texts in json.loads(result.stdout)]
        assert [one[0] for one in said] == [0] * 11 + [2] * 2, [one[2] for one in said]
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        found[name] = said, {str(path.relative_to(folder)): timeless(path.read_bytes()) for path in files}
        shutil.rmtree(folder / "out")
    words = "".join("".join(one[1:]) for one in found["utf8"][0])
    assert "é" in words and "Thé" in words
    for name in ("ascii", "latin-1"):
        assert found[name][0] == found["utf8"][0]
        assert found[name][1].keys() == found["utf8"][1].keys()
        for path, content in found["utf8"][1].items():
            assert found[name][1][path] == content, path


def marked(path: Path) -> None:
    """Give a text a byte order mark, and lines that end in CRLF."""
    content = path.read_bytes()
    is_packed = content[:2] == b"\x1f\x8b"
    text = gzip.decompress(content) if is_packed else content
    text = b"\xef\xbb\xbf" + text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(gzip.compress(text) if is_packed else text)


@pytest.mark.parametrize("format", TRACES)
def test_a_trace_may_have_a_byte_order_mark_and_crlf(twinserve, tmp_path, format):
    path = tmp_path / "trace"
    path.write_text(TRACES[format])
    plain = twinserve("trace", "stat", path, "--json")
    marked(path)
    found = twinserve("trace", "stat", path, "--json")
    assert plain.code == found.code == 0, (plain.err, found.err)
    one, other = json.loads(plain.out), json.loads(found.out)
    assert one["trace"].pop("sha256") != other["trace"].pop("sha256")
    assert one == other


@pytest.mark.parametrize(
    "name", ["settings.toml", "latency.json", "order.py", "plan.toml", "device.toml", "config.json"]
)
def test_what_settings_plans_latencies_devices_and_shapes_say_may_be_so_too(twinserve, folder, name):
    import twinserve as package

    shape = Path(package.__file__).parent / "data" / "shapes" / "qwen3-0.6b" / "config.json"
    shutil.copy(shape, folder / "config.json")

    def summary() -> list[str]:
        trace = folder / "trace é.jsonl"
        done = [
            twinserve(
                "sim", trace, "--latency", folder / "latency.json", "--config", folder / "settings.toml", "--json"
            ),
            twinserve(
                "capacity", "--plan", folder / "plan.toml", "--objective", "p99 TTFT <= 9 s", "--jobs", 1, "--json"
            ),
            twinserve("model", "describe", f"{folder / 'config.json'}@{folder / 'device.toml'}", "--json"),
        ]
        assert [one.code for one in done] == [0, 0, 0], done
        return [timeless(one.out) for one in done]

    plain = summary()
    marked(folder / name)
    assert summary()[name == "latency.json" :] == plain[name == "latency.json" :]


def test_records_profiles_and_laws_may_be_so_too(twinserve, tmp_path, trace, latency):
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"by_position": [0.8, 0.6]}))
    drafts = json.dumps(DRAFTS | {"acceptance": str(law)})
    drafted = ("sim", trace, "--latency", latency, "--speculative-config", drafts)
    assert twinserve(*drafted, "--out", tmp_path / "run").code == 0
    plain = timeless(twinserve(*drafted, "--json").out)
    for path in (law, *(tmp_path / "run").iterdir()):
        marked(path)
    assert timeless(twinserve(*drafted, "--json").out) == plain
    for command in (("replay",), ("report", "--out", tmp_path / "page.html")):
        result = twinserve(command[0], tmp_path / "run", *command[1:])
        assert result.code == 0, result.err
