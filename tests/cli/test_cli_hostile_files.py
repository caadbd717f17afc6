"""`fastmeta train` among damaged, foreign and hostile files, and beside another run."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import checkpoint, resume, rows, same_run, sinusoid

from fastmeta.cli import folder, main
from fastmeta.cli.train import sealed

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def begun(tmp_path, runs) -> Path:
    out = tmp_path / "begun"
    shutil.copytree(runs[1], out)
    return out


def one_sentence(done, *parts: str, code: int = 1) -> None:
    """A run that ended with one sentence on stderr that holds these parts, and without a
    traceback."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code
    *usage, sentence = done.stderr.strip().splitlines()
    assert sentence.startswith("Error: ")
    assert not usage or (code == 2 and usage[0].startswith("Usage: "))
    for part in parts:
        assert part in sentence


def _with(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    _with(path, bytes(data))


def _foreign_zip(path: Path) -> None:
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"\xff\xd8" * 900)


def _unsealed(path: Path) -> None:
    content = checkpoint(path.parent)
    path.unlink()
    torch.save(content, path)


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES = {
    "empty": lambda path: _with(path, b""),
    "one-byte": lambda path: _with(path, b"P"),
    "half": lambda path: _with(path, path.read_bytes()[: path.stat().st_size // 2]),
    "last-byte-gone": lambda path: _with(path, path.read_bytes()[:-1]),
    "a-byte-more": lambda path: _with(path, path.read_bytes() + b"\n"),
    "first-byte-gone": lambda path: _with(path, path.read_bytes()[1:]),
    "flipped-bit": _flip,
    "zeros": lambda path: _with(path, bytes(path.stat().st_size)),
    "text": lambda path: _with(path, b"dear diary,\n" * 300),
    "foreign-zip": _foreign_zip,
    "no-digest": _unsealed,
    "bare-pickle": lambda path: _with(path, pickle.dumps({"iteration": 4})),
    "folder": _instead(lambda path: path.mkdir()),
    "dangling-link": _instead(lambda path: path.symlink_to("nowhere")),
    "link-to-itself": _instead(lambda path: path.symlink_to(path.name)),
    "device": _instead(lambda path: path.symlink_to("/dev/zero")),
    "pipe": _instead(os.mkfifo) if hasattr(os, "mkfifo") else _instead(lambda path: path.mkdir()),
}
#: Of these, a run puts no file in their place. What a link points to may only be out of reach just
#: now.
STUCK = ("folder", "dangling-link", "link-to-itself", "device", "pipe")


@pytest.mark.parametrize("damage", DAMAGES)
def test_rejects_a_damaged_checkpoint(begun, damage):
    (begun / "checkpoint.previous.pt").unlink()
    DAMAGES[damage](begun / "checkpoint.pt")
    before = os.lstat(begun / "checkpoint.pt")
    one_sentence(resume(begun), "checkpoint.pt")
    after = os.lstat(begun / "checkpoint.pt")
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
        after.st_ino,
        after.st_size,
        after.st_mtime_ns,
    )


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in STUCK])
def test_goes_on_from_the_checkpoint_before_a_damaged_one(begun, runs, damage):
    DAMAGES[damage](begun / "checkpoint.pt")
    done = resume(begun)
    assert done.exit_code == 0, done.output
    (sentence,) = done.stderr.splitlines()
    assert "checkpoint.pt" in sentence
    assert "is damaged: expected" in sentence
    assert "going on from" in sentence
    assert "iteration 3" in sentence
    same_run(runs[0], begun)


def test_a_damaged_checkpoint_is_never_kept_as_the_one_before(begun):
    _flip(begun / "checkpoint.pt")
    assert resume(begun).exit_code == 0
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        sealed.check(begun / name)


def test_notices_any_flipped_bit(begun):
    path = begun / "checkpoint.pt"
    right = path.read_bytes()
    choice = random.Random(0)
    places = [
        *range(100),
        *range(len(right) - 120, len(right)),
        *(choice.randrange(len(right)) for _ in range(200)),
    ]
    for place in places:
        wrong = bytearray(right)
        wrong[place] ^= 1 << choice.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises(sealed.Damaged):
            sealed.check(path)
    path.write_bytes(right)
    sealed.check(path)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def _nested() -> list:
    nested: list = []
    for _ in range(400):
        nested = [nested]
    return nested


