"""What the documents say of the code holds: their code runs, their commands are ones, their links lead somewhere."""

import ast
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import nuqjax
from nuqjax import cli

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages with programs that tests of their own take from them.
RUN_ELSEWHERE = {"calibration.md", "export.md", "layers.md", "format.md", "messages.md"}
EACH = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def fences(path, language):
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@EACH
def test_code_is_an_example_that_runs(path):
    """What begins with `>>>` runs as a test; other Python only where another test runs it."""
    assert path.name in RUN_ELSEWHERE or not fences(path, "python")
    for block in fences(path, "pycon"):
        assert block.startswith(">>> ")
        assert block.endswith("\n\n")  # or the fence would be what is expected of the last line


@EACH
def test_commands_are_ones(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(sys.modules, "my_model", SimpleNamespace(apply=lambda params, x: x))  # a reader's own
    lines = [line for block in fences(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["nuqjax"]:
            cli.parser().parse_args(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), line
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@EACH
def test_links_lead_to_files(path):
    """To headings too: `mkdocs build --strict` sees to that."""
    made = {ROOT / "docs" / "changelog.md"}
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists() or path.parent / target in made, target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: nuqjax\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(nuqjax.__all__)


def texts(node: ast.AST) -> str:
    """The text of an expression, with `…` for each value that is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    return "…"


def test_every_message_that_troubleshooting_explains_is_one():
    """Each piece between two `…` stands, in this order, in one text of the code."""
    code = {
        texts(node)
        for path in Path(nuqjax.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant)
    }
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(explained) > 40
    for message in explained:
        pieces = re.split("…+", message)
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        near = (text for text in code if all(piece in text for piece in pieces))  # cheap, before their order
        assert any(map(pattern.search, near)), message


def raised() -> list[tuple[str, str]]:
    """The module and the text of every exception that the library raises."""
    return [
        (path.relative_to(Path(nuqjax.__file__).parent).as_posix(), texts(node.exc.args[0]))
        for path in sorted(Path(nuqjax.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    ]


def test_messages_are_plain_english():
    """They say "is not a", "appears twice", "starts over" and "does not support"."""
    odd = re.compile(r"(?<!there )\b(is|are) no (?!longer)|\bstands? twice\b|\banew\b|\blacks?\b|\bis to be\b")
    assert len(raised()) > 300
    assert [(module, text) for module, text in raised() if odd.search(text)] == []
