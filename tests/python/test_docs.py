"""Every Python block of README.md and of the pages in docs/ runs as it stands there.

The blocks of a page run from top to bottom in one namespace, in a directory of their own. One that
cannot run everywhere says so in the line before it, `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import peer

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
PAGES = sorted((CHECKOUT / "docs").glob("*.md"))

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*)(?P<rest>.*)$")
NOT_RUN = re.compile(r"^<!-- not run: \S.* -->$")


class Block(NamedTuple):
    """A block of Python and the line of its page on which it begins."""

    line: int
    code: str


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks that are to be run. Fails where something looks like one and is not."""
    blocks, excludes = [], False
    lines = enumerate(page.read_text().splitlines(), start=1)
    for number, line in lines:
        if fence := FENCE.match(line):
            block = Block(number + 1, _read_block(page, number, fence, lines))
            label = f"{fence['language']}{fence['rest']}".strip()
            if label != "python" and fence["language"].lower() in ("python", "python3", "py"):
                pytest.fail(f"{page.name}:{number}: a block that is run begins with ```python")
            if label == "python" and not excludes:
                blocks.append(block)
            if label != "python" and excludes:
                pytest.fail(f"{page.name}:{number - 1}: excludes a block that would not be run")
        elif excludes:
            pytest.fail(f"{page.name}:{number - 1}: stands directly before the block it excludes")
        before = line.strip()
        excludes = before.startswith("<!-- not run")
        if excludes and not NOT_RUN.match(before):
            pytest.fail(f"{page.name}:{number}: expected <!-- not run: REASON -->, got {before}")
    return blocks


def _read_block(
    page: Path, start: int, fence: re.Match[str], lines: Iterator[tuple[int, str]]
) -> str:
    code = []
    for _, line in lines:
        if re.fullmatch(rf" *{fence['fence'][0]}{{{len(fence['fence'])},}} *", line):
            return textwrap.dedent("\n".join(code))
        code.append(line)
    pytest.fail(f"{page.name}:{start}: the block does not end")


def run_page(page: Path, **names: Any) -> dict[str, Any]:
    """Runs the blocks of a page as one program and returns its namespace.

    Args:
        page: the Markdown file.
        names: what the page supposes to be there already.
    """
    program = sys.modules["__main__"] = ModuleType("__main__")
    program.__dict__.update(names)
    torch.manual_seed(0)
    for block in blocks_of(page):
        try:
            # Behind empty lines, so that the traceback's numbers are those of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, program.__dict__)
        except Exception as error:
            pytest.fail(f"{page.name}:{_line_of(error, page)}: {type(error).__name__}: {error}")
    return program.__dict__


def _line_of(error: Exception, page: Path) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(page):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next(frame.lineno for frame in reversed(frames) if frame.filename == str(page))


@pytest.fixture(autouse=True)
def own_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A directory and a main module that a page may do with as it likes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path):
    run_page(page)


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_the_examples_of_the_readme_run():
    class Block(torch.nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.mlp = torch.nn.Linear(dim, dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(*(Block(16) for _ in range(3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    assert blocks_of(README)
    x, y = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    names = run_page(README, model=Model(), dim=16, x=x, y=y, batches=[(x, y)])
    layer = names["model"].blocks[1].mlp
    assert isinstance(layer, peer.PEER)
    stepped = [p for optimizer in names["optimizers"] for p in optimizer.state]
    assert {id(p) for p in stepped} == {id(p) for p in names["model"].parameters()}
    assert set(names["optimizers"][1].state) == {layer.experts.weight}


class TestReadingPages:
    """What counts as an example, and what a failing one says."""

    @pytest.fixture
    def page(self, tmp_path: Path) -> Path:
        return tmp_path / "page.md"

    def test_blocks_share_a_namespace_and_other_languages_are_left_alone(self, page: Path):
        page.write_text(
            "```python\na = 1\n```\n```sh\nfalse\n```\n- b:\n  ```python\n  b = a + 1\n  ```"
        )
        assert run_page(page)["b"] == 2

    def test_a_page_without_examples_runs(self, page: Path):
        page.write_text("# Nothing\n\n```\nraise\n```\n")
        assert blocks_of(page) == []

    def test_a_function_in_a_block_has_its_source(self, page: Path):
        page.write_text(
            "```python\nimport inspect\ndef f():\n    return 7\na = inspect.getsource(f)\n```"
        )
        assert run_page(page)["a"] == "def f():\n    return 7\n"

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("a = 1\nassert a == 2", r"page\.md:4: AssertionError"),
            ("def f():\n    raise ValueError('no')\nf()", r"page\.md:4: ValueError: no"),
            ("a = 1\nb = = 2", r"page\.md:4: SyntaxError"),
        ],
    )
    def test_a_failing_example_is_named_by_page_and_line(self, page: Path, code: str, message: str):
        page.write_text(f"text\n```python\n{code}\n```\n")
        with pytest.raises(pytest.fail.Exception, match=message):
            run_page(page)

    def test_a_block_may_be_excluded_with_a_reason(self, page: Path):
        page.write_text("<!-- not run: needs a GPU -->\n```python\nraise ValueError\n```\n")
        assert blocks_of(page) == []

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<!-- not run -->\n```python\n```", "md:1: expected <!-- not run: REASON -->"),
            ("<!-- not run: slow -->\n\n```python\n```", "md:1: stands directly before"),
            ("<!-- not run: slow -->\n```sh\n```", "md:1: excludes a block that would not"),
            ("```python title\n```", "md:1: a block that is run begins with ```python"),
            ("```py\n```", "md:1: a block that is run begins with ```python"),
            ("```python\n1", "md:1: the block does not end"),
        ],
    )
    def test_what_would_be_left_out_silently_is_an_error(self, page: Path, text: str, message: str):
        page.write_text(text)
        with pytest.raises(pytest.fail.Exception, match=message):
            blocks_of(page)
