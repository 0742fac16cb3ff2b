"""Profiles: read back as they were kept, or refused with the line and the field."""

import gzip
import json

import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.fit import StepSample
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepFeatures
from twinserve.sim.profiles import Profile

STEPS = [
    StepFeatures(0, 3, 25, 1, 130, 700, 3, arrived=2, left=1, longest_decode=90, prompts=((16, 20), (0, 5))),
    StepFeatures(0, 2, 0, 2, 80, 80, 2, longest_decode=50),
]
PROFILE = Profile(
    {"model": "tiny", "device": "none"},
    Kernels(decodes=(1, 2, 4), decode_cuts=((1, 8, 128, 128),)),
    [StepSample(step, 70, 1000 + number, None, 50, 20) for number, step in enumerate(STEPS)],
)


def test_a_profile_is_read_back_as_it_was_kept_and_equal_ones_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        PROFILE.save(tmp_path / name)
    assert Profile.load(tmp_path / "one") == PROFILE
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert Profile.load(tmp_path / "one").identity == PROFILE.identity
    assert Profile(PROFILE.about, PROFILE.kernels, PROFILE.samples[:1]).identity != PROFILE.identity
    with pytest.raises(InputError, match="exists already"):
        PROFILE.save(tmp_path / "one")


@pytest.mark.parametrize(
    ("line", "field", "value", "words"),
    [
        (0, "schema", "twinserve-latency/2", "schema is 'twinserve-latency/2', expected \"twinserve-profile/1\""),
        (0, "about", [], "about is [], expected an object"),
        (0, "kernels", {"rows": 3}, "kernels is {'rows': 3}, expected sizes by the names"),
        (2, "device_ns", -1, "bad.jsonl:3: device_ns is -1, expected an integer >= 0"),
        (1, "prompts", [[1]], "bad.jsonl:2: prompts is [[1]], expected a list of lists of 2 integers"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, line, field, value, words):
    PROFILE.save(tmp_path / "good")
    rows = [json.loads(row) for row in gzip.decompress((tmp_path / "good").read_bytes()).splitlines()]
    rows[line][field] = value
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        Profile.load(path)
    assert words in str(error.value)


def test_an_empty_profile_is_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(InputError, match="is empty, expected a profile"):
        Profile.load(tmp_path / "empty")


def test_steps_with_drafts_are_kept_with_what_they_verify_and_propose_and_others_as_ever(tmp_path):
    drafted = STEPS[0]._replace(asked=3, drafting=2, drafting_tokens=140, verifying=1, drafts=3)
    kernels = Kernels(decodes=(1, 2), single=4, waits=True)
    profile = Profile({}, kernels, [StepSample(drafted, 70, 1000, None, 50, 20), PROFILE.samples[1]])
    profile.save(tmp_path / "profile")
    assert Profile.load(tmp_path / "profile") == profile
    _, first, second = (json.loads(row) for row in gzip.decompress((tmp_path / "profile").read_bytes()).splitlines())
    assert first["drafts"] == 3 and "drafts" not in second
    first["verifying"] = -1
    head = {"schema": "twinserve-profile/1", "about": {}, "kernels": {}}
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, (head, first))))
    with pytest.raises(InputError, match="bad.jsonl:2: verifying is -1, expected an integer >= 0"):
        Profile.load(tmp_path / "bad.jsonl")
