"""Bad input to the public API: an error that names the argument, and nothing modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm

T, N, M, C = 4, 7, 5, 3
BACKENDS = ("cpu", "torch")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 13), nn.Tanh(), nn.Linear(13, C))


def _good() -> dict[str, Any]:
    return {
        "support_x": torch.randn(T, N, 2),
        "support_y": torch.randint(0, C, (T, N)),
        "query_x": torch.randn(T, M, 2),
        "query_y": torch.randint(0, C, (T, M)),
    }


def _classes(value: int) -> Callable[[Tensor], Tensor]:
    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[1, 2] = value
        return y

    return change


# what is changed, how, and what the message must name
TENSORS: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "too-few-dimensions": ("support_x", lambda x: x.reshape(-1), "support_x"),
    "wrong-width": ("support_x", lambda x: torch.randn(T, N, 3), "support_x"),
    "wrong-query-width": ("query_x", lambda x: torch.randn(T, M, 3), "query_x"),
    "other-number-of-tasks": ("query_x", lambda x: x[:2], "query_x|support_x"),
    "zero-tasks": ("support_x", lambda x: x[:0], "support_x|tasks"),
    "no-support-examples": ("support_x", lambda x: x[:, :0], "support_x"),
    "no-query-examples": ("query_x", lambda x: x[:, :0], "query_x"),
    "other-dtype": ("support_x", lambda x: x.double(), "support_x"),
    "other-device": ("support_x", lambda x: x.to("meta"), "support_x"),
    "sparse": (
        "support_x",
        lambda x: x.to_sparse(),
        "`support_x` must be a dense tensor, got torch.sparse_coo",
    ),
    "nested": (
        "support_x",
        lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
        "`support_x` must be a dense tensor, got nested",
    ),
    "no-width": ("support_x", lambda x: x[..., 0], r"`support_x` must be \[T, N, 2\] .* got \(4, 7\)"),
    "support-of-booleans": ("support_x", lambda x: x > 0, "`support_x`: the network raised RuntimeError"),
    "support-of-integers": ("support_x", lambda x: x.long(), "`support_x`: the network raised RuntimeError"),
    "query-of-integers": ("query_x", lambda x: x.long(), "`query_x`: the network raised RuntimeError"),
    "not-a-tensor": ("support_x", lambda x: x.tolist(), "support_x"),
    "class-too-large": ("support_y", _classes(C), "support_y"),
    "class-negative": ("query_y", _classes(-1), "query_y"),
    "classes-in-int32": ("support_y", lambda y: y.int(), "support_y"),
    "targets-of-other-shape": ("query_y", lambda y: y[:, :2], "query_y"),
    "task-weights": ("task_weights", lambda _: torch.ones(T + 1), "task_weights"),
    "support-weights": ("support_weights", lambda _: torch.ones(T, N + 1), "support_weights"),
    "query-weights": ("query_weights", lambda _: torch.ones(M), "query_weights"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", TENSORS)
def test_rejects_tensors(what: str, backend: str) -> None:
    field, change, named = TENSORS[what]
    episode = _good()
    episode[field] = change(episode.get(field))
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend=backend)
    before = {name: value.clone() for name, value in maml.state_dict().items()}
    kept = {name: x.clone() for name, x in episode.items() if _comparable(x)}
    with pytest.raises((ValueError, TypeError), match=named):
        maml(**episode)
    assert all(torch.equal(value, before[name]) for name, value in maml.state_dict().items())
    assert all(torch.equal(episode[name], x) for name, x in kept.items())
    assert all(p.grad is None for p in maml.parameters())
    good = maml(**_good())  # and the next call is as good as ever
    assert torch.isfinite(good.loss)
    with pytest.raises(
        (ValueError, TypeError), match=named
    ):  # also where all but the values is known already
        maml(**episode)


def _comparable(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided and not x.is_nested


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-rate": ({"inner_lr": float("nan")}, "inner_lr"),
    "infinite-rate": ({"inner_lr": float("inf")}, "inner_lr"),
    "negative-steps": ({"inner_steps": -1}, "steps"),
    "fractional-steps": ({"inner_steps": 1.5}, "steps"),
    "order": ({"order": "third"}, "order"),
    "memory": ({"memory": "disk"}, "memory"),
    "no-tasks-at-a-time": ({"task_chunk": 0}, "`task_chunk` must be at least 1, got 0"),
    "half-a-task-at-a-time": ({"task_chunk": 0.5}, "`task_chunk` must be an int or None, got 0.5"),
    "true-tasks-at-a-time": ({"task_chunk": True}, "`task_chunk` must be an int or None, got True"),
    "backend": ({"backend": "gpu"}, "backend"),
    "adapt": ({"adapt": ["no.such.weight"]}, "adapt"),
    "step-weights": ({"step_weights": [1.0]}, "step_weights"),
    "one-step-weight": ({"step_weights": 1.0}, "`step_weights` must be a sequence of numbers, got 1.0"),
    "adapt-a-typo": (
        {"adapt": "tail"},
        "`adapt`: the network has no parameter 'tail'; .*; 'all', 'head' and 'body'",
    ),
    "loss": ({"loss": "no_such_loss"}, "loss"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_rejects_options(what: str) -> None:
    changed, named = OPTIONS[what]
    options = {"loss": "cross_entropy", "inner_lr": 0.1, "inner_steps": 2, **changed}
    with pytest.raises((ValueError, TypeError), match=named):
        fm.MAML(_net(), **options)(**_good())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_a_target_that_would_be_broadcast(backend: str) -> None:
    net = nn.Sequential(nn.Linear(2, 13), nn.Tanh(), nn.Linear(13, 1))
    x, y = torch.randn(T, N, 2), torch.randn(T, N)
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, backend=backend)
    with pytest.raises(ValueError, match=r"support_y.*broadcast"):
        maml(x, y, x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_rate_tensors_that_are_not_finite(backend: str) -> None:
    net, episode = _net(), _good()
    batch = ((episode["support_x"], episode["support_y"]), (episode["query_x"], episode["query_y"]))
    params, nan = dict(net.named_parameters()), torch.tensor(float("nan"))
    options = {"loss": "cross_entropy", "backend": backend}
    with pytest.raises(ValueError, match=r"meta_gradient: `lr` must hold finite numbers, got nan"):
        fm.meta_gradient(net, params, *batch, lr=nan, steps=1, **options)
    with pytest.raises(ValueError, match=r"MAML: `inner_lr`\['0.weight'\] must hold finite numbers, got nan"):
        fm.MAML(net, inner_lr={"0.weight": nan, "*": 0.1}, inner_steps=1, **options)(**episode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_a_sparse_tensor_after_a_good_one(backend: str) -> None:
    episode = _good()
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend=backend)
    maml(**episode)
    with pytest.raises(TypeError, match="`support_x` must be a dense tensor"):
        maml(**{**episode, "support_x": episode["support_x"].to_sparse()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_not_contiguous_match_their_copies(backend: str) -> None:
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend=backend)
    episode = _good()
    want = maml(**episode).loss
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in episode.items()}
    assert not strided["support_x"].is_contiguous()
    assert torch.equal(maml(**strided).loss, want)


def test_a_module_without_parameters_runs_or_says_why() -> None:
    x = torch.randn(T, N, C)
    y = torch.randn(T, N, C)
    with pytest.raises(ValueError, match="parameter"):
        fm.MAML(nn.Sequential(nn.ReLU()), loss="mse", inner_lr=0.1, inner_steps=1)(x, y, x, y)


@pytest.mark.parametrize("wrt", [3, [3], None, [["params"]]], ids=str)
def test_rejects_wrt(wrt: Any) -> None:
    with pytest.raises(TypeError, match="meta_gradient: `wrt` must hold names"):
        _meta_gradient(wrt=wrt)


@pytest.mark.parametrize("field", ["support", "query"])
@pytest.mark.parametrize(
    ("batch", "got"), [((1, 2, 3), "tuple of 3"), (torch.ones(1), "Tensor of 1"), (5, "int")]
)
def test_rejects_what_is_no_pair(field: str, batch: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"`{field}` must be a pair \(x, y\), got {got}$"):
        _meta_gradient(**{field: batch})


def _meta_gradient(**changed: Any) -> None:
    net, episode = _net(), _good()
    sets = {part: (episode[f"{part}_x"], episode[f"{part}_y"]) for part in ("support", "query")}
    params = dict(net.named_parameters())
    fm.meta_gradient(net, params, **{**sets, "loss": "cross_entropy", "lr": 0.1, "steps": 1, **changed})


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("algorithm", [fm.MAML, fm.Reptile])
@pytest.mark.parametrize("value", ["yes", 1, None], ids=str)
def test_rejects_support_per_step(value: Any, algorithm: type[nn.Module], backend: str) -> None:
    module = algorithm(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=N, backend=backend)
    episode = [x[:, None].expand(T, N, *x.shape[1:]) for x in list(_good().values())[:2]]
    sets = [*episode, *(list(_good().values())[2:] if algorithm is fm.MAML else [])]
    module(*sets, support_per_step=True)
    with pytest.raises(TypeError, match=f"`support_per_step` must be True or False, got {value!r}"):
        module(*sets, support_per_step=value)


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.Reptile])
def test_rejects_a_network_without_shapes(algorithm: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(C))
    message = "`net` must be initialised, '1.weight' has no shape yet"
    with pytest.raises(ValueError, match=message):
        algorithm(net, loss="mse", inner_lr=0.1, inner_steps=1)
    with pytest.raises(ValueError, match=message):
        fm.task_forward(net, dict(net.named_parameters()), torch.ones(T, N, 2))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_vmap(backend: str, warm: bool) -> None:
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=2, backend=backend)
    episode = list(_good().values())
    if warm:
        maml(*episode)
    with pytest.raises(TypeError, match=r"`support_x` must be an ordinary tensor: torch\.vmap"):
        torch.vmap(lambda *sets: maml(*sets).loss)(*(torch.stack([x, x]) for x in episode))


class _Boom(nn.Module):
    """Raises, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("boom")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_says_what_the_network_raised(backend: str) -> None:
    maml = fm.MAML(_Boom(), loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend=backend)
    with pytest.raises(
        ValueError, match="MAML: `support_x`: the network raised KeyError: 'boom'; given were"
    ) as raised:
        maml(**_good())
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("index", [6, -1])
def test_says_that_an_index_is_out_of_range(index: int, backend: str) -> None:
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, C))
    x, y = torch.randint(0, 6, (T, N)), torch.randint(0, C, (T, N))
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend=backend)
    wrong = x.clone()
    wrong[0, 1] = index
    for sets, name in (((x, y, wrong, y), "query_x"), ((wrong, y, x, y), "support_x")):
        maml(x, y, x, y)
        with pytest.raises(ValueError, match=f"`{name}`: the network raised IndexError: index out of range"):
            maml(*sets)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_backend_named_blames_the_tensor_too(backend: str) -> None:
    maml = fm.MAML(_net(), loss="cross_entropy", inner_lr=0.1, inner_steps=1, backend=backend)
    episode = {**_good(), "support_x": torch.ones(T, N, 3), "query_x": torch.ones(T, M, 3)}
    with pytest.raises(
        ValueError, match=r"`support_x` must be \[T, N, 2\] \(network input 2\), got \(4, 7, 3\)"
    ):
        maml(**episode)
