"""The choice of tiles: timed by what stands in for a GPU, kept in a file, read by another
process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget

from fastmeta.backends import _disk_cache
from fastmeta.backends.triton import compile as triton_compile
from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton import tune as tuning
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases import Case
from fastmeta.kernels.launch import Launch
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton's interpreter is on: it has nothing to compile"
)

_FACTS = ("NVIDIA H100", "3.9.0", "2.13.0")


def _network() -> nn.Module:
    body = (nn.Conv2d(3, 70, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(70 * 9, 90), nn.ReLU(), nn.Linear(90, 5))


@lru_cache(maxsize=1)
def _recorded() -> tuple[Launch, ...]:
    case = Case("net", _network, (3, 5, 5), 3, 40, 70, 2, "ce", wrt_inputs=False)
    problem = problem_of(case, torch.float32, 0)
    names = wanted(case, problem)
    made = MetaStep(problem, runs.network(problem, names), names, "store", "ieee", torch.device("meta"))
    return tuple(made.emit.launches)


def _launches() -> list[Launch]:
    return list(_recorded())


@dataclass
class FakeTimer:
    """Milliseconds by a rule of one's own; remembers what it was asked."""

    rule: Callable[[Launch, Launch], float]
    timed: list[Launch] = field(default_factory=list)
    prepared: int = 0

    def prepare(self, launches: list[Launch]) -> None:
        self.prepared += len(launches)

    def time(self, launch: Launch, first: Launch) -> float:
        self.timed.append(launch)
        return self.rule(launch, first)


def _few_programs(launch: Launch, first: Launch) -> float:
    return float(launch.programs)


def _file(folder: Path) -> Path:
    return folder / "tuned.json"


def _never(launch: Launch, first: Launch) -> float:
    raise AssertionError("timed again")


def test_the_quickest_choice_is_launched(tmp_path: Path):
    timer = FakeTimer(_few_programs)
    made, report = tuning.tune(_launches(), timer, _file(tmp_path))
    heavy = tuning.heavy(_launches())
    assert report.timed == len(heavy) > 3
    assert timer.prepared == len(timer.timed) == sum(1 + len(one.choices) for one in heavy.values())
    changed = 0
    for before, after in zip(_launches(), made, strict=True):
        if not before.choices or tuning.key(before) not in heavy:
            assert (after.programs, after.warps, after.stages) == (
                before.programs,
                before.warps,
                before.stages,
            )
            continue
        assert after.programs == min([before.programs, *(c.programs for c in before.choices)])
        changed += after.programs != before.programs
        tiles = {name for choice in before.choices for name, _ in choice.tiles}
        assert all(after.arguments[n] is v for n, v in before.arguments.items() if n not in tiles)
    assert changed > 3


def test_heavy_products_alone_are_timed():
    launches = _launches()
    heavy = tuning.heavy(launches)
    work = dict.fromkeys(heavy, 0)
    total = 0
    for launch in launches:
        total += launch.work
        if launch.choices and tuning.key(launch) in work:
            work[tuning.key(launch)] += launch.work
    assert sum(work.values()) >= tuning.SHARE * total
    assert sum(work.values()) - min(work.values()) < tuning.SHARE * total


def test_no_choice_touches_the_order_of_a_sum():
    for launch in _launches():
        for choice in launch.choices:
            names = {name for name, _ in choice.tiles}
            assert names == ({"BO", "BI"} if "BO" in launch.arguments else {"BM", "BN"})
            assert choice.programs > 0


def test_what_is_unfit_or_hardly_quicker_is_not_chosen(tmp_path: Path):
    def unfit(launch: Launch, first: Launch) -> float:
        return 1.0 if launch is first else math.inf

    def hardly(launch: Launch, first: Launch) -> float:
        return 1.0 if launch is first else 0.98

    for rule in (unfit, hardly):
        file = tmp_path / f"{rule.__name__}.json"
        made, _ = tuning.tune(_launches(), FakeTimer(rule), file)
        assert all(
            a.warps == b.warps and a.programs == b.programs for a, b in zip(_launches(), made, strict=True)
        )
        assert {entry["chosen"] for entry in json.loads(file.read_text()).values()} == {0}


def test_choices_are_kept_and_found_again(tmp_path: Path):
    first, _ = tuning.tune(_launches(), FakeTimer(_few_programs), _file(tmp_path))
    again, report = tuning.tune(_launches(), FakeTimer(_never), _file(tmp_path))
    assert (report.timed, report.found) == (0, len(tuning.heavy(_launches())))
    assert [(x.programs, x.warps, x.stages) for x in first] == [
        (x.programs, x.warps, x.stages) for x in again
    ]
    assert str(_file(tmp_path)) in str(report)
    assert tuning.look(_launches(), _file(tmp_path)).found == report.found
    assert tuning.look(_launches(), tmp_path / "other.json").missing == report.found


