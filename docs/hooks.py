"""MkDocs hooks: the site shows what the repository's own file view shows.

- A page may link to any text file of the repository, such as ../benchmarks/README.md or ../configs/demo.py.
  A Markdown file becomes a page of the site; any other file becomes a page that shows its text.
- A list or a table may follow a paragraph without an empty line, and [a] [b] is not a link.

`nav` in mkdocs.yml names Markdown files outside docs/ by their path from the repository's root.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
CODE = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")
FENCE = re.compile(r" {0,3}(```+|~~~+)")
ITEM = re.compile(r"\s*([-*+]|\d+\.) ")
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".yml": "yaml",
    ".toml": "toml",
    ".json": "json",
    ".ipynb": "json",
}


def on_files(files, config):
    """Adds the files outside docs/ that nav or a page names, and those that such a page names."""
    todo = [_repository_path(file.src_uri) for file in files.documentation_pages()]
    todo += map(_repository_path, re.findall(r"'([^']+\.md)'", repr(config.nav)))
    seen = set()
    while todo:
        path = todo.pop()
        source = (ROOT / path).resolve()
        if path in seen or not source.is_file() or not source.is_relative_to(ROOT):
            continue  # MkDocs reports the links that lead nowhere
        seen.add(path)
        if files.get_file_from_path(_site_path(path)) is None:
            files.append(File.generated(config, _site_path(path), content=_shown(source)))
        if source.suffix == ".md":
            prose = (CODE.sub("", line) for outside, line in _lines(source.read_text("utf-8")) if outside)
            todo += [_resolved(path, link) for line in prose for link in LINK.findall(line)]
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at the pages of the site, and writes lists and brackets as Python-Markdown needs them."""
    here, folder = _repository_path(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(link):
        target = _site_path(_resolved(here, link[1]))
        known = files.get_file_from_path(target) is not None
        return posixpath.relpath(target, folder or ".") if known else link[1]

    def mended(prose):
        return LINK.sub(moved, prose).replace("] [", "] &#91;")

    done, before = [], ""
    for outside, line in _lines(markdown):
        if outside and _interrupts(line, before):
            done.append("")
        done.append(_outside_code(line, mended) if outside else line)
        before = line if outside else ""
    return "\n".join(done) + "\n"


def _repository_path(site_path: str) -> str:
    """The path from the repository's root of a page of the site."""
    if (ROOT / "docs" / site_path).exists():
        return f"docs/{site_path}"
    return (
        site_path.removeprefix("source/").removesuffix(".md")
        if site_path.startswith("source/")
        else site_path
    )


def _site_path(path: str) -> str:
    """The inverse: where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") and path != "README.md" else f"source/{path}.md"


def _resolved(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _shown(source: Path) -> str:
    """The Markdown of a page for a file of the repository."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    return f"# {source.relative_to(ROOT)}\n\n`````{LANGUAGES.get(source.suffix, 'text')}\n{text}\n`````\n"


def _lines(text: str) -> Iterator[tuple[bool, str]]:
    """The lines of a page, each with whether it lies outside fenced code."""
    fence = ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        yield not (fence or mark), line
        if fence and mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif not fence and mark:
            fence = mark[1]


def _outside_code(line: str, change: Callable[[str], str]) -> str:
    """The line with `change` applied to what lies outside code spans."""
    done, end = [], 0
    for code in CODE.finditer(line):
        done += [change(line[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*done, change(line[end:])])


def _interrupts(line: str, before: str) -> bool:
    """Whether a list or a table begins right after a paragraph's line."""
    if not before.strip() or before.startswith((" ", "#", "|")) or ITEM.match(before):
        return False
    return line.startswith(("- ", "* ", "+ ", "1. ", "|"))
