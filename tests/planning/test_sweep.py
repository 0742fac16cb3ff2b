"""Sweeps: what a plan asks for, and that each point is computed once, whoever computes and whatever stops it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from twinserve.planning.parallel import Workers
from twinserve.planning.point import Job, Point, compute
from twinserve.planning.sweep import Store, load_plan, opened, run_points
from twinserve.settings.errors import InputError
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace
from twinserve.worlds import workload
from twinserve.worlds.workload import make_workload

PLAN = """
trace = "{trace}"
latency = "{latency}"
rate = 20.0
arrivals = "poisson"
seeds = 2
objective = "p99 TTFT <= 20 ms and p99 TPOT <= 5 ms"
price_per_gpu_hour = 2.5

[grid]
max_num_seqs = [1, 2, 8]
composition = ["mixed", "prefill-first"]
"""


@pytest.fixture
def plan(tmp_path, trace, latency):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(trace=trace, latency=latency))
    return path


def assert_refused(result, *words):
    assert (result.code, result.out) == (2, ""), (result.out, result.err)
    line = result.err.splitlines()[-1]
    assert line.startswith("twinserve: ")
    for word in words:
        assert word in line, line


# --- plans ---


def test_every_entry_of_the_list_goes_with_every_combination_of_the_grid(trace, latency):
    values = {"trace": str(trace), "latency": str(latency), "block_size": 32}
    values["list"] = [{"composition": "mixed", "max_num_seqs": 4}, {"composition": "prefill-first"}]
    values["grid"] = {"limit": [3, 6], "replicas": [1, 2]}
    cases = load_plan(None, values).cases
    assert [case.varied for case in cases] == [
        entry | {"limit": limit, "replicas": replicas}
        for entry in values["list"]
        for limit in (3, 6)
        for replicas in (1, 2)
    ]
    point = cases[1].points[0]
    assert (point.settings.max_num_seqs, point.settings.block_size) == (4, 32)
    assert (point.trace_options.limit, point.fleet.num_replicas) == (3, 2)


def test_a_rate_scales_the_arrivals_of_the_trace_or_draws_others(trace, latency):
    own = Point.of({"trace": str(trace), "latency": str(latency)})
    lengths = [(request.prompt_tokens, request.max_tokens) for request in own.workload().requests]
    scaled = Point.of({"trace": str(trace), "rate": 2 * own.own_rate()}).workload().requests
    times = [request.arrival_ns for request in own.workload().requests]
    assert [request.arrival_ns for request in scaled] == pytest.approx([time / 2 for time in times], abs=1)
    drawn = [
        Point.of({"trace": str(trace), "rate": 5.0, "arrivals": "poisson", "seed": seed}).workload().requests
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted((request.prompt_tokens, request.max_tokens) for request in drawn[2]) == sorted(lengths)


def test_a_rate_is_that_of_the_requests_that_are_left_and_the_trace_is_changed_once(trace, monkeypatch):
    fields = {"trace": str(trace), "limit": 6, "max_output_tokens": 4}
    alone = Point.of(fields)
    scale = 3.0 / alone.own_rate()
    made = []
    monkeypatch.setattr(workload, "make_workload", lambda *whole: made.append(whole) or make_workload(*whole))
    found = Point.of(fields | {"rate": 3.0}).workload()
    assert len(made) == 1
    wanted = Point.of(fields | {"rate_scale": scale}).workload()
    assert found.requests == wanted.requests and len(found.requests) == 6
    assert (found.capped, found.dropped, found.epoch_ns) == (wanted.capped, wanted.dropped, wanted.epoch_ns)
    by_name = [{entry["transform"]: entry for entry in one.facts["transforms"]} for one in (found, wanted)]
    assert by_name[0] == by_name[1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rate = 20.0", "rate = -1.0", "rate is -1.0, expected: Input should be greater than 0"),
        ("rate = 20.0", 'rate = "fast"', "rate is 'fast', expected: "),
        ("rate = 20.0", "rate = 20.0\nlike = 0.33", "like is 0.33, expected: Input should be a valid string"),
        ("[1, 2, 8]", "[1]\nlatency = [1e308]", "latency is 1e+308, expected: Input should be a valid string"),
        ("rate = 20.0", "speed = 3", "speed is 3, expected trace, rate, arrivals"),
        ("rate = 20.0", "", "arrivals is 'poisson', expected a rate"),
        ("rate = 20.0", "rate = 20.0\nrate_scale = 2.0", "rate_scale is 2.0, expected none of it beside rate"),
        ("seeds = 2", "seeds = 0", "seeds is 0, expected an integer >= 1"),
        ('arrivals = "poisson"', "", "seeds is 2, expected 1, as nothing here is random"),
        ("seeds = 2", "seeds =", "expected TOML: Invalid value (at line 6, column 8)"),
        ("p99 TTFT <=", "p99 TTFT =", "objective is 'p99 TTFT = 20 ms', expected terms"),
        ("2.5", "-2.5", "price_per_gpu_hour is -2.5, expected a number > 0"),
        ("[1, 2, 8]", "4", "grid.max_num_seqs is 4, expected a list of values"),
        ("[1, 2, 8]", "[]", "grid.max_num_seqs is [], expected a list of values"),
        ("[1, 2, 8]", "[0]", "max_num_seqs is 0, expected: "),
        ("[grid]", "[[grid]]", "grid is [{"),
        ("[grid]", "[[list]]\nmax_num_seqs = 2\n[grid]", "list has max_num_seqs"),
        ('"mixed", ', '"mixd", ', "composition is 'mixd', expected: "),
    ],
)
def test_a_bad_plan_is_refused_in_a_line_that_names_the_file(twinserve, plan, tmp_path, old, new, words):
    text = plan.read_text()
    assert old in text
    plan.write_text(text.replace(old, new))
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), f"{plan}: ", words)
    assert not (tmp_path / "out").exists()


def test_what_a_plan_names_has_to_be_there(twinserve, plan, tmp_path, trace, latency):
    assert_refused(twinserve("sweep", tmp_path / "none.toml", "--out", tmp_path / "out"), "none.toml: cannot be read")
    trace.rename(tmp_path / "moved")
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), str(trace), "cannot be read")
    (tmp_path / "moved").rename(trace)
    latency.unlink()
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), "latency is '", "expected a file")


def test_a_plan_has_fleets_of_unlike_replicas_that_die(twinserve, tmp_path, trace, latency):
    path = tmp_path / "plan.toml"
    path.write_text(
        f'trace = "{trace}"\nlatency = "{latency}"\nall_at_zero = true\ndie = ["0:0.005:0.2"]\n'
        '[[group]]\nreplicas = 2\n[[group]]\nlatency = "roofline:llama-3-8b@h100:tp=2"\nmax_num_seqs = 4\n'
    )
    result = twinserve("sweep", path, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)
    assert [group["count"] for group in row["identities"]["replicas"]] == [2, 1]
    assert row["summary"]["finished"] == 12 and row["summary"]["retried"] > 0
    assert load_plan(path).points[0].gpus() == {"": 2, "h100": 2}


# --- results ---


def test_a_sweep_prints_and_writes_what_it_found(twinserve, plan, tmp_path):
    out = tmp_path / "out"
    result = twinserve("sweep", plan, "--out", out, "--jobs", 1, "--json")
    assert result.code == 0, result.err
    assert "12 points, 12 to compute" in result.err
    assert result.out == (out / "results.jsonl").read_text()
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["varied"]["max_num_seqs"], row["point"]["seed"]) for row in rows[::2]] == [
        (1, 0), (1, 0), (2, 0), (2, 0), (8, 0), (8, 0),
    ]  # fmt: skip
    for row in rows:
        assert row["summary"]["finished"] == 12 and "wall_s" not in row["summary"]
        cost = 2.5 / 3600 / row["summary"]["total_tok_s"] * 1e6
        assert row["cost"]["total"] == pytest.approx(cost)
        assert ("p99 TTFT <= 20 ms" in row["missed"]) is (row["summary"]["ttft_s"]["p99"] > 0.02)
    assert len({row["missed"] == [] for row in rows}) == 2, "some keep the objective, some do not"
    table = twinserve("sweep", plan, "--out", out)
    assert "0 to compute" in table.err and "cost of 1M" in table.out and "prefill-first" in table.out


def test_a_point_is_what_sim_says(twinserve, plan, tmp_path, trace, latency):
    plan.write_text(f'trace = "{trace}"\nlatency = "{latency}"\nmax_num_seqs = 2\nreplicas = 2\nrouter = "random"\n')
    (row,) = map(json.loads, twinserve("sweep", plan, "--out", tmp_path / "out", "--json").out.splitlines())
    options = ("--latency", latency, "--max-num-seqs", 2, "--replicas", 2, "--router", "random", "--json")
    summary = json.loads(twinserve("sim", trace, *options).out)
    del summary["wall_s"]
    assert row["summary"] == summary


def test_the_bytes_do_not_depend_on_who_computes(twinserve, plan, tmp_path):
    outs = []
    for jobs in (1, 2):
        out = tmp_path / f"out{jobs}"
        assert twinserve("sweep", plan, "--out", out, "--jobs", jobs).code == 0
        outs.append({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert outs[0] == outs[1] and len(outs[0]) == 12 + 3


def test_a_plan_without_a_trace_takes_the_one_that_is_given(twinserve, plan, tmp_path, trace):
    whole = twinserve("sweep", plan, "--out", tmp_path / "whole", "--jobs", 1, "--json")
    plan.write_text("\n".join(line for line in plan.read_text().splitlines() if not line.startswith("trace")))
    refused = twinserve("sweep", plan, "--out", tmp_path / "none")
    assert_refused(refused, f"{plan}: trace is missing, expected a file or folder, in a plan or on the command line")
    given = twinserve("sweep", plan, trace, "--out", tmp_path / "given", "--jobs", 1, "--json")
    assert (given.code, given.out) == (0, whole.out)


@pytest.mark.parametrize("arrivals", ["trace", "poisson"])
def test_a_simulation_at_a_rate_is_the_point_of_a_sweep_at_it(twinserve, trace, latency, arrivals):
    how = {"rate": 7.0, "arrivals": arrivals, "limit": 6, "session_seed": 3}
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = twinserve("sim", trace, "--latency", latency, *options, "--json")
    assert result.code == 0, result.err
    found = compute(Job.of(Point.of({"trace": str(trace), "latency": str(latency)} | how)))["summary"]
    summary = json.loads(result.out)
    assert {name: summary[name] for name in found} == found and summary["requests"] == 6


def test_a_folder_that_is_no_sweeps_is_refused_and_kept(twinserve, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert_refused(twinserve("sweep", plan, "--out", out), str(out), "expected a new name")
    assert [path.name for path in out.iterdir()] == ["mine"]


# --- each point once ---


def points_of(plan):
    return load_plan(plan).points


def test_equal_points_are_computed_once_and_finished_ones_not_again(plan):
    points, asked = points_of(plan), []

    def counted(job):
        asked.append(job.key)
        return compute(job)

    store = Store()
    first = run_points([*points[:3], *points[:3]], store, Workers(), compute=counted)
    assert first[:3] == first[3:] and len(asked) == 3
    again = run_points(points, store, Workers(), compute=counted)
    assert again[:3] == first[:3] and len(asked) == len(set(asked)) == len(points)


def test_all_that_decides_a_result_is_in_its_key(plan, trace, latency, tmp_path, monkeypatch):
    values = {"trace": str(trace), "latency": str(latency)}
    changes = [{}, {"seed": 1}, {"max_num_seqs": 2}, {"limit": 3}, {"rate": 3.0}, {"replicas": 2}]
    changes += [{"replicas": 2, "router": "random"}, {"latency": "roofline:llama-3-8b@h100"}]
    keys = [Job.of(Point.of(values | change)).key for change in changes]
    assert len(set(keys)) == len(changes)
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(trace.read_bytes())
    assert Job.of(Point.of(values | {"trace": str(copied)})).key == keys[0], "the name of the file decides nothing"
    monkeypatch.setattr("twinserve.planning.point.code_identity", lambda: "other code")
    assert Job.of(Point.of(values)).key != keys[0]


def test_what_changed_since_it_was_planned_is_not_computed(plan, trace):
    job = Job.of(points_of(plan)[0])
    changed = job._replace(inputs=job.inputs | {"trace": "of another file"})
    with pytest.raises(InputError, match="the trace is '.*', expected of another file, as planned"):
        compute(changed)


def test_what_can_be_computed_is_kept_where_something_cannot(plan, tmp_path):
    points = points_of(plan)

    def fails_once(job):
        if job.point == points[1]:
            raise InputError("cannot be done")
        return compute(job)

    with opened(tmp_path / "out") as store:
        with pytest.raises(InputError, match="cannot be done"):
            run_points(points[:3], store, Workers(), compute=fails_once)
        assert [store.get(Job.of(point)) is not None for point in points[:3]] == [True, False, True]


def test_a_folder_serves_one_process_at_a_time(twinserve, plan, tmp_path):
    with opened(tmp_path / "out"):
        assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), "is in use by another sweep")
    assert twinserve("sweep", plan, "--out", tmp_path / "out", "--jobs", 1).code == 0


def test_a_damaged_point_is_refused_by_its_name(twinserve, plan, tmp_path):
    twinserve("sweep", plan, "--out", tmp_path / "out", "--jobs", 1)
    path = next((tmp_path / "out" / "points").iterdir())
    path.write_text(path.read_text()[:-20])
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), str(path), "remove it")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("summary",), None), (("summary", "ttft_s"), None), (("summary", "ttft_s", "p99"), "1"),
        (("summary", "attainment"), None), (("summary", "attainment", "share"), [1]), (("latency",), 5),
        (("span_s",), "x"), (("transforms",), {}), (("inputs",), []), (("beyond_fit",), "much"),
    ],
)  # fmt: skip
def test_a_point_of_which_a_part_is_missing_or_of_another_kind_is_refused_by_its_name(tmp_path, trace, place, value):
    limits = {"limits": "TTFT <= 1 s", "limit": 3}
    job = Job.of(Point.of({"trace": str(trace), "latency": "smollm2-135m-cpu-2-threads"} | limits))
    with opened(tmp_path / "out") as store:
        store.put(job, compute(job))
    path = next((tmp_path / "out" / "points").iterdir())
    result = json.loads(path.read_text())
    within = result
    for name in place[:-1]:
        within = within[name]
    within.pop(place[-1], None)
    if value is not None:
        within[place[-1]] = value
    with opened(tmp_path / "out") as store:
        path.write_text(json.dumps(result))
        with pytest.raises(InputError, match=rf"{path}: is not what a sweep wrote, remove it"):
            store.get(job)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_where_it_was(twinserve, plan, tmp_path, jobs):
    """A longer trace keeps the process busy until it is killed; what it had finished then is not touched again."""
    longer = tmp_path / "longer.jsonl"
    assert twinserve("trace", "make", "--out", longer, "--requests", 80).code == 0
    text = plan.read_text().replace("[1, 2, 8]", "[1, 2, 3, 4, 5, 6, 7, 8]")
    plan.write_text(text.replace("trace.jsonl", longer.name))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "twinserve", "sweep", plan, "--out", out, "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(out.glob("points/*.json"))) < 3:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat() for path in out.glob("points/*.json")}
    assert 3 <= len(before) < 32, "it was killed on the way"
    result = twinserve("sweep", plan, "--out", out, "--jobs", jobs)
    assert result.code == 0, result.err
    assert f"32 points, {32 - len(before)} to compute" in result.err
    after = {path.name: path.stat() for path in out.glob("points/*.json")}
    assert len(after) == 32
    for name, stat in before.items():
        assert (after[name].st_ino, after[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    whole = tmp_path / "whole"
    twinserve("sweep", plan, "--out", whole, "--jobs", 2)
    assert (whole / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


# --- rates of sessions ---


def test_a_rate_has_sessions_begin_denser_as_far_as_there_are_enough(tmp_path):
    path = tmp_path / "sessions.jsonl"
    made = generate(
        seed=1,
        num_requests=40,
        rate=1.0,
        prompt_tokens=LengthSpec.parse("fixed:20"),
        output_tokens=LengthSpec.parse("fixed:4"),
        turns=4,
        think_time_s=5.0,
    )
    write_trace(path, made, {})
    with pytest.raises(InputError, match="arrivals is 'trace', expected 'poisson', which has sessions begin denser"):
        Point.of({"trace": str(path), "rate": 2.0}).workload()
    begins = [r.arrival_ns for r in made if r.after is None]
    longest_s = max(r.arrival_ns - begins[r.session or 0] for r in made) / 1e9
    most = len(made) / longest_s
    assert Point.of({"trace": str(path), "rate": most * 0.99, "arrivals": "poisson"}).workload().requests
    with pytest.raises(InputError, match=r"rate is .*, expected at most .*: the 10 sessions would begin within"):
        Point.of({"trace": str(path), "rate": most * 1.01, "arrivals": "poisson"}).workload()


def test_a_fit_of_a_model_over_several_devices_is_paid_for_each_of_them(twinserve, tmp_path, trace, latency):
    """It was counted as one GPU, so two H200s that serve a model together cost the price of one."""
    data = json.loads(latency.read_text())
    both = tmp_path / "both.json"
    both.write_text(json.dumps(data | {"about": data["about"] | {"device": "2 x H200", "tensor_parallel_size": 2}}))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps(data | {"about": data["about"] | {"device": "cpu", "tensor_parallel_size": 3}}))
    path = tmp_path / "plan.toml"
    path.write_text(
        f'trace = "{trace}"\nall_at_zero = true\nprice_per_gpu_hour = {{ h200 = 4.0, "" = 1.0 }}\n'
        f'[[group]]\nreplicas = 2\nlatency = "{both}"\n[[group]]\nlatency = "{unknown}"\n'
    )
    assert load_plan(path).points[0].gpus() == {"h200": 4, "": 3}
    result = twinserve("sweep", path, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)
    assert row["cost"]["total"] == pytest.approx(19.0 / 3600 / row["summary"]["total_tok_s"] * 1e6)
