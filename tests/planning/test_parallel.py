"""Who computes: this process, several, or a Ray cluster; what comes out is the same."""

import math
import os
import socket

import pytest

from twinserve.planning.parallel import Workers
from twinserve.settings.errors import InputError


def known_root(number):
    """A root of a number; those below 0 are bad input."""
    if number < 0:
        raise InputError("expected a number >= 0", field="number", value=number)
    return math.isqrt(number), os.getpid()


def roots(workers, numbers):
    with workers:
        found = dict(workers.computed(known_root, numbers))
    assert sorted(found) == list(range(len(numbers)))
    return [found[number] for number in range(len(numbers))]


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of this machine alone."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield started.address
    started.shutdown()


def workers_of(kind, request):
    if kind == "ray":
        return Workers(ray=request.getfixturevalue("cluster"))
    return Workers({"alone": 1, "processes": 2}[kind])


@pytest.mark.parametrize("kind", ["alone", "processes", "ray"])
def test_every_thing_gets_its_result_and_bad_input_is_one(kind, request):
    results = roots(workers_of(kind, request), [9, -1, 16])
    assert isinstance(results[1], InputError) and str(results[1]) == "number is -1, expected a number >= 0"
    assert [root for root, _ in (results[0], results[2])] == [3, 4]
    assert {pid == os.getpid() for _, pid in (results[0], results[2])} == {kind == "alone"}


def test_a_sweep_on_a_cluster_has_the_bytes_of_one_in_this_process(twinserve, trace, latency, tmp_path, cluster):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'trace = "{trace}"\nlatency = "{latency}"\n[grid]\nmax_num_seqs = [1, 2]\nreplicas = [1, 2]\n')
    for out, who in (("here", ("--jobs", 1)), ("there", ("--ray", cluster))):
        result = twinserve("sweep", plan, "--out", tmp_path / out, *who)
        assert result.code == 0, result.err
        assert "4 points, 4 to compute" in result.err
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
        for out in ("here", "there")
    )
    assert here == there


def test_a_capacity_is_found_on_a_cluster(twinserve, trace, latency, cluster):
    options = ("--latency", latency, "--max-num-seqs", 4, "--objective", "p99 TTFT <= 15 ms", "--json")
    here, there = (twinserve("capacity", trace, *options, *who) for who in (("--jobs", 1), ("--ray", cluster)))
    assert here.code == there.code == 0, there.err
    assert here.out == there.out != ""


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:{closed}", "127.0.0.1:many"])
def test_a_cluster_that_is_not_there_is_refused_at_once(twinserve, trace, latency, address):
    pytest.importorskip("ray", reason="ray is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = address.format(closed=taken.getsockname()[1])
        options = ("--latency", latency, "--objective", "p99 TTFT <= 15 ms")
        result = twinserve("capacity", trace, *options, "--ray", address)
    assert result.code == 2
    assert result.err.startswith(f"twinserve: ray is '{address}', expected auto, or HOST:PORT of a Ray cluster")