_SECOND = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_triton_tune as here
made, report = here.tuning.tune(here._launches(), here.FakeTimer(here._never), Path(sys.argv[2]))
print(report.timed, sum(one.programs for one in made))
"""


def test_a_second_process_reads_what_the_first_has_chosen(tmp_path: Path):
    made, _ = tuning.tune(_launches(), FakeTimer(_few_programs), _file(tmp_path))
    command = [sys.executable, "-c", _SECOND, str(Path(__file__).parent), str(_file(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["0", str(sum(one.programs for one in made))], done.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"chosen": "x"}}', "\x00\xff"])
def test_a_file_that_cannot_be_read_is_made_anew(tmp_path: Path, content: str):
    file = _file(tmp_path)
    file.write_bytes(content.encode("latin1"))
    with pytest.warns(UserWarning, match=r"tuned\.json cannot be read and is made anew"):
        _, report = tuning.tune(_launches(), FakeTimer(_few_programs), file)
    assert report.found == 0
    assert report.timed
    assert tuning.look(_launches(), file).missing == 0


def test_a_choice_that_does_not_exist_is_timed_again(tmp_path: Path):
    file = _file(tmp_path)
    tuning.tune(_launches(), FakeTimer(_few_programs), file)
    entries = json.loads(file.read_text())
    entries[next(iter(entries))]["chosen"] = 99
    file.write_text(json.dumps(entries))
    _, report = tuning.tune(_launches(), FakeTimer(_few_programs), file)
    assert report.timed == 1


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path):
    (tmp_path / "no_folder").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        made, report = tuning.tune(
            _launches(), FakeTimer(_few_programs), tmp_path / "no_folder" / "tuned.json"
        )
    assert report.timed
    assert sum(x.programs for x in made) < sum(x.programs for x in _launches())


def test_several_writers_leave_a_whole_file(tmp_path: Path):
    file, failures = _file(tmp_path), []

    def write(which: int) -> None:
        for i in range(40):
            tuning._write(file, {f"{which}-{i}": {"chosen": 0, "padding": "x" * 5000}})

    def read() -> None:
        for _ in range(100):
            if file.exists():
                try:
                    json.loads(file.read_text())
                except ValueError as error:
                    failures.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {"0-39", "1-39"} & set(json.loads(file.read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_device_and_versions_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    files = {tuning.place(*_FACTS), *(tuning.place(*_FACTS[:i], "x", *_FACTS[i + 1 :]) for i in range(3))}
    assert len(files) == 4
    assert {file.parent for file in files} == {tmp_path} == {_disk_cache.folder()}


def test_key_follows_source_sizes_and_constants():
    product = next(launch for launch in _launches() if launch.choices)
    keys = {tuning.key(product)}
    for name, value in (("M", 12345), ("PRECISION", "tf32"), ("BK", 16), ("bias", None)):
        changed = Launch(
            product.kernel,
            product.programs,
            {**product.arguments, name: value},
            4,
            3,
            product.choices,
            product.work,
        )
        keys.add(tuning.key(changed))
    keys.add(
        tuning.key(Launch(product.kernel, product.programs, product.arguments, 4, 3, product.choices[:1]))
    )
    assert len(keys) == 6


def test_off_without_a_gpu_and_when_told_so(monkeypatch: pytest.MonkeyPatch):
    assert "no GPU" in tuning.off(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda = torch.device("cuda")
    assert tuning.off(cuda) == ""
    monkeypatch.setenv("FASTMETA_TUNE", "0")
    assert tuning.off(cuda) == "FASTMETA_TUNE=0"
    monkeypatch.delenv("FASTMETA_TUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in tuning.off(cuda)
    assert "captured" in str(tuning.Report(tuning.off(cuda)))


class _Kernel:
    """Doubles numbers; with eight warps it does what it is told to."""

    def __init__(self, with_eight: str) -> None:
        self.with_eight = with_eight

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        return self.launch

    def launch(self, x: torch.Tensor, out: torch.Tensor, num_warps: int, **options: Any) -> Any:
        told = self.with_eight if num_warps == 8 else ""
        if told == "fail":
            raise triton.runtime.errors.OutOfResources(1, 0, "registers")
        out.copy_(2 * x)
        if told == "round":
            out[0] = torch.nextafter(out[0], torch.tensor(torch.inf))
        return SimpleNamespace(n_spills=8 if told == "spill" else 0)


@pytest.mark.parametrize("told", ["", "fail", "round", "spill"])
def test_the_device_times_only_what_is_fit(monkeypatch: pytest.MonkeyPatch, told: str):
    monkeypatch.setattr(tuning, "do_bench", lambda run, **options: run() and 2.5)
    arguments = {"x": torch.empty(5), "out": torch.empty(5)}
    first, other = (Launch(_Kernel(told), 1, arguments, warps, 1) for warps in (4, 8))
    timer = tuning.OnDevice()
    assert timer.time(first, first) == 2.5
    assert timer.time(other, first) == (math.inf if told else 2.5)


def test_the_first_choice_may_not_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "do_bench", lambda run, **options: run())
    first = Launch(_Kernel("fail"), 1, {"x": torch.empty(5), "out": torch.empty(5)}, 8, 1)
    with pytest.raises(triton.runtime.errors.OutOfResources):
        tuning.OnDevice().time(first, first)


class _Driver:
    """As much of Triton's driver as compiling takes."""

    def __init__(self) -> None:
        self.launchable: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.launchable.append(metadata.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


def test_launches_are_compiled_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from fastmeta.kernels import reduce
    from fastmeta.kernels.launch import Recorder

    emit = Recorder()
    for size in (64, 80):
        emit.zero(torch.empty(size))
    reduce.mean_loss(emit, torch.empty(7), None, torch.empty(()))
    broken = {**emit.launches[0].arguments, "BLOCK": 3}  # no power of two: does not compile
    launches = [*emit.launches, Launch(emit.launches[0].kernel, 1, broken, 4, 1)]
    compiled: list[Any] = []
    driver = _Driver()
    monkeypatch.setattr(triton_compile, "_launchable", set())
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs)
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for _ in range(2):
            triton_compile.compile_together(launches)
    assert sorted(driver.launchable) == ["_weighted", "fill"]  # once a signature
    assert len(compiled) == 2  # of the two sizes one, and what is broken raises when it is launched
