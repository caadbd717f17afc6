"""The public API on the Triton backend: plans are used again, results are the caller's own,
messages name causes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import quantities

LR, STEPS = 0.1, 2


def _episode(seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(3, n, width, generator=g).double() for n, width in ((5, 2), (5, 1), (4, 2), (4, 1))
    )


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp((2, 7, 1), "tanh").double()


def _maml(net: nn.Module, backend: str, **options: object) -> fm.MAML:
    return fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend, **options)


def _gradient(maml: fm.MAML, episode: tuple[Tensor, ...]) -> list[Tensor]:
    maml.zero_grad()
    maml(*episode).loss.backward()
    return [p.grad.clone() for p in maml.parameters()]


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


def test_odd_tensors_match_reference():
    """A view of the opposite sign, and a task without targets, where PyTorch's gradient is zero."""
    torch.manual_seed(0)
    net, (x, _, query_x, _) = nn.Linear(2, 3).double(), _episode()
    params = {name: value.detach() for name, value in net.named_parameters()}
    y, query_y = torch.randint(0, 3, x.shape[:2]), torch.randint(0, 3, query_x.shape[:2])
    y[1] = -100
    found = [
        fm.meta_gradient(
            net,
            params,
            (torch._neg_view(x), y),
            (query_x, query_y),
            loss=nn.CrossEntropyLoss(label_smoothing=0.1),
            lr=LR,
            steps=STEPS,
            backend=backend,
        )
        for backend in ("triton", "reference")
    ]
    assert _close(*([out.task_losses, *out.grads.values()] for out in found))


def test_maml_matches_reference_over_steps_of_an_optimiser():
    """The parameters change between calls, and the plan stays."""
    results = []
    for backend in ("triton", "reference"):
        maml = _maml(_net(), backend, learn_lr="tensor")
        optimiser = torch.optim.SGD(maml.parameters(), lr=0.1)
        losses = []
        for seed in range(3):
            optimiser.zero_grad()
            out = maml(*_episode(seed))
            out.loss.backward()
            optimiser.step()
            losses.append(out.loss.detach())
        results.append([*losses, *(p.detach() for p in maml.parameters())])
    assert _close(*results)


def test_operators_match_reference():
    net, (sx, sy, qx, qy) = _net(), _episode()
    params = dict(net.named_parameters())
    adapted = [
        fm.inner_sgd(net, params, sx, sy, loss="mse", lr=LR, steps=STEPS, backend=b)
        for b in ("triton", "reference")
    ]
    assert _close(*[list(a.values()) for a in adapted])
    outputs = [fm.task_forward(net, params, qx, backend=b) for b in ("triton", "reference")]
    assert _close(*[[out] for out in outputs])
    found = [
        fm.meta_gradient(net, params, (sx, sy), (qx, qy), loss="mse", lr=LR, steps=STEPS, backend=b)
        for b in ("triton", "reference")
    ]
    assert _close(*[[f.task_losses, *f.grads.values()] for f in found])


def test_what_is_returned_is_never_overwritten():
    maml = _maml(_net(), "triton")
    first = maml(*_episode(0))
    kept = [value.detach().clone() for value in first]
    second = maml(*_episode(1))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not torch.equal(first.task_losses, second.task_losses)
    # two forwards, then two backwards: each its own gradient
    (first.loss + second.loss).backward()
    both = [p.grad.clone() for p in maml.parameters()]
    apart = [a + b for a, b in zip(_gradient(maml, _episode(0)), _gradient(maml, _episode(1)), strict=True)]
    assert _close(both, apart)


def test_parameters_that_moved_are_read_where_they_are():
    episode = _episode()
    maml = _maml(_net(), "triton")
    before = _gradient(maml, episode)
    with torch.no_grad():
        for parameter in maml.net.parameters():
            parameter.data = parameter.data.clone() * 2
    moved = _gradient(maml, episode)
    fresh = _maml(maml.net, "reference")
    assert _close(moved, _gradient(fresh, episode))
    assert not _close(moved, before)


def test_learning_rates_are_read_at_every_call():
    net, episode = _net(), _episode()
    rates = {name: torch.full((), 0.05, dtype=torch.float64) for name, _ in net.named_parameters()}

    def gradient(backend: str) -> list[Tensor]:
        found = fm.meta_gradient(
            net,
            dict(net.named_parameters()),
            episode[:2],
            episode[2:],
            loss="mse",
            lr=rates,
            steps=STEPS,
            backend=backend,
        )
        return list(found.grads.values())

    before = gradient("triton")
    for rate in rates.values():
        rate.mul_(3)
    assert _close(gradient("triton"), gradient("reference"))
    assert not _close(gradient("triton"), before)


