"""Nothing of a user's module is ever another object after a call, and the check that every test
runs under sees it."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from types import SimpleNamespace

import pytest
import torch
from tensors import drawn
from torch import Tensor, nn
from unchanged import checked, differences, global_state, module_state

import fastmeta as fm

BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])


def _episode() -> list[Tensor]:
    return drawn((2, 4, 3), (2, 4, 2), (2, 5, 3), (2, 5, 2))


class _Keeps(nn.Module):
    """Keeps activations in every kind of attribute, and writes into tensors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.last: Tensor | None = None
        self.many: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}
        self.ordered: OrderedDict[str, Tensor] = OrderedDict()
        self.recent: deque[Tensor] = deque(maxlen=3)
        self.shapes: set[torch.Size] = set()
        self.nested = {"list": [torch.zeros(2)], "pair": (torch.zeros(2), [])}
        self.object = SimpleNamespace(output=None)
        self.total = torch.zeros(2)  # not a buffer
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        self.last = self.object.output = self.new = y
        self.many.append(y)
        self.by_name["y"] = self.ordered["y"] = y
        self.recent.append(y)
        self.shapes.add(y.shape)
        self.nested["list"].append(y)
        self.nested["pair"][1].append(y)
        self.nested["pair"][0].add_(1)
        self.total.add_(1)
        self.count.add_(1)
        self.linear.training = False
        return y


class _Replaces(nn.Module):
    """Replaces, adds and deletes what it has while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.gone: str | None = "attribute"
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x)) * self.scale
        vars(self).pop("gone", None)
        self._parameters["scale"] = self._parameters.pop("scale")  # now the first, or the last
        self.added = nn.Parameter(torch.ones(1))
        self.linear = nn.Sequential(self.linear)
        return y


class _Raises(_Replaces):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise LookupError("out of luck")


def _shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2))


def _tied() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(3, 2))


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class _Listed(nn.Module):
    """Keeps its parameters in a list and a tuple beside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
        self.weights = [layer.weight for layer in self.layers]
        self.biases = tuple(layer.bias for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.weights[0].T + self.biases[0])
        return hidden @ self.weights[1].T + self.biases[1]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(-1))[0][:, -1]


NETWORKS = {
    "keeps": _Keeps,
    "replaces": _Replaces,
    "shared": _shared,
    "tied": _tied,
    "listed": _Listed,
    "recurrent": _Recurrent,
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))),
    "old_weight_norm": _old_weight_norm,
    "spectral_norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))),
    "parameter_list": lambda: _Lists(),
}


class _Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.ones(3, 4), torch.ones(4)])
        self.dict = nn.ParameterDict({"out": torch.ones(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.list[0] + self.list[1]) @ self.dict["out"]


@BACKENDS
@pytest.mark.parametrize("name", NETWORKS)
def test_every_call_leaves_the_network_as_it_was(backend: str, name: str) -> None:
    net, episode = NETWORKS[name]().double(), _episode()
    before, values = module_state(net), copy.deepcopy(net.state_dict())
    own = list(net.parameters())
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
    for _ in range(2):
        maml.explain(*episode)
        maml(*episode).loss.backward()
        maml.predict(maml.adapt(*episode[:2]), episode[2])
    assert not differences(before, module_state(net))
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is not None for parameter in own)
    if name != "old_weight_norm":  # of which PyTorch makes no copies
        copy.deepcopy(net)
    net(episode[0][0])


@BACKENDS
def test_a_call_that_raises_leaves_the_network_as_it_was(backend: str) -> None:
    net = _Raises().double()
    before, state = module_state(net), global_state()
    with pytest.raises(ValueError, match="out of luck"):
        fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)(*_episode())
    assert not differences(before, module_state(net))
    assert not differences(state, global_state())


def test_the_check_sees_what_is_changed() -> None:
    net = _Keeps()

    def attribute(net: nn.Module) -> None:
        net.last = torch.ones(1)

    def content(net: nn.Module) -> None:
        net.many.append(1)

    def parameter(net: nn.Module) -> None:
        net.linear.weight = nn.Parameter(net.linear.weight.detach())

    def value(net: nn.Module) -> None:
        net.total.add_(1)

    def flag(net: nn.Module) -> None:
        net.linear.eval()

    def mode(net: nn.Module) -> None:
        torch.set_grad_enabled(False)

    def raises(net: nn.Module) -> None:
        net.last = torch.ones(2)
        raise KeyError

    for change in (attribute, content, parameter, value, flag, mode, raises):
        with pytest.raises(AssertionError, match="has changed"):
            checked(change, "it")(net)
        torch.set_grad_enabled(True)
