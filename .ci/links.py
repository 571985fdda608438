"""Looks for dead links in a built site: `python .ci/links.py FOLDER` fails where a page or an anchor is not there."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.targets = {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Takes a tag's name, and its link."""
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


def dead(folder: Path) -> list[str]:
    """The dead links of all pages, each with its page; links to other sites are not followed."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (file in pages and unquote(url.fragment) not in pages[file].anchors):
                found.append(f"{path.relative_to(folder.resolve())}: {target}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(dead(Path(sys.argv[1]))) or None)
