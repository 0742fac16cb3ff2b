"""The command line: how a command ends, in any second, with one line and the right status."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class _Stopped(BaseException):
    """A signal has come; no KeyboardInterrupt, after which Python may end by SIGINT whatever status it is given."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)


class _Signals:
    """Ends a command by a signal: at once while it has nothing to clean up, then by an exception.

    So SIGTERM, which schedulers and containers send, leaves as little behind as Ctrl-C does.
    """

    def __init__(self) -> None:
        self._missed = signal.SIGINT
        self._before: dict[signal.Signals, object] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._at_once) for number in _WORDS}

    def begin(self) -> None:
        """From now on there is something to clean up."""
        for number in self._before:
            signal.signal(number, self._by_exception)
        if self._before:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
        sys.unraisablehook, sys.excepthook = self._again, _told_later

    def end(self) -> None:
        """There is nothing to clean up any more."""
        for number in _WORDS.keys() & self._before.keys():
            signal.signal(number, self._at_once)

    def remove(self) -> None:
        sys.unraisablehook, sys.excepthook = sys.__unraisablehook__, sys.__excepthook__
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """A signal that came where nothing can be raised, in a destructor say, comes once more."""
        if isinstance(unraisable.exc_value, _Stopped):
            self._missed = unraisable.exc_value.number
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(unraisable)

    def _at_once(self, number: int, _: FrameType | None) -> None:
        os.write(2, f"twinserve: {_WORDS[signal.Signals(number)]}\n".encode())
        os._exit(128 + number)

    def _late(self, _: int, __: FrameType | None) -> None:
        raise _Stopped(self._missed)

    def _by_exception(self, number: int, _: FrameType | None) -> None:
        raise _Stopped(number)


def _told_later(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Compiled code where nothing can be raised first prints what was, and then says so."""
    if not isinstance(error, _Stopped):
        sys.__excepthook__(kind, error, trace)


def main() -> None:
    """Run a command; bad input is one line on stderr and exit status 2, a step that fails one and exit status 1."""
    _speak_utf8()
    # An interpreter that ends looks for garbage in all that was ever imported, for a second and more with torch.
    atexit.register(gc.freeze)
    # Pydantic looks for plugins in what every installed package says of itself.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    signals = _Signals()
    signals.install()
    try:
        code = _run(signals)
        signals.end()
    except _Stopped as stopped:  # when it was saying how it had ended, or had
        code = _say(_WORDS[stopped.number], 128 + stopped.number)
    finally:
        signals.remove()
    sys.exit(code)


def _speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding.

    Names of files that a plan holds, say, are UTF-8 whatever the locale, and Python can open no others than its own.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _run(signals: _Signals) -> int:
    """Run a command; its exit status."""
    import typer

    from twinserve.settings.errors import InputError, RunError

    # What the command-line parser raises for every misuse.
    usage_error: Any = typer.BadParameter.__mro__[1]
    try:
        from twinserve.commands.app import parser

        signals.begin()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        code = parser()(prog_name="twinserve", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return int(code or 0)
    except InputError as error:
        return _say(error, 2)
    except usage_error as error:
        return _say(error.format_message() + _where_help_is(error), 2)
    except _Stopped as stopped:
        words = [_WORDS[stopped.number], *getattr(stopped, "__notes__", [])]
        return _say("; ".join(words), 128 + stopped.number)
    except (KeyboardInterrupt, typer.Abort):
        return _say(_WORDS[signal.SIGINT], 128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read what is printed wants no more of it; the parser, which meets it first, has the same status.
        _drop_output()
        return 1
    except RunError as error:
        return _say(error, 1)
    except OSError as error:
        _drop_output()
        where = "" if error.filename is None else f"{error.filename}: "
        # A name that no file can have is bad input.
        return _say(f"{where}{error.strerror or error}", 2 if error.errno == errno.ENAMETOOLONG else 1)
    except MemoryError as error:
        return _say(f"out of memory: {error}", 1)


def _where_help_is(error: Any) -> str:
    """How to read what the misused command takes."""
    return f" (see {error.ctx.command_path} -h)" if error.ctx is not None else ""


def _say(what: object, code: int) -> int:
    """Say on stderr, where there is one, how a command ends."""
    if sys.stderr is not None:
        from twinserve.settings.errors import printable

        print("twinserve:", printable(" ".join(str(what).split())), file=sys.stderr)
    return code


def _drop_output() -> None:
    """Have the interpreter not try again, as it ends, to write what could not be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
