"""`fastmeta train` killed, or refused by the disk, at every call to the operating system that
writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training import resume, rows, same_run

from fastmeta.cli.train import sealed

#: What makes a file change, or last.
CALLS = ("open", "write", "fsync", "replace", "link", "unlink", "ftruncate")

REASONS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_plots"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]


class Injector:
    """Does something before, within or after the n-th call of `CALLS`, and tells how many there
    were."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[int, str], None]) -> None:
        self.calls = 0
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name), act))

    def _wrap(self, name: str, call: Callable, act: Callable[[int, str], None]) -> Callable:
        def wrapped(*given, **options):
            self.calls += 1
            act(self.calls, name)
            return call(*given, **options)

        return wrapped


def check_between(out: Path) -> None:
    """After a crash: a whole checkpoint, all rows before it, and nothing that was not meant."""
    sealed.check(out / "checkpoint.pt")
    assert [row["iteration"] for row in rows(out / "metrics.csv")][:2] == ["2", "4"]


def check_after(out: Path, whole: Path) -> None:
    same_run(whole, out)
    sealed.check(out / "checkpoint.previous.pt")
    assert not list(out.glob("*.new"))


def killed_at(number: int, out: Path, half: bool) -> bool:
    """Resume in a process that kills itself at a call; whether it came to that."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                write = os.write

                def die(count: int, name: str) -> None:
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)

                injector = Injector(patch, die)
                if half:

                    def torn(descriptor, content):
                        if injector.calls + 1 == number:
                            write(descriptor, bytes(content)[: len(content) // 2])
                        return counted(descriptor, content)

                    counted = os.write
                    patch.setattr(os, "write", torn)
                done = resume(out)
            os._exit(0 if done.exit_code == 0 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_at_any_call_and_resumed_equals_uninterrupted(tmp_path, runs):
    whole, begun = runs
    number = 1
    while True:
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        # A write that is half done is the worse one.
        if not killed_at(number, out, half=True):
            break
        check_between(out)
        assert resume(out).exit_code == 0
        check_after(out, whole)
        number += 1
    assert number > 40, "fewer calls than the run makes: the injection did not reach them"


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_disk_that_refuses_any_call_leaves_a_run_that_goes_on(tmp_path, runs, lasting):
    whole, begun = runs
    # Every second call: the other way refuses those between.
    number, refused = 1 + lasting, 0
    while True:
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        with pytest.MonkeyPatch.context() as patch:
            reason = REASONS[number // 2 % len(REASONS)]

            def refuse(count: int, name: str, number: int = number, reason: int = reason) -> None:
                # A full disk still removes files.
                if (count == number or (lasting and count > number)) and name != "unlink":
                    raise OSError(reason, os.strerror(reason))

            injector = Injector(patch, refuse)
            done = resume(out)
        if injector.calls < number:
            break
        if done.exit_code:
            refused += 1
            assert isinstance(done.exception, SystemExit), done.exception
            assert os.strerror(reason) in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert done.exit_code == 1
        check_between(out)
        assert resume(out).exit_code == 0
        check_after(out, whole)
        number += 2
    assert refused > 15


@pytest.mark.parametrize("more", [0, 1, 2], ids=["once", "and-at-the-next-call", "and-two-calls-later"])
def test_ctrl_c_at_any_call_leaves_a_run_that_goes_on(tmp_path, runs, more):
    """The first one lets the iteration end and saves; a second one stops at once."""
    whole, begun = runs
    number, codes = 1 + more, []
    while True:
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        with pytest.MonkeyPatch.context() as patch:

            def interrupt(count: int, name: str, number: int = number) -> None:
                if count in (number, number + more):
                    os.kill(os.getpid(), signal.SIGINT)

            injector = Injector(patch, interrupt)
            done = resume(out)
        if injector.calls < number:
            break
        codes.append(done.exit_code)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        check_between(out)
        assert resume(out).exit_code == 0
        check_after(out, whole)
        number += 3
    # 130: saved; 1: "Aborted!" before or after the training, or by the second one.
    assert set(codes) <= {0, 1, 130}
    assert (1 if more else 130) in codes


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, runs):
    """What a power failure would show: a file is synced before it is renamed, and the folder
    after."""
    out = tmp_path / "run"
    shutil.copytree(runs[1], out)
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        Injector(patch, lambda count, name: names.append(name))
        assert resume(out).exit_code == 0
    written = " ".join(names).replace("link replace unlink", "keep")
    # Metrics, result, and a checkpoint after 6 and after 9 iterations.
    assert written.count("replace") == written.count("write fsync replace open fsync") == 4
    assert written.count("keep unlink open write") == 2
