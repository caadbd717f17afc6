"""Whatever the pages name is there: paths, links, sections, commands and their options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

from fastmeta.cli import main
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind

ROOT = Path(__file__).parents[2]
#: Every page but the history, which names what is gone.
FOLDERS = (".", "bench", "docs")
PAGES = sorted(
    page for folder in FOLDERS for page in (ROOT / folder).glob("*.md") if page.stem != "CHANGELOG"
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

#: A path: words of these characters with a slash between them; `<kind>` and `*` stand for anything.
_PATH = re.compile(r"\.?[\w.<>*-]+(?:/[\w.<>*-]+)*/?")
#: What a command makes, and the files of the layer kind that a page has the reader write.
_MADE = re.compile(r"runs/.*|\.venv/.*|lambda/2|.*/flip\.\w+")
#: Whatever may stand before the command: an environment variable, the folder of an environment.
_BEFORE = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?")


def _fenced(text: str) -> list[str]:
    """The lines of code blocks, whether fenced or indented."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    .*$", text, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()] + [x.strip() for x in indented]


def _quoted(text: str) -> list[str]:
    """What stands in backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def _there(path: str, folder: Path = ROOT) -> bool:
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return any(ROOT.glob(pattern)) or any(folder.glob(pattern))


def _missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    paths = [word for word in _quoted(text) if "/" in word and _PATH.fullmatch(word)]
    return [path for path in paths if not _MADE.fullmatch(path) and not _there(path, folder)]


def _anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"\w+:", link):  # somewhere else
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _commands(text: str) -> Iterator[list[str]]:
    """The words of every command of ours, without what stands before it."""
    for line in (*_quoted(text), *_fenced(text)):
        line = line[_BEFORE.match(line).end() :]  # type: ignore[union-attr]
        if re.match(r"(python|pytest|fastmeta|make) \S", line) and " = " not in line:
            # a comment, options left out, or a placeholder end what can be checked
            yield shlex.split(re.split(r" # | \.\.\.|<|'<", line)[0])


def _wrong_commands(text: str) -> list[str]:
    return [" ".join(words) for words in _commands(text) if not _runs(words)]


def _runs(words: list[str]) -> bool:
    program, *rest = words
    if program == "fastmeta":
        return _is_subcommand(main, rest)
    if program == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return all("=" in word or word.startswith(".venv") or word in targets for word in rest)
    if rest[:2] == ["-m", "fastmeta"]:
        return _is_subcommand(main, rest[2:])
    paths = [word for word in rest if re.fullmatch(r"[\w./-]+\.py|(tests|bench)/?[\w./-]*", word)]
    options = set(re.findall(r"--[\w-]+", " ".join(rest))) if program == "python" and paths else set()
    # a script may take its options from another file of its folder
    beside = [found for path in paths[:1] for found in (ROOT / path).parent.glob("*.py")]
    known = "\n".join(path.read_text() for path in beside)
    options -= set() if paths != ["setup.py"] else options
    return all(map(_there, paths)) and all(f'"{option}"' in known for option in options)


def _is_subcommand(group: click.Command, words: list[str]) -> bool:
    """Whether the words name a command, and options that it has."""
    while isinstance(group, click.Group) and words and words[0] in group.commands:
        group, *words = group.commands[words[0]], *words[1:]
    if words and isinstance(group, click.Group) and not words[0].startswith("-"):
        return False
    options = {name for parameter in group.params for name in parameter.opts} | {"--help", "--version"}
    return all(word.partition("=")[0] in options for word in words if word.startswith("-"))


@each_page
def test_paths_are_there(page: Path) -> None:
    assert not _missing_paths(page.read_text(), page.parent)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    assert not _broken_links(page, page.read_text())


@each_page
def test_commands_can_be_given(page: Path) -> None:
    assert not _wrong_commands(page.read_text())


def test_finds_what_is_wrong(tmp_path: Path) -> None:
    assert _missing_paths("see `fastmeta/nowhere.py` and `kernels/<kind>.py`") == ["fastmeta/nowhere.py"]
    page = tmp_path / "page.md"
    page.write_text("# One heading\n")
    text = "[a](page.md) [b](page.md#one-heading) [c](page.md#another) [d](other.md) [e](https://x.org)"
    assert _broken_links(page, text) == ["page.md#another", "other.md"]
    right = "`fastmeta verify --case x` `make test` `python bench/sinusoid.py --seeds 2` `pytest bench`"
    assert not _wrong_commands(right)
    wrong = ["fastmeta prove", "fastmeta verify --nothing", "make nothing", "python bench/nothing.py"]
    wrong += ["python bench/sinusoid.py --nothing", "pytest tests/nothing"]
    assert _wrong_commands(" ".join(f"`{command}`" for command in wrong)) == wrong


def _from_page(name: str, folder: Path) -> ModuleType:
    """A file of Python that docs/adding-a-layer.md shows, imported."""
    text = (ROOT / "docs" / "adding-a-layer.md").read_text()
    shown = re.search(rf"`{re.escape(name)}`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    path = folder / name.replace("/", "_")
    path.write_text(shown.group(1))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_the_layer_kind_that_the_reader_writes_is_one(tmp_path: Path) -> None:
    kind = _from_page("fastmeta/layers/flip.py", tmp_path).KIND
    assert isinstance(kind, LayerKind)
    for example in kind.examples:
        x = torch.randn(3, *example.shapes[0])
        assert torch.equal(example.make()(x), kind.forward(Layer("flip", (0,), example.shapes[0]), {}, x))
    assert [case.build().net is not None for case in kind.cases()] == [True, True]


def test_the_triton_kernels_that_the_reader_writes_are_some(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = _from_page("kernels/flip.py", tmp_path)
    assert all(
        callable(getattr(module, name)) for name in ("forward", "backward", "tangent", "tangent_backward")
    )


def test_tree_has_every_folder() -> None:
    """The tree that docs/architecture.md begins with, and the folders that files are in."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    named, top = set(), ""
    for line in re.findall(r"^ {0,2}\w.*", tree, re.MULTILINE):
        folder = line.split()[0].rstrip("/")
        top = top if line.startswith(" ") else folder
        named.add(f"{top}/{folder}" if line.startswith(" ") else top)
        if line.startswith("tests/"):
            named |= {f"tests/{found}" for found in re.findall(r"(\w+)/", line[6:])}
    sources = [path for top in named if "/" not in top for path in (ROOT / top).rglob("*.*")]
    sources = [path for path in sources if path.suffix in (".py", ".h", ".inl", ".cpp", ".md")]
    parts = [path.relative_to(ROOT).parts[:-1][:2] for path in sources]
    folders = {"/".join(part) for part in parts} | {part[0] for part in parts}
    assert named == folders


def test_code_names_sections_that_are_there() -> None:
    """A comment like `docs/architecture.md, "Cost"`, over the end of a line too."""
    wrong = []
    for folder in ("fastmeta", "kernels", "csrc", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path == Path(__file__) or path.suffix not in (".py", ".h", ".inl", ".cpp"):
                continue
            text = re.sub(r"\s+(?:#|//)?:?\s*", " ", path.read_text())
            for page, section in re.findall(r"docs/([\w-]+\.md)(?:, \"([^\"]+)\")?", text):
                target = ROOT / "docs" / page
                heading = re.compile(rf"^#+ {re.escape(section)}$", re.MULTILINE)
                if not target.exists() or (section and not heading.search(target.read_text())):
                    wrong.append((str(path.relative_to(ROOT)), page, section))
    assert not wrong
