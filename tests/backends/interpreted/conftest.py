"""Tests that need Triton's interpreter: `tests/backends/test_triton_interpreted.py` runs them in a
process of their own."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter
else:
    collect_ignore_glob = ["test_*.py"]


class _Kept:
    """The scope of a patch that another one has made already."""

    def restore(self) -> None:
        """Nothing to put back."""


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    """The interpreter patches Triton's language anew at every call of a device function, and checks
    every integer for overflow; two thirds of its time. Patched once a launch it computes the
    same."""
    patch, scopes, patched = interpreter._patch_lang, [], set()

    def once(function: object) -> object:
        modules = {id(m) for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)}
        if modules <= patched:
            return _Kept()
        scope = patch(function)
        if not scopes:
            restore = scope.restore

            def done() -> None:
                scopes.clear()
                patched.clear()
                restore()

            scope.restore = done
            scopes.append(scope)
        patched.update(modules)
        return scope

    interpreter._patch_lang = once
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter._patch_lang = patch
    interpreter.interpreter_builder.options = options
