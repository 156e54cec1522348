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


# The packages that a page needs and that are not requirements of its readers otherwise.
PACKAGES = {"swap.md": ("transformers", "accelerate")}


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
    for package in PACKAGES.get(page.name, ()):
        pytest.importorskip(package)
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
    x, y = torch.randn(32, 16), torch.randn(32, 16)
    paper = peer.PEER(16, num_experts=144, heads=3, num_experts_per_head=4, dim_key=8)
    plain = {
        "query": torch.nn.Sequential(paper.router.query, paper.router.norm),
        "row_keys": paper.router.row_keys,
        "col_keys": paper.router.col_keys,
        "table": paper.experts.weight,
        "H": 3,
        "K": 4,
        "torch": torch,
        "F": torch.nn.functional,
    }
    names = run_page(README, model=Model(), dim=16, x=x, y=y, batches=[(x, y)], **plain)
    torch.testing.assert_close(names["out"], paper(x))
    torch.testing.assert_close(names["out"], peer.reference.peer(paper, x))
    layer = names["model"].blocks[1].mlp
    assert isinstance(layer, peer.PEER)
    optimizer = names["optimizer"]  # the last one, whose updates of tables are fused
    assert {id(p) for p in optimizer.state} == {id(p) for p in names["model"].parameters()}
    assert layer.experts.fused_update is not None


LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#]*)(?:#(?P<heading>[^)]*))?\)")


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
@pytest.mark.parametrize(
    "page", [README, CHECKOUT / "CONTRIBUTING.md", *PAGES], ids=lambda p: p.name
)
def test_links_lead_to_files_and_headings(page: Path):
    for link in LINK.finditer(page.read_text()):
        target = (page.parent / link["file"]).resolve() if link["file"] else page
        assert target.exists(), f"{page.name} links to {link['file']}, which does not exist"
        if link["heading"]:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert link["heading"] in slugs, f"{page.name}: no heading for {link[0]}"


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_files_in_the_map_of_the_design_exist():
    page = (CHECKOUT / "docs" / "design.md").read_text()
    section = page[page.index("## Map") : page.index("## The table")]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3] == "| `"]
    assert len(rows) == 4
    for _, operators, kernels, tests in rows:
        for name in re.findall(r"`(\w+)`", operators):
            assert (CHECKOUT / "csrc" / "ops" / f"{name}.cpp").exists(), name
            for key in "autograd", "meta", "cpu", "cuda":
                # One file says that no update has a derivative.
                file = "table_update" if (key, name) == ("autograd", "fused_update") else name
                assert (CHECKOUT / "csrc" / "ops" / key / f"{file}.cpp").exists(), (key, name)
        for name in re.findall(r"`(\w+)`", kernels):
            for device in "cpu", "cuda":
                found = (CHECKOUT / "csrc" / "kernels" / device).glob(f"{name}.c*")
                assert list(found), (device, name)
        for name in re.findall(r"`(test_\w+)", tests):
            assert list((CHECKOUT / "tests").rglob(f"{name}.*")), name


@pytest.mark.long
class TestSupportMatrix:
    """What README's matrix says of CPUs, where no other test covers a dtype."""

    class Layers(torch.nn.Module):
        """One layer for each dtype, all applied to the same tokens."""

        def __init__(self) -> None:
            super().__init__()
            options = {"num_experts": (6, 5), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
            self.in_float32 = peer.PEER(10, query_norm="layer", **options)
            self.in_bfloat16 = peer.PEER(10, query_norm="layer", dtype=torch.bfloat16, **options)
            self.in_float16 = peer.PEER(10, query_norm="layer", dtype=torch.float16, **options)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return (
                self.in_float32(x),
                self.in_bfloat16(x.to(torch.bfloat16)),
                self.in_float16(x.to(torch.float16)),
            )

    @pytest.fixture
    def layers(self) -> Layers:
        torch.manual_seed(0)
        return self.Layers()

    @pytest.fixture
    def x(self) -> torch.Tensor:
        return torch.randn(4, 7, 10)

    @staticmethod
    def gradients(layers: torch.nn.Module, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        loss = sum(out.float().square().sum() for out in outputs)
        return list(torch.autograd.grad(loss, list(layers.parameters())))

    def assert_steps_like(self, call: Any, layers: Layers, x: torch.Tensor) -> None:
        expected = layers(x)
        found = call(x)
        torch.testing.assert_close(found, expected)
        assert [out.dtype for out in found] == [torch.float32, torch.bfloat16, torch.float16]
        for a, b in zip(
            self.gradients(layers, found), self.gradients(layers, expected), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)

    def test_torchscript(self, layers: Layers, x: torch.Tensor):
        self.assert_steps_like(torch.jit.script(layers), layers, x)

    def test_compile(self, layers: Layers, x: torch.Tensor):
        compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
        self.assert_steps_like(compiled, layers, x)

    def test_export_and_aotinductor(self, layers: Layers, x: torch.Tensor, tmp_path: Path):
        sizes = {0: torch.export.Dim("sequences"), 1: torch.export.Dim("length")}
        program = torch.export.export(layers, (x,), dynamic_shapes=(sizes,))
        longer = torch.randn(3, 11, 10)
        torch.testing.assert_close(program.module()(longer), layers(longer))
        with torch.no_grad():
            program = torch.export.export(layers, (x,), dynamic_shapes=(sizes,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layers.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(tuple(loaded(longer)), layers(longer), rtol=2e-2, atol=2e-2)

    def test_func(self, layers: Layers, x: torch.Tensor):
        def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(layers, parameters, (sample,))
            return sum(out.float().square().sum() for out in outputs)

        parameters = {name: p.detach() for name, p in layers.named_parameters()}
        samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        together = torch.func.grad(loss)(parameters, x)
        directions = {name: torch.randn_like(p) for name, p in parameters.items()}
        _, tangent = torch.func.jvp(lambda p: loss(p, x), (parameters,), (directions,))
        product = 0.0
        for name, gradient in together.items():
            assert gradient.dtype == parameters[name].dtype
            torch.testing.assert_close(
                samples[name].float().sum(0), gradient.float(), rtol=5e-2, atol=5e-2
            )
            product += float((gradient.float() * directions[name].float()).sum())
        assert float(tangent) == pytest.approx(product, rel=5e-2)


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
