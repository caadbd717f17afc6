"""The snippets of docs/migration.md, as they stand there: every library gives the same
meta-gradient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_autograd import error, leaves, meta_losses

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
#: Section -> the package that it needs, besides torch and fastmeta.
NEEDS = {
    "fastmeta": "",
    "learn2learn": "learn2learn",
    "higher": "higher",
    "TorchOpt": "torchopt",
    "torch.func": "",
}


def _snippets() -> dict[str, str]:
    """Section -> its one block of Python."""
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = {
        title: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for title, text in sections
        if title != "Update rules"
    }
    assert all(len(found) <= 1 for found in blocks.values())
    return {title: found[0] for title, found in blocks.items() if found}


def _pairs() -> dict[str, tuple[str, str]]:
    """Part of "Update rules" -> its two blocks, another library's and ours."""
    (section,) = re.findall(r"^## Update rules\n(.*?)(?=^## )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    parts = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", section, re.MULTILINE | re.DOTALL)
    found = {}
    for title, text in parts:
        theirs, ours = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        found[title] = theirs, ours
    return found


#: Part of "Update rules" -> the package that it needs.
PAIRS = {
    "higher, override": "higher",
    "TorchOpt, meta-optimisers": "torchopt",
    "torch.optim on a copy for each task": "torch",
}


@pytest.fixture(autouse=True)
def _double(one_thread: None) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _setting() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(_snippets()["The setting"], names)
    return names


def test_every_section_is_tested() -> None:
    assert list(_snippets()) == ["The setting", *NEEDS]


@pytest.mark.parametrize("library", NEEDS)
def test_snippet_gives_the_meta_gradient_of_the_plain_loop(library: str) -> None:
    if NEEDS[library]:
        pytest.importorskip(NEEDS[library], reason=f"{library} is not installed")
    names = _setting()
    net, episodes = names["net"], names["episodes"]
    leaf_of = dict(net.named_parameters())  # some libraries put other tensors into the module as they go
    expected = []
    params = leaves(net)
    for episode in episodes:
        gradients = torch.autograd.grad(
            meta_losses(net, params, list(episode), 0.1, 3).mean(), list(params.values())
        )
        expected.append(dict(zip(params, gradients, strict=True)))
        params = {
            name: (p - 0.01 * expected[-1][name]).detach().requires_grad_() for name, p in params.items()
        }

    found: list[dict[str, torch.Tensor]] = []
    step = names["outer"].step

    def recorded() -> None:
        found.append({name: leaf.grad.clone() for name, leaf in leaf_of.items()})
        step()

    names["outer"].step = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        exec(_snippets()[library], names)
    assert len(found) == len(episodes) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name, want in theirs.items():
            assert error(ours[name], want) < 1e-9, name
    for name, value in params.items():
        assert error(leaf_of[name].detach(), value.detach()) < 1e-9, name


def _left(code: str) -> dict[str, torch.Tensor]:
    """What a block of "Update rules" leaves: gradients at every outer step, those of learned
    numbers, adapted parameters."""
    names = _setting()
    leaves = dict(names["net"].named_parameters())  # TorchOpt puts other tensors into the module
    found: dict[str, torch.Tensor] = {}
    step = names["outer"].step

    def recorded() -> None:
        number = len(found)
        found.update({f"{number} {name}": leaf.grad.clone() for name, leaf in leaves.items()})
        step()

    names["outer"].step = recorded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    for name in ("lr", "momentum"):
        if name in names:
            found[name] = names[name].grad
    return found | names.get("adapted", {})


@pytest.mark.parametrize("part", PAIRS)
def test_both_blocks_of_an_update_rule_leave_the_same(part: str) -> None:
    pytest.importorskip(PAIRS[part], reason=f"{PAIRS[part]} is not installed")
    theirs, ours = map(_left, _pairs()[part])
    assert theirs.keys() == ours.keys()
    assert theirs
    for name, value in theirs.items():
        assert error(ours[name], value) < 1e-9, name


def test_every_update_rule_is_tested() -> None:
    assert list(_pairs()) == [*PAIRS]


@pytest.mark.parametrize("part", PAIRS)
def test_our_block_of_an_update_rule_runs(part: str) -> None:
    """Where the other library is not installed; tests/update_rules compares the rules."""
    assert all(bool(value.isfinite().all()) for value in _left(_pairs()[part][1]).values())
