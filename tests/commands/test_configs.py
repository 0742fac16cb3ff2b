"""Files of settings: one to begin with, which sets nothing, and what a file is told to say."""

from __future__ import annotations

import re
import tomllib

from twinserve.commands.configs import TABLES
from twinserve.settings.build_core import Settings


def test_a_file_to_begin_with_sets_nothing_and_names_every_field_with_its_default(twinserve, tmp_path):
    path = tmp_path / "mine.toml"
    assert twinserve("config", "init", path).out == f"{path}\n"
    text = path.read_text()
    assert tomllib.loads(text) == {"engine": {}, "fleet": {}, "serve": {}}
    assert twinserve("config", "check", path).out == ""
    given = tomllib.loads(re.sub(r"^# (\w+ = .+)$", r"\1", text, flags=re.MULTILINE))
    for name, model in {"": Settings, **TABLES}.items():
        fields = {field: info for field, info in model.model_fields.items() if info.description is not None}
        said = given[name] if name else {field: value for field, value in given.items() if field not in TABLES}
        assert said == {field: info.default for field, info in fields.items() if info.default is not None}
        assert all(re.search(rf"^# {field} = ", text, re.MULTILINE) for field in fields)


def test_with_every_default_set_it_is_a_file_that_the_simulator_takes(twinserve, trace, latency, tmp_path):
    path = tmp_path / "mine.toml"
    twinserve("config", "init", path)
    path.write_text(re.sub(r"^# (\w+ = .+)$", r"\1", path.read_text(), flags=re.MULTILINE))
    plain, chosen = (
        twinserve("sim", trace, "--latency", latency, "--json", *more) for more in ((), ("--config", path))
    )
    assert chosen.code == 0, chosen.err
    assert plain.out.split('"wall_s"')[0] == chosen.out.split('"wall_s"')[0]


def test_a_check_prints_what_is_set_and_refuses_what_cannot_be(twinserve, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('max_num_seqs = 8\n[engine]\ndtype = "bfloat16"\n[serve]\nport = 9000\n')
    result = twinserve("config", "check", path)
    assert (result.code, result.out) == (0, 'max_num_seqs = 8\nengine.dtype = "bfloat16"\nserve.port = 9000\n')
    for text, words in (
        ("max_num_seqs = 0\n", "max_num_seqs is 0, expected"),
        ("[engine]\ndtyp = 1\n", "engine.dtyp is 1, there is no such field, did you mean dtype?"),
        ("[sever]\nport = 1\n", "sever is {'port': 1}, there is no such field"),
        ("a = = 1\n", "expected TOML"),
    ):
        path.write_text(text)
        result = twinserve("config", "check", path)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result.err


def test_a_file_that_exists_is_kept(twinserve, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("max_num_seqs = 8\n")
    assert twinserve("config", "init", path).code == 2
    assert path.read_text() == "max_num_seqs = 8\n"
