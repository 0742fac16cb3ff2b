"""A loop ends before the interpreter does, whether or not anybody closes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What is registered first is called last. The loop takes a while to end, as one does that waits for a device.
SCRIPT = """
import atexit
import sys
import threading
import time


def said():
    print("core" in [thread.name for thread in threading.enumerate()])


atexit.register(said)

from twinserve.engine.live import Live
from twinserve.settings.build_core import Settings


class Slow(Live):
    def walk(self):
        while not self._is_closed:
            time.sleep(0.01)
        time.sleep(0.3)


live = Slow([lambda listener: Settings(num_gpu_blocks=4).build_core(listener=listener)])
live.start()
print("core" in [thread.name for thread in threading.enumerate()])
if sys.argv[1] == "closed":
    live.close()
"""


@pytest.mark.parametrize("how", ["closed", "left open"])
def test_the_interpreter_ends_after_the_loop(how):
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, env=surroundings, check=False
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", "False"], "")