def hostile(content: dict) -> dict[str, object]:
    """Contents that somebody sealed: none of them is a checkpoint of this run."""
    tensor = torch.zeros(3)
    wide = torch.zeros(1).expand(1 << 40)
    changed: dict[str, object] = {
        "evil": Evil(),
        "evil-setting": {**content, "settings": {"seed": Evil()}},
        "none": None,
        "list": [1, 2],
        "nested": _nested(),
        "tensor": tensor,
        "empty": {},
        "format-tensor": {**content, "format": tensor},
        "format-3": {**content, "format": 3},
        "format-text": {**content, "format": "2"},
        "optimizer-list": {**content, "optimizer": []},
        "optimizer-of-two": {**content, "optimizer": {"state": {0: {}, 1: {}}, "param_groups": []}},
        "optimizer-empty": {**content, "optimizer": {"state": {}, "param_groups": []}},
    }
    junk = (
        None,
        "x",
        -1,
        2.5,
        True,
        float("nan"),
        10**30,
        tensor,
        wide,
        [],
        {},
        [[1, "x"]],
        [[tensor]],
        {"": tensor},
    )
    for name in content:
        changed[f"without-{name}"] = {key: value for key, value in content.items() if key != name}
        for number, value in enumerate(junk):
            legal = name == "seconds" and type(value) is float and value == 2.5
            if not legal:
                changed[f"{name}-junk-{number}"] = {**content, name: value}
    for name, right in content["maml"].items():
        others = {
            "shape": torch.zeros(7, 7),
            "dtype": right.double(),
            "meta": right.to("meta"),
            "sparse": right.to_sparse(),
        }
        for kind, value in others.items():
            changed[f"maml-{name}-{kind}"] = {**content, "maml": {**content["maml"], name: value}}
    state = content["optimizer"]["state"][0]
    for name in state:
        for number, value in enumerate(
            (None, 1.0, torch.zeros(2), state[name].double(), torch.tensor(99.0), "x")
        ):
            broken = {"state": {0: {**state, name: value}}, "param_groups": []}
            changed[f"optimizer-{name}-{number}"] = {**content, "optimizer": broken}
    return changed


def test_rejects_hostile_content_with_a_right_digest(begun, monkeypatch):
    monkeypatch.chdir(begun)
    (begun / "checkpoint.previous.pt").unlink()
    cases = hostile(checkpoint(begun))
    assert len(cases) > 150
    for name, content in cases.items():
        archive = io.BytesIO()
        torch.save(content, archive)
        (begun / "checkpoint.pt").write_bytes(sealed.seal(archive.getvalue()))
        done = resume(begun)
        assert isinstance(done.exception, SystemExit), (name, done.exception)
        assert done.exit_code in (1, 2), name
        assert "checkpoint.pt" in done.stderr.splitlines()[-1], name
    assert not (begun / "executed").exists()
    assert [row["iteration"] for row in rows(begun / "metrics.csv")] == ["2", "4"]


def test_rejects_a_checkpoint_of_another_version(begun):
    content = checkpoint(begun)
    content["format"] = 99
    archive = io.BytesIO()
    torch.save(content, archive)
    (begun / "checkpoint.pt").write_bytes(sealed.seal(archive.getvalue()))
    # Not passed over: a newer version's newest checkpoint is no damage.
    one_sentence(resume(begun), "another version", "expected format 2, got 99")


def test_torn_metrics_are_written_anew(begun, runs):
    path = begun / "metrics.csv"
    right = path.read_bytes()
    for length in {0, 1, 9, *range(len(right) - 30, len(right))}:
        path.write_bytes(right[:length])
        copy = begun.with_name("copy")
        shutil.copytree(begun, copy)
        done = sinusoid(copy, "--iterations", "4", "--resume")
        assert done.exit_code == 0, done.output
        assert (copy / "metrics.csv").read_bytes() == right
        (sentence,) = done.stderr.splitlines()
        assert "of 2 rows: written anew" in sentence
        shutil.rmtree(copy)
    # What the disk had of rows after the checkpoint; a row torn in its number must not be taken for
    # an earlier one.
    for tail in (b"6,1.0,0.1\r\n", b"6", b"6,1.5", b"\0" * 40, b"2"):
        path.write_bytes(right + tail)
        done = sinusoid(begun, "--iterations", "4", "--resume")
        assert done.exit_code == 0, done.output
        assert path.read_bytes() == right
    path.unlink()
    assert resume(begun).exit_code == 0
    same_run(runs[0], begun)


