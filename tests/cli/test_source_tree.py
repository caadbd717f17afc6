"""What holds for the source tree as a whole: imports run one way, files are short, tests do not
import each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from import_graph import circle, import_graph, sources_of

ROOT = Path(__file__).parents[2]
MOST_LINES = 450
SOURCES = ("*.py", "*.pyi", "*.h", "*.inl", "*.cpp", "*.cu", "*.cuh")
# being split; to be removed from here as soon as they are
TOO_LONG = {"csrc/cpu/meta_step.h", "kernels/elementwise.py"}


def _files(*folders: str) -> list[Path]:
    found = {path for folder in folders for form in SOURCES for path in (ROOT / folder).rglob(form)}
    assert len(found) > 10
    return sorted(found)


def test_imports_run_one_way() -> None:
    graph = import_graph(sources_of(ROOT / "fastmeta", "fastmeta"))
    # the registry imports whatever lies in its folder
    graph["fastmeta.layers.registry"] |= {name for name in graph if name.startswith("fastmeta.layers.")} - {
        "fastmeta.layers.registry"
    }
    assert "fastmeta.ops.plan" in graph["fastmeta.algorithms.machinery"]
    assert not circle(graph)


@pytest.mark.parametrize(
    "second",
    [
        "import p.a",
        "from p import a",
        "from p.a import x",
        "def f():\n    import p.a",
        "if TYPE_CHECKING:\n    from p.a import X",
    ],
)
def test_finds_a_circle(second: str) -> None:
    graph = import_graph({"p": "", "p.a": "from p.b import y", "p.b": second, "p.c": "import p.a"})
    assert set(circle(graph)) == {"p.a", "p.b"}
    assert not circle({**graph, "p.b": set()})


def test_no_file_is_longer_than_a_few_screens() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in _files("fastmeta", "kernels", "csrc", "tests", "bench", "examples")
    }
    assert {name for name, count in lines.items() if count > MOST_LINES} - TOO_LONG == set()


def test_tests_do_not_import_each_other() -> None:
    tests = {path.stem: path for path in _files("tests") if path.name.startswith("test_")}
    for path in _files("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else ():
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name for name in modules if name in tests}, path


def test_pages_name_files_of_the_benchmarks_that_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]
    named = {name for page in pages for name in re.findall(r"\bbench/[\w./-]*\w", page.read_text("utf-8"))}
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]


def test_results_are_named_by_workload_machine_and_day() -> None:
    files = [*(ROOT / "bench" / "results").iterdir()]
    assert files
    form = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+-\d{4}-\d\d-\d\d\.csv")
    assert not [file.name for file in files if not form.fullmatch(file.name)]