def test_rates_of_rows_and_columns_match_reference():
    """Shapes between one number and one an element, of a convolution too, whose weight lies
    otherwise in memory."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)).double()
    x, y = torch.randn(3, 4, 2, 2, 3).double(), torch.randn(3, 4, 1).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    forms = [
        {
            "0.weight": (1, 1, 3, 1, 1, 1),
            "0.bias": (STEPS, 1, 3),
            "3.weight": (1, 3, 1, 6),
            "3.bias": (1, 3, 1),
        },
        {
            "0.weight": (STEPS, 3, 1, 2, 1, 2),
            "0.bias": (1, 1, 1),
            "3.weight": (1, 1, 1, 1),
            "3.bias": (1, 1, 1),
        },
    ]
    for shapes in forms:
        rates = {name: 0.05 + 0.1 * torch.rand(shape).double() for name, shape in shapes.items()}
        found = [
            fm.meta_gradient(
                net,
                params,
                (x, y),
                (x, y),
                loss="mse",
                lr=rates,
                steps=STEPS,
                wrt=("params", "lr"),
                backend=backend,
            )
            for backend in ("triton", "reference")
        ]
        assert [rate.shape for rate in found[0].lr.values()] == [rate.shape for rate in rates.values()]
        assert _close(*([*out.grads.values(), *out.lr.values()] for out in found))


def test_a_diverged_task_touches_no_other():
    episode, weights = _episode(), torch.tensor([1.0, 0.0, 2.0]).double()
    broken = (episode[0].clone(), *episode[1:])
    broken[0][1, 0, 0] = torch.nan
    maml = _maml(_net(), "triton", on_divergence="skip")
    with pytest.warns(RuntimeWarning, match=r"1 of 3 tasks diverged, left out .*: task 1$"):
        out = maml(*broken)
    out.loss.backward()
    whole = maml(*episode)
    assert torch.equal(out.task_losses[[0, 2]], whole.task_losses[[0, 2]])
    assert out.task_losses[1].isnan()
    rest = _gradient(_maml(_net(), "reference"), tuple(tensor[[0, 2]] for tensor in episode))
    assert _close([p.grad for p in maml.parameters()], rest)
    results = []
    for backend, tensors in (("triton", broken), ("reference", episode)):
        weighted = _maml(_net(), backend)
        weighted(*tensors, weights).loss.backward()
        results.append([p.grad for p in weighted.parameters()])
    assert _close(*results)


@pytest.mark.parametrize(("label", "tasks"), [("bn_relu_pool", 2), ("linear", 18)])
def test_two_runs_give_the_same_bits(label: str, tasks: int):
    case = replace(
        next(c for c in VERIFICATION if c.label == label), tasks=tasks, shots=2, queries=2, steps=1
    )
    runs = []
    for _ in range(2):
        problem = problem_of(case, torch.float32, 0)
        runs.append(quantities(backends.get("triton").solve(problem, wanted(case, problem), False)))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_class_weights_are_read_at_every_call():
    net, (sx, _, qx, _) = mlp((2, 5, 3), "tanh").double(), _episode()
    support_y, query_y = torch.arange(15).reshape(3, 5) % 3, torch.arange(12).reshape(3, 4) % 3
    losses = []
    for weight in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 0.5])):
        found = [
            fm.meta_gradient(
                net,
                dict(net.named_parameters()),
                (sx, support_y),
                (qx, query_y),
                loss=nn.CrossEntropyLoss(weight=weight.double()),
                lr=LR,
                steps=1,
                backend=backend,
            ).task_losses
            for backend in ("triton", "reference")
        ]
        assert _close([found[0]], [found[1]])
        losses.append(found[0])
    assert not torch.allclose(*losses)


def test_calls_of_several_threads_do_not_mix():
    def gradient(seed: int) -> list[Tensor]:
        return _gradient(_maml(nets[seed], "triton"), _episode(seed))

    nets = [_net(seed) for seed in range(4)]
    alone = [gradient(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_inference_mode_leaves_nothing_behind():
    maml, episode = _maml(_net(), "triton"), _episode()
    with torch.inference_mode():
        inside = maml(*episode).task_losses
    outside = maml(*episode)
    outside.loss.backward()
    assert torch.equal(inside, outside.task_losses)


def test_inputs_in_any_order_of_memory():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(2, 3, 4, 4, 2, dtype=torch.float64).movedim(
        -1, 2
    )  # [T, N, C, H, W], channels-last in memory
    params = dict(net.named_parameters())
    out = fm.task_forward(net, params, x, backend="triton")
    assert torch.allclose(out, fm.task_forward(net, params, x.contiguous(), backend="reference"))


def test_explain_names_precision_kernels_and_memory():
    said = str(_maml(_net(), "triton").explain(*_episode()))
    assert "kernels: linear tanh linear" in said
    assert "interpreter" in said
    assert "memory: store" in said
    assert "tuning: off, there is no GPU" in said
    single = [t.float() for t in _episode()]
    for asked, stated in (("highest", "IEEE"), ("high", "TF32"), ("medium", "bfloat16")):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(asked)
        try:
            assert stated in str(_maml(_net().float(), "triton").explain(*single))
        finally:
            torch.set_float32_matmul_precision(before)


def test_auto_takes_cpu_tensors_to_the_cpu():
    assert _maml(_net(), "auto").explain(*_episode()).backend != "triton"


def test_rejects_a_class_index_that_is_out_of_range():
    net = mlp((2, 7, 3), "tanh").double()
    sx, _, qx, _ = _episode()
    support_y, query_y = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    query_y[1, 2] = 3
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=LR, inner_steps=1, backend="triton")
    with pytest.raises(ValueError, match=r"query_y.*\[0, 3\).*got 3 at \[1, 2\]"):
        maml(sx, support_y, qx, query_y)


@pytest.mark.parametrize(
    ("layer", "loss", "reason"),
    [
        (nn.RReLU(), "mse", "RReLU"),  # random: not for kernels
        (nn.Tanh(), lambda out, y: (out - y).square().mean(), "function of its own"),
    ],
    ids=["layer", "loss"],
)
def test_refuses_by_name(layer: nn.Module, loss: object, reason: str):
    net = nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 1)).double()
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=1, backend="triton")
    with pytest.raises(fm.BackendUnavailable, match=reason):
        maml(*_episode())


@pytest.mark.parametrize("layer", [nn.LeakyReLU(0.0), nn.LeakyReLU(-0.3), nn.ELU(0.0), nn.ELU(-0.7)], ids=str)
def test_factors_that_are_not_positive_match_reference(layer: nn.Module):
    """The value does not tell on which side of the kink it was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), layer, nn.Linear(6, 5), layer, nn.Linear(5, 1)).double()
    results = [_gradient(_maml(net, backend), _episode()) for backend in ("triton", "reference")]
    assert _close(*results)


