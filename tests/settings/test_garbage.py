"""When circular garbage is looked for."""

from __future__ import annotations

import gc

from twinserve.settings.garbage import rare_collections


def test_garbage_is_looked_for_as_usual_once_the_last_has_left():
    usual = gc.get_threshold()
    with rare_collections:
        with rare_collections:
            assert gc.get_threshold()[0] == 100_000 and gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] == 100_000, "another is still inside"
    assert gc.get_threshold() == usual and gc.get_freeze_count() == 0
