"""Files and folders that are written: there whole under their name, or not at all, whatever ends the work on the way.

Each grows under its name with `.partial` behind it, which its process holds a lock on. What a process that is dead has
left there is removed; what a living one is writing is respected; a symbolic link is never followed.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from twinserve.settings.errors import InputError

SUFFIX = ".partial"
REPLACED = "replaced"
"""Beside what takes its place, a folder that is replaced."""
Place = TypeVar("Place", Path, "Path | None")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has an error of the operating system say in one line that `path` cannot be written.

    Raises:
        InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", path=path) from error


@contextmanager
def whole_file(path: Path, *, replaces: bool = False) -> Iterator[IO[bytes]]:
    """A file to be written, which gets its name when all is in it and on the disk.

    Args:
        replaces: what has the name already is replaced; otherwise it is refused.

    Raises:
        InputError: `path` exists, another process is writing it, or it cannot be written.
    """
    if not replaces:
        refuse_existing(path)
    with _growing(path) as file:
        yield file
        _settle(file)
        if not replaces:
            refuse_existing(path)
        _partial(path).replace(path)
        _sync(path.parent)


@contextmanager
def _growing(path: Path) -> Iterator[IO[bytes]]:
    """A file by its partial name, which this process holds, and which is gone if it is not given its own.

    Raises:
        InputError: another process is writing it, or it cannot be written.
    """
    partial = _partial(path)
    with writing(path):
        _make(path.parent)
        _clear(partial)
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        try:
            _hold(descriptor, partial)
            with writing(path):
                yield file
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            # What is still in its buffer has no room on the disk, say; it is not needed.
            with suppress(OSError):
                file.close()
            raise


def write_whole(path: Path, content: bytes | str, *, replaces: bool = False) -> None:
    """Write a file at once; see `whole_file`. Text is written as UTF-8, and what no UTF-8 says as a question mark."""
    with whole_file(path, replaces=replaces) as file:
        file.write(_bytes(content))


def _bytes(content: bytes | str) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "replace")


def write_pair(out: Path, content: bytes | str, beside: Path, content_beside: bytes | str, replaces: bool) -> None:
    """Write a file and what belongs to it: both or none; see `whole_file`.

    They get their names when both are on the disk, `out` the last. What lies `beside` keeps its partial name until
    then: of a process that dies between, the next one knows by that name whose it is, see `pair_in_place_of`.

    Raises:
        InputError: one exists and nothing is replaced, another process is writing it, or it cannot be written.
    """
    contents = {beside: content_beside, out: content}
    with ExitStack() as stack:
        for path, one in contents.items():
            if not replaces:
                refuse_existing(path)
            file = stack.enter_context(_growing(path))
            with writing(path):
                file.write(_bytes(one))
                _settle(file)
        try:
            with writing(beside):
                if not replaces:
                    refuse_existing(beside)
                _name_too(_partial(beside), beside)
            with writing(out):
                if not replaces:
                    refuse_existing(out)
                _partial(out).replace(out)
                _sync(out.parent)
        except BaseException:
            with suppress(OSError):
                if os.path.lexists(_partial(out)) and os.path.samefile(beside, _partial(beside)):
                    beside.unlink()
            raise
        with writing(beside):
            _partial(beside).unlink(missing_ok=True)
            _sync(beside.parent)


class WholeFolder:
    """A folder to be written: it grows as `partial`, and gets its name by `finish`.

    As a context manager it is discarded unless it was finished.

    Args:
        out: its name.

    Attributes:
        partial: where it grows.

    Raises:
        InputError: `out` exists, another process is writing it, or it cannot be written.
    """

    def __init__(self, out: Path):
        refuse_existing(out)
        self.out, self.partial = out, _partial(out)
        self._descriptor: int | None = None
        with writing(out):
            _make(out.parent)
            _clear(self.partial)
            self.partial.mkdir()
            self._descriptor = os.open(self.partial, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        _hold(self._descriptor, self.partial)

    def finish(self) -> None:
        """Have all that is in it on the disk, and give it its name.

        Raises:
            InputError: it cannot be written.
        """
        with writing(self.out):
            sync_all(self.partial)
            refuse_existing(self.out)
            self.partial.rename(self.out)
            _sync(self.out.parent)
        self._let_go()

    def discard(self) -> None:
        """Remove what has been written; what is finished stays."""
        if self._descriptor is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._let_go()

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> WholeFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class Nowhere(io.BytesIO):
    """A file to which nothing that is written goes."""

    def write(self, content: object) -> int:
        """Take it, and forget it."""
        return len(content)  # type: ignore[arg-type]


def refuse_existing(out: Path | None) -> None:
    """Refuse what is to be written where something has its name; commands do so before long work begins.

    Raises:
        InputError: something has.
    """
    if out is not None and os.path.lexists(out):
        raise InputError("exists already, expected a new name", path=out)


@contextmanager
def in_place_of(out: Place, is_forced: bool, marks: Collection[str] = ()) -> Iterator[Place]:
    """Where to write what shall get a name: there, or beside what has it and is replaced at the end, whole until then.

    Args:
        out: the name; None where nothing is written.
        is_forced: whether what has it already is replaced, and not refused.
        marks: files of which a folder must hold one to be replaced, as only what is made here does.

    Raises:
        InputError: something has the name that is not to be replaced, or it cannot be.
    """
    if out is None:
        yield None
        return
    _refuse_nameless(out)
    anew = out.with_name(f".new-{out.name}")
    with writing(out):
        _clear(_partial(anew), lambda: _restore(out, _partial(anew) / REPLACED))
    if not _is_replaced(out, is_forced, marks):
        with _saying_what_became_of(out):
            yield out
        return
    with WholeFolder(anew) as scratch:
        beside = scratch.partial / out.name
        with _saying_what_became_of(out):
            yield beside
            with writing(out):
                if out.is_dir() and beside.exists():
                    _exchange(beside, out, scratch.partial / REPLACED)
                elif beside.exists():
                    beside.replace(out)
                _sync(out.parent)


@contextmanager
def pair_in_place_of(out: Path, beside: Path, is_forced: bool) -> Iterator[None]:
    """Refuses at once what `write_pair` is to write at the end of long work, or could not replace then.

    What lies `beside` is removed where a process gave it that name and died before it gave `out` its own.

    Raises:
        InputError: something has a name that is not to be replaced, or both are one.
    """
    for path in (out, beside):
        _refuse_nameless(path)
    if os.path.abspath(out) == os.path.abspath(beside):
        raise InputError("expected another name than that of the file that it belongs to", path=beside)
    names = (_partial(out), beside, _partial(beside))
    with writing(beside):
        if not os.path.lexists(out) and all(map(os.path.lexists, names)) and os.path.samefile(*names[1:]):
            _clear(_partial(beside), beside.unlink)
    for path in (out, beside):
        _is_replaced(path, is_forced, ())
    with _saying_what_became_of(out):
        yield


def _refuse_nameless(path: Path) -> None:
    """Refuse where nothing can be written beside, to be renamed.

    Raises:
        InputError: it is a root, or the working directory.
    """
    if not path.name:
        raise InputError("expected the name of a file or a folder", path=path)


def _is_replaced(out: Path, is_forced: bool, marks: Collection[str]) -> bool:
    """Whether something has a name that something new is to get; see `in_place_of`.

    Raises:
        InputError: it is not to be replaced.
    """
    if not os.path.lexists(out):
        return False
    if not is_forced:
        raise InputError("exists already, expected a new name, or --force", path=out)
    is_folder = stat.S_ISDIR(os.lstat(out).st_mode)
    if is_folder and not any((out / name).is_file() for name in marks) or not (is_folder or out.is_file()):
        names = f"a folder with {' or '.join(marks)}" if marks else "a file"
        raise InputError(f"is not replaced: expected {names}", path=out)
    return True


@contextmanager
def _saying_what_became_of(out: Path) -> Iterator[None]:
    """Has who is stopped by a signal read whether `out` is new, as it was, or not there."""

    def found() -> tuple[int, int] | None:
        with suppress(FileNotFoundError):
            status = os.lstat(out)
            return status.st_dev, status.st_ino
        return None

    before = found()
    unchanged = f"{out} was not written" if before is None else f"{out} is as it was"
    with ending_with(lambda: unchanged if found() == before else ""):
        yield


@contextmanager
def ending_with(words: Callable[[], str]) -> Iterator[None]:
    """Has who is stopped by a signal read what became of the work: a note of the exception, unless it is empty."""
    try:
        yield
    except Exception:
        raise
    except BaseException as end:
        if text := words():
            end.add_note(text)
        raise


def _exchange(beside: Path, out: Path, before: Path) -> None:
    """Give what is beside a folder its name, and the folder another."""
    try:
        out.rename(before)
        beside.rename(out)
    except BaseException:
        if not os.path.lexists(out):
            before.rename(out)
        raise


def _restore(out: Path, before: Path) -> None:
    """Give a folder its name back that a process was replacing when it died."""
    if os.path.lexists(before) and not os.path.lexists(out):
        before.rename(out)


def refuse_endless(folder: Path) -> None:
    """Refuse a folder that holds what is no file and no folder: who opens a pipe waits for its writer for ever.

    Raises:
        InputError: it does, or it cannot be read; a folder that is not there is for others to say.
    """
    try:
        for path in folder.iterdir() if os.path.isdir(folder) else ():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise InputError("expected a file or a folder", path=path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", path=folder) from error


def lock_file(path: Path) -> IO[bytes]:
    """A lock that lasts while the file returned is open; the file is made where there is none, and never written.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made, or is a symbolic link.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    file = open(descriptor, "r+b")  # noqa: SIM115 - it is the caller's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def _make(folder: Path) -> None:
    """Make the folder in which something is to be written.

    Raises:
        OSError: it cannot be made; a NotADirectoryError where it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _clear(partial: Path, first: Callable[[], None] = lambda: None) -> None:
    """Remove what a dead process has left; something is done first where it has.

    Raises:
        InputError: a living process is writing it, or it is a symbolic link or something else that nobody here made.
        OSError: it cannot be removed.
    """
    try:
        mode = os.lstat(partial).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError("expected nothing there, or what an earlier run has left: it can be removed", path=partial)
    descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _hold(descriptor, partial)
        first()
        shutil.rmtree(partial) if stat.S_ISDIR(mode) else partial.unlink()
    finally:
        os.close(descriptor)


def _name_too(partial: Path, path: Path) -> None:
    """Give a file its name beside the partial one; in place of it where a file is replaced, or can have but one name.

    Raises:
        OSError: it cannot be.
    """
    try:
        os.link(partial, path)
    except OSError:
        partial.replace(path)


def _settle(file: IO[bytes]) -> None:
    """Have what was written to a file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _hold(descriptor: int, partial: Path) -> None:
    """Lock what is being written.

    Raises:
        InputError: another process has, or the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.path.samestat(os.fstat(descriptor), os.lstat(partial))
    except BlockingIOError as error:
        raise InputError("exists already: another run is writing it", path=partial) from error
    except FileNotFoundError:
        is_there = False
    except OSError as error:
        raise InputError(f"cannot be locked: {error.strerror}", path=partial) from error
    if not is_there:
        raise InputError("is gone: another run is writing it", path=partial)


def sync_all(folder: Path) -> None:
    """Have a folder and all that is in it on the disk.

    Raises:
        OSError: there is no room, say.
    """
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(inner) / name)
        _sync(Path(inner))


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
