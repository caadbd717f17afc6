"""The fuzzers in short, as the commands that they are, with fixed seeds: a failure comes from the
change that is tested.

They fork children, which must be done where PyTorch has started no threads: not in the process of
other tests.
"""

from __future__ import annotations

import os

import pytest
from commands import python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.parametrize(("name", "calls"), [("public_api", 450), ("arguments", 1000)])
def test_fuzzer_finds_no_fault(name: str, calls: int) -> None:
    last = python(f"{name}.py", "--calls", str(calls), "--seed", "20").splitlines()[-1]
    assert int(last.split(" calls")[0].split()[-1]) >= calls, last
    assert last.endswith(" 0 faults")


def test_fuzzer_finds_and_reduces_a_planted_fault() -> None:
    # a loop that forgets weight decay stands for a library that does
    script = """
import public_api
import solving
from running import fuzz

plain = solving.solve

def forgetful(meta):
    meta.weight_decay = 0.0
    return plain(meta)

solving.solve = forgetful
fuzz(public_api.draw, public_api.check, 200, seed=0, most_faults=1)
"""
    assert "Spec(weight_decay=0.1)" in python("-c", script)


def test_fuzzer_survives_a_crash_and_names_its_input() -> None:
    script = """
import os
import public_api
from running import fuzz

def check(spec):
    if spec.order == "first":
        os.abort()
    return 1, ""

fuzz(public_api.draw, check, 50, seed=0, most_faults=3)
"""
    faults = [line for line in python("-c", script).splitlines() if "SIGABRT" in line or "Spec(" in line]
    assert len(faults) == 6
    assert all("order='first'" in fault for fault in faults[1::2])
