"""The documents say what the code does, and their commands are the ones that are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
BACKPROP = (REPO / "docs" / "backprop.md").read_text(encoding="utf-8")
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), REPO / "kernels" / "README.md"]


def _flat(text: str) -> str:
    return re.sub(r"\s+|,\s*(?=\))", "", text)


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert len(commands) == 1
    assert commands[0] in (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", README, re.S)
    quick = '"train.steps=20", "data.source=stdlib-words"'
    assert '"train.steps=2000"' in source
    exec(source.replace('"train.steps=2000"', quick), {})
    printed = capsys.readouterr().out
    assert "step 20" in printed
    assert printed.count("'em") == 5


def test_backprop_mirrors_the_model():
    source = (REPO / "gpu_microgpt" / "model.py").read_text(encoding="utf-8")
    start, middle = source.index("def _forward"), source.index("def backward")
    call = re.compile(r"^\s+(ops\.\w+\([^()]*\))$", re.M)
    rows = re.findall(r"^\| \d+ \| (?:`(.*?)` )?\| `(.*?)` \|", BACKPROP, re.M)
    forward = [f for f, _ in rows if f and "cross_entropy" not in f and "ops.attention(" not in f]
    assert [*map(_flat, forward)] == [*map(_flat, call.findall(source[start:middle]))]
    backward = [b for _, b in reversed(rows)]
    assert [*map(_flat, backward)] == [*map(_flat, call.findall(source[middle:]))]


def test_backprop_quotes_the_code():
    paths = [*(REPO / "gpu_microgpt").rglob("*.py"), *(REPO / "tests").rglob("*.py")]
    source = _flat("\n".join(path.read_text(encoding="utf-8") for path in paths))
    first_cells = re.findall(r"^\| (`[^|]*`) \|", BACKPROP, re.M)
    cells = [quote for cell in first_cells for quote in re.findall(r"`([^`]*)`", cell)]
    blocks = re.findall(r"```python\n(.*?)```", BACKPROP, re.S)
    lines = [line for block in blocks if "import" not in block for line in block.splitlines()]
    quotes = [q for q in cells + lines if re.search(r"[(=]", q) and "#" not in q]
    assert len(quotes) > 30
    assert not [quote for quote in quotes if _flat(quote) not in source]
