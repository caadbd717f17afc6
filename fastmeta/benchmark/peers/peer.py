"""What a peer is: one way to compute the meta-gradient of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta.cases import Case, Instance
from fastmeta.cases.rules import rule_of_case
from fastmeta.errors import BackendUnavailable
from fastmeta.update_rules import Adam


@dataclass(slots=True)
class Prepared:
    """A peer ready to run one case: data converted, nothing run yet."""

    step: Callable[[], Any]  # loss and gradient of the meta-parameters, finished when it returns
    gradient: Callable[
        [Any], dict[str, Tensor]
    ]  # what `step` returned -> name -> gradient, as the net names it
    inside: Callable[[], float] | None = None  # seconds of the last step spent in the kernel
    # of fastmeta: the name of the backend that runs it; asked after the first step, for it may take
    # as long
    backend: Callable[[], str] | None = None


def sgd_alone(case: Case) -> None:
    """For peers that have no other inner optimiser.

    Raises:
        BackendUnavailable: the case has another update rule.
    """
    if case.rule:
        raise BackendUnavailable(f"its inner steps are those of SGD, not {case.rule}")


def adam_of(case: Case) -> Adam | None:
    """The Adam of plain numbers that a case has inside; None for SGD.

    Raises:
        BackendUnavailable: the case has another update rule.
    """
    if not case.rule:
        return None
    rule = rule_of_case(case.rule, torch.float32, torch.device("cpu"), case.steps)
    if type(rule) is not Adam or rule.learned or rule.numbers["weight_decay"]:
        raise BackendUnavailable(f"its inner steps are those of SGD or Adam, not {case.rule}")
    return rule


class Peer(Protocol):
    """One way to compute the meta-gradient; each is one small file of
    `fastmeta.benchmark.peers`."""

    name: str

    def missing(self) -> str:
        """Why it cannot run here, "" if it can."""

    def version(self) -> str:
        """Of the package that does the work."""

    def prepare(self, case: Case, made: Instance) -> Prepared:
        """Convert the data of `made`; whatever compiles does so in the first step."""


def not_installed(*packages: str) -> str:
    """Why a peer that needs these packages is missing, "" if they are all here."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def installed_version(package: str) -> str:
    """The version of an installed distribution, "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