@pytest.mark.parametrize(
    "foreign",
    [b"name,age\r\nada,36\r\n", b"\xff\xfe\x00nonsense", b"iteration,loss,seconds\r\n2,7,7\r\n", b"x" * 5000],
)
def test_rejects_foreign_metrics(begun, runs, foreign):
    path = begun / "metrics.csv"
    path.write_bytes(foreign)
    one_sentence(resume(begun), "metrics.csv is not what this run wrote: line ", "move it away")
    assert path.read_bytes() == foreign
    path.rename(begun / "theirs.csv")
    assert resume(begun).exit_code == 0
    same_run(runs[0], begun)


def test_rejects_foreign_metrics_in_the_folder_of_a_new_run(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("name,age\nada,36\n")
    one_sentence(
        sinusoid(tmp_path, "--iterations", "2"), "metrics.csv is not what this run wrote", "--overwrite"
    )
    assert path.read_text() == "name,age\nada,36\n"
    assert sinusoid(tmp_path, "--iterations", "2", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "name", ["metrics.csv", "result.csv", "checkpoint.pt", "checkpoint.previous.pt", "adaptation.png", "lock"]
)
@pytest.mark.parametrize("kind", ["folder", "device"])
def test_rejects_what_is_no_file_before_it_trains(tmp_path, name, kind):
    if kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/full")
    one_sentence(sinusoid(tmp_path, "--iterations", "2", "--overwrite"), name)
    assert not (tmp_path / "metrics.csv").is_file()


def test_rejects_a_folder_that_is_a_dangling_link(tmp_path):
    (tmp_path / "run").symlink_to("nowhere")
    one_sentence(sinusoid(tmp_path / "run", "--iterations", "2"), "--out: cannot make the folder")
    one_sentence(resume(tmp_path / "run"), "there is no checkpoint", code=2)


def test_resume_makes_no_folder(tmp_path):
    one_sentence(resume(tmp_path / "run"), "there is no checkpoint", code=2)
    assert not (tmp_path / "run").exists()


def test_overwrite_forgets_the_checkpoints_of_the_other_run(begun, monkeypatch):
    from fastmeta.data import Sinusoid

    def fail(self, index):
        raise RuntimeError

    monkeypatch.setattr(Sinusoid, "__getitem__", fail)
    assert isinstance(sinusoid(begun, "--iterations", "9", "--overwrite").exception, RuntimeError)
    assert not list(begun.glob("checkpoint*"))
    assert rows(begun / "metrics.csv") == []


def forked(work: Callable[[], None]) -> int:
    """A process that does `work` and ends without a word of pytest's; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(99)


@FORKS
def test_rejects_a_second_run_in_the_folder(begun):
    before = (begun / "metrics.csv").read_bytes()
    reading, writing = os.pipe()

    def hold() -> None:
        with folder.locked(begun):
            os.write(writing, b".")
            signal.pause()

    other = forked(hold)
    assert os.read(reading, 1) == b"."
    try:
        one_sentence(resume(begun), f"process {other} works in the folder", "one run at a time")
        one_sentence(sinusoid(begun, "--iterations", "9", "--overwrite"), f"process {other}")
        assert (begun / "metrics.csv").read_bytes() == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(reading)
        os.close(writing)
    # The file is there, the lock is not.
    assert (begun / "lock").read_text() == f"{other}\n"
    assert resume(begun).exit_code == 0


def test_says_that_a_folder_cannot_be_locked(begun, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    done = resume(begun)
    assert done.exit_code == 0
    assert "cannot be locked" in done.stderr


@FORKS
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_that_cannot_be_written_is_one_sentence(tmp_path):
    said = tmp_path / "stderr"

    def inform() -> None:
        sys.stdout, sys.stderr = open("/dev/full", "w"), said.open("w")  # noqa: SIM115
        try:
            main(["info"])
        except SystemExit as done:
            sys.stderr.flush()
            os._exit(done.code)

    _, status = os.waitpid(forked(inform), 0)
    assert os.WEXITSTATUS(status) == 1
    assert said.read_text().splitlines() == ["Error: cannot write the output: No space left on device"]