@pytest.mark.parametrize("indices", [True, False], ids=["indices", "probabilities"])
def test_many_classes_match_reference(indices: bool):
    """More than a tile of them."""
    torch.manual_seed(0)
    classes = 1030
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, classes)).double()
    sx, _, qx, _ = _episode()
    ys = [torch.randn(3, n, classes).double().softmax(-1) for n in (5, 4)]
    sy, qy = [y.argmax(-1) for y in ys] if indices else ys
    loss = nn.CrossEntropyLoss(weight=torch.rand(classes).double(), label_smoothing=0.1)
    results = []
    for backend in ("triton", "reference"):
        maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=2, backend=backend)
        results.append(_gradient(maml, (sx, sy, qx, qy)))
    assert _close(*results)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3,), (2, 3)], ids=str)
def test_weights_of_an_outputs_elements_match_reference(shape: tuple[int, ...]):
    """`weight` and `pos_weight` of any shape that broadcasts to the output [2, 3]."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (2, 3))).double()
    weight, positive = (torch.rand(shape).double() + 0.5 for _ in range(2))
    sx, _, qx, _ = _episode()
    episode = (sx, torch.rand(3, 5, 2, 3).round().double(), qx, torch.rand(3, 4, 2, 3).round().double())
    results = []
    for backend in ("triton", "reference"):
        loss = nn.BCEWithLogitsLoss(weight=weight, pos_weight=positive)
        results.append(
            _gradient(fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=2, backend=backend), episode)
        )
    assert _close(*results)


def test_bfloat16_rounds_and_stays_close():
    """The interpreter knows no TF32."""
    episode = [t.float() for t in _episode()]
    net = _net().float()
    exact = _gradient(_maml(net, "triton"), episode)
    torch.set_float32_matmul_precision("medium")
    try:
        rough = _gradient(_maml(net, "triton"), episode)
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rough, strict=True)]
    assert 1e-5 < max(errors) < 0.05
