"""What README and docs say is run: their Python, their commands' form, their links and numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^<!-- command: (\w+) -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page, in order, in one namespace, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    # What a page measures here need not be the machine's real ceilings.
    monkeypatch.setattr("fusedmoe.bench.ceilings._ELEMENTS", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr("fusedmoe.bench.ceilings._MATMUL", {"cpu": 64, "cuda": 64})
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text()
    for body in blocks(page, "python"):
        line = text[: text.index(body)].count("\n")
        # Blank lines in front, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * line + body, str(page), "exec"), namespace)


def readme_commands() -> dict[str, str]:
    return {name: body.strip() for name, body in MARKED.findall((ROOT / "README.md").read_text())}


def test_readme_has_exactly_two_commands_of_one_line() -> None:
    assert list(readme_commands()) == ["run", "test"]
    for command in readme_commands().values():
        assert "\n" not in command
    assert len(blocks(ROOT / "README.md", "bash")) == 2


def test_the_run_command_is_understood_by_the_cli() -> None:
    from fusedmoe.cli import make_parser

    words = shlex.split(readme_commands()["run"].rpartition("&&")[2])
    assert words[0] == ".venv/bin/fusedmoe"
    args = make_parser(words[1:]).parse_args(words[1:])
    assert (args.verb, args.preset, args.compare) == ("generate", "tiny-mixtral", True)


def test_ci_runs_the_readmes_test_command() -> None:
    """CI reads the line out of README; nobody may write it down a second time."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- command: test -->" in script
    assert "pytest" not in script
    assert "pytest" in readme_commands()["test"]


def test_quick_starts_take_twelve_lines() -> None:
    starts = blocks(ROOT / "README.md", "python")
    assert len(starts) == 3
    for start in starts:
        assert len([line for line in start.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_speed_is_claimed_without_a_results_file(page: Path) -> None:
    """A line with a speed-up or a rate stands in a section that names a results file."""
    claim = re.compile(
        r"\d+(?:\.\d+)?\s*(?:x|times) (?:faster|the speed)|\d\s*(?:tokens/s|TFLOPS?)"
    )
    for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
        if claim.search(section):
            files = re.findall(r"benchmarks/results/[\w./-]+\.json", section)
            assert files, f"{page.name}: {section.splitlines()[0]}"
            assert all((ROOT / name).exists() for name in files)


def test_the_readme_names_every_experts_implementation() -> None:
    """By the names that selection and ``fusedmoe env`` use."""
    from fusedmoe.selection import EXPERTS, _load, name_of

    table = (
        (ROOT / "README.md").read_text().partition("## What runs where")[2].partition("\n## ")[0]
    )
    for path in EXPERTS:
        name = name_of(_load(path))
        assert f"`{name}`" in table, f"{name} is missing in the README's table of what runs where"


def test_the_limits_of_the_kernels_for_hopper_are_told() -> None:
    from fusedmoe.kernels.hopper_decode import ALIGNED_ELEMENTS
    from fusedmoe.kernels.releases import KNOWN_RELEASES
    from fusedmoe.tuning.hopper_tiles import MAX_PICKS

    page = " ".join((ROOT / "docs" / "architecture.md").read_text().split())
    first, *_, last = (release.rstrip(".") for release in KNOWN_RELEASES)
    assert f"Triton is not {first} to {last}" in page
    assert f"want Triton {first} to {last}" in (ROOT / "README.md").read_text()
    assert f"more than {MAX_PICKS} picks" in page
    assert f"multiples of {ALIGNED_ELEMENTS}" in page


def test_the_glossary_defines_the_terms_of_the_public_names() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text().lower()
    for term in ("w13", "prepare", "finalize", "monolithic", "modular", "expert map", "top-k"):
        assert term in glossary, term


def test_the_page_of_names_has_every_public_name_once() -> None:
    import fusedmoe

    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "names.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(set(fusedmoe.__all__) - {"__version__"})


def test_architecture_lists_every_room() -> None:
    """Each folder and module directly under the package is on the page, and nothing else is."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    source = ROOT / "src" / "fusedmoe"
    rooms = {f"{p.name}/" for p in source.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.name for p in source.glob("*.py")}
    tree = FENCE.search(page[page.index("src/fusedmoe/") - 10 :])
    assert tree is not None
    drawn = set(re.findall(r"^  (\w+(?:/|\.py))(?=\s)", tree.group(2), flags=re.MULTILINE))
    assert drawn == rooms
