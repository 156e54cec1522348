"""docs/install.md contains only tested commands, and every environment variable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from environments import CHECKOUT

PAGE = (CHECKOUT / "docs" / "install.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", [line for block in blocks("sh") for line in block.splitlines()])
def test_command_is_run_by_these_tests(command: str):
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f'"{command}"' in source for source in sources)


def variables() -> set[str]:
    """The environment variables that the build and the package read."""
    sources = [
        CHECKOUT / "setup.py",
        *(CHECKOUT / "build_backend").glob("*.py"),
        *(CHECKOUT / "peer").glob("*.py"),
        *(CHECKOUT / "csrc").rglob("*.cpp"),
    ]
    read = r'(?:getenv\(|environ\[|environ\.get\()"(\w+)"'
    return {name for source in sources for name in re.findall(read, source.read_text())}


@pytest.mark.parametrize("name", sorted(variables()))
def test_variable_is_documented_and_reported(name: str):
    assert re.search(rf"^\| [^|]*`{name}`", PAGE, re.MULTILINE)
    assert f'"{name}"' in (CHECKOUT / "peer" / "collect_env.py").read_text()
