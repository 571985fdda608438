"""What MkDocs does while it builds the site: pages that are made of other files, and formulas as MathML.

Made pages: the changelog, the notebooks with their outputs, and on `troubleshooting.md` every message in the code.
"""

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from markdown.extensions.toc import slugify
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_files(files, config):
    """Adds the pages that are made."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts the messages into the page that has the mark for them, and into the reference where each name is defined."""
    defined = definitions(ROOT / "nuqjax" / "__init__.py")
    markdown = re.sub(r"^::: nuqjax\.(\w+)$", lambda name: f"::: {defined[name[1]]}", markdown, flags=re.MULTILINE)
    return markdown.replace("<!-- messages -->", messages_table(ROOT / "nuqjax"))


def on_page_content(content, page, config, files):
    r"""Formulas between \( and \), or \[ and \], become MathML, which browsers draw without a script."""

    def formula(match):
        return convert(html.unescape(match[2]), display="inline" if match[1] == "(" else "block")

    pattern = r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)


def notebook(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the texts and pictures that its cells gave."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\]\(#([^)]+)\)", lambda anchor: f"](#{slugify(heading(anchor[1]), '-')})", source)
            parts.append(source.replace("](../docs/", "](../").replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="what this cell drew" src="data:image/png;base64,{picture}">')
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text := "".join(data["text/plain"]).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def definitions(face: Path) -> dict[str, str]:
    """Public names, and the dotted names under which they are defined: a function may share its name with a module."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(face.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def heading(anchor: str) -> str:
    """The heading that an anchor of Jupyter's leads to: its words are joined by `-`."""
    return unquote(anchor).replace("-", " ")


def messages(package: Path) -> Iterator[tuple[str, str, str]]:
    """Module, exception and text of all that the package raises; `…` stands for what only the moment knows."""
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").as_posix().removeprefix("_src/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = template(node.exc.args[0])
                if len(re.findall(r"[a-z]{2,}", text)) >= 2:  # others say what another function found
                    yield module, ast.unparse(node.exc.func), text


def template(node: ast.expr) -> str:
    """The text of a message as it stands in the source, with `…` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(template(part) for part in node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages_table(package: Path) -> str:
    """Every message once, under the module that raises it."""
    parts, seen = [], ""
    for module, kind, text in dict.fromkeys(messages(package)):
        if module != seen:
            parts.append(f"\n**{module}**\n")
            seen = module
        parts.append(f"- {kind}: <code>{html.escape(' '.join(text.split()))}</code>")
    return "\n".join(parts)
