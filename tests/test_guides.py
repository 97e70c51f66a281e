"""README and guides: within their length, links that lead somewhere, and every command run or marked as needing a GPU."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, write_pairs
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]
GPU = "<!-- needs a GPU -->"
BLOCK = re.compile(r"(<!-- [a-z A-Z]+ -->\n)?```bash\n(.*?)```", re.S)
SHOWN = {"demo", "doctor"}
"""Commands with tests of their own that take minutes or look at the machine."""


def commands(page: Path) -> list[list[str]]:
    """The `drm` commands of a page's unmarked blocks, as lists of words; an environment's installation is not one."""
    found = []
    for mark, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if mark.strip() != GPU:
            words = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("drm ")]
            found += [w[1:] for w in words if w[1] not in SHOWN]
    return found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for target in re.findall(r"`?python (examples/\S+\.py)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_runs(page: Path, drm: Callable[..., Outcome], tmp_path: Path) -> None:
    """In order, in a folder with twelve pairs of pictures under the names that the pages use."""
    file = write_pairs(tmp_path, 12)
    for name, source in (("a", "0-a"), ("b", "0-b"), ("c", "1-b")):
        Image.open(tmp_path / f"{source}.png").save(tmp_path / f"{name}.webp")
    Image.open(tmp_path / "0-a.png").save(tmp_path / "0_0.png")
    assert file.name == "pairs.jsonl"
    if written := re.search(r"^echo '(.+?)' > pairs.jsonl", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        file.write_text(written[1] + "\n")
    (tmp_path / "prompts.txt").write_text("a large red circle\na small green triangle on the left\n")
    for words in commands(page):
        result = drm(*words, "--quiet") if words[0] not in ("data", "config", "show") else drm(*words)
        assert result.code == 0, (words, result.err)


def test_the_command_reference_is_that_of_the_command_line() -> None:
    """Made again by `python -m drmcli.cli.reference > examples/guides/commands.md`."""
    from drmcli.cli.reference import page

    assert (ROOT / "examples" / "guides" / "commands.md").read_text(encoding="utf-8") == page()
