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
    }
    assert all(len(found) <= 1 for found in blocks.values())
    return {title: found[0] for title, found in blocks.items() if found}


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
