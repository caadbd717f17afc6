"""What the `inductor` backend refuses, and what it says; PyTorch's compiler does not run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import EVERYTHING, make_problem, mlp
from torch import Tensor, nn
from traced_programs import LinearNet, assert_right, data, gradient, run_as_traced

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.inductor import compile as compiler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return run_as_traced(monkeypatch)


TABLE = torch.ones(2, dtype=torch.float64)


class _ReadsAnInput(LinearNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if x.sum() > 0 else 1)


class _ReadsABuffer(LinearNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale.tolist()[0]


class _ReadsAGlobal(LinearNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * TABLE


class _ReadsANumberOfAGlobal(LinearNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * TABLE[0].item()


class _ReadsAScalarGlobal(LinearNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * TABLE.sum()


class _Hidden(LinearNet):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.state + self.linear(x).mean(0)
        return self.linear(x) + self.state


class _Selects(LinearNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x[:, 0] > 0].sum(0).expand(len(x), 2)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (_ReadsAnInput(), "reads a value of a tensor"),
        (_ReadsABuffer(), "reads a value of a tensor"),
        (_ReadsAGlobal(), "none of its arguments, parameters or buffers"),
        (_ReadsAScalarGlobal(), "none of its arguments, parameters or buffers"),
        (_ReadsANumberOfAGlobal(), "none of its arguments|reads a value"),
        (_Hidden(), "carries `net.state` over"),
        (_Selects(), "depends on values"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double(), "draws random numbers"),
        (nn.Sequential(nn.Linear(3, 2)).half(), "float16"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refuses(traced: list[int], net: nn.Module, reason: str) -> None:
    problem = make_problem(net)
    assert backends.why_not("inductor", problem, frozenset({"params"}))
    with pytest.raises(fm.BackendUnavailable, match=reason):
        backends.select("inductor", problem, frozenset({"params"}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"memory": "store"}, "run again"), ({"task_chunk": 1}, "side by side"), ({"third": True}, "third")],
    ids=["memory", "task_chunk", "third"],
)
def test_refuses_options(traced: list[int], options: dict[str, Any], reason: str) -> None:
    assert reason in backends.why_not("inductor", make_problem(mlp(3, 8, 2), **options), EVERYTHING)
    assert traced == []


def test_hooks_are_refused(traced: list[int]) -> None:
    net = mlp(3, 8, 2)
    assert_right(net)
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(fm.BackendUnavailable, match="hooks"):
        gradient(net, "inductor")


def test_a_wrong_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, example: Any) -> Callable[..., Any]:
        return lambda *tensors: [1.001 * tensor for tensor in graph(*tensors)]

    monkeypatch.setattr(compiler, "_inductor", wrong)
    reason = backends.why_not("inductor", make_problem(mlp(3, 8, 2)), frozenset({"params"}))
    assert "differs from the module" in reason


def test_a_failing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, example: Any) -> Callable[..., Any]:
        raise RuntimeError("no space left\nand more")

    monkeypatch.setattr(compiler, "_inductor", fails)
    with pytest.raises(fm.BackendUnavailable, match=r"compiler failed: RuntimeError: no space left$"):
        gradient(mlp(3, 8, 2), "inductor")


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(fm.BackendUnavailable, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        gradient(mlp(3, 8, 2), "inductor")


def test_auto_never_takes_it(traced: list[int]) -> None:
    assert all("inductor" not in names for names in backends._AUTO.values())
    x, y = data()
    maml = fm.MAML(mlp(3, 8, 2), loss="mse", inner_lr=0.1, inner_steps=1)
    assert maml.explain(x, y, x, y).backend != "inductor"
    assert traced == []
