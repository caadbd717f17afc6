"""The fuzzers in short: fixed seeds, so that a failure comes from the change that is tested."""

from __future__ import annotations

import arguments
import public_api
import pytest
from running import fuzz

FUZZERS = {"public_api": (public_api, 600), "arguments": (arguments, 1000)}


@pytest.mark.parametrize("name", FUZZERS)
def test_fuzzer_finds_no_fault(name: str) -> None:
    fuzzer, calls = FUZZERS[name]
    report = fuzz(fuzzer.draw, fuzzer.check, calls, seed=20)
    assert report.calls >= calls
    assert report.faults == []


def test_fuzzer_finds_and_reduces_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # a loop that forgets weight decay stands for a library that does
    plain = public_api.solve

    def forgetful(meta: public_api.Meta) -> object:
        meta.weight_decay = 0.0
        return plain(meta)

    monkeypatch.setattr(public_api, "solve", forgetful)
    report = fuzz(public_api.draw, public_api.check, 200, seed=0, most_faults=1)
    assert "Spec(weight_decay=0.1)" in report.faults[0]


def test_fuzzer_survives_a_crash_and_names_its_input() -> None:
    import os

    def check(spec: public_api.Spec) -> tuple[int, str]:
        if spec.order == "first":
            os.abort()
        return 1, ""

    report = fuzz(public_api.draw, check, 50, seed=0, most_faults=3)
    assert len(report.faults) == 3
    assert all("SIGABRT" in fault and "order='first'" in fault for fault in report.faults)
