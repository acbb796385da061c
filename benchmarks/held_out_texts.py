"""Texts that the segmenter was not tuned on, by kind.

    python -m benchmarks.segments --texts=held_out

They come from installed packages, the standard library and the machine's man pages. The packages are those
of the test extra, and gensim and pyjokes: `pip install --no-deps gensim pyjokes`.
"""

import ast
import bz2
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sysconfig

from opd_jax.errors import UserError

PARAGRAPHS = 40  # in one text cut from a long document


def documents(kind: str, share: float = 1.0) -> list[str]:
    """Documents of one kind of SOURCES, in a fixed order; a `share` of them, evenly spread.

    Raises:
      UserError: their package is not installed.
    """
    step = max(round(1 / share), 1)
    return [text for text in SOURCES[kind]()[::step] if text.strip()]


def _folder(package) -> pathlib.Path:
    found = importlib.util.find_spec(package)
    if found is None:
        raise UserError(f"the package {package} is not installed; pip install --no-deps {package}")
    return pathlib.Path(found.submodule_search_locations[0])


def _stdlib() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def _pieces(text):
    """A long text cut into texts of PARAGRAPHS paragraphs."""
    parts = re.split(r"\n\s*\n", text)
    return ["\n\n".join(parts[i : i + PARAGRAPHS]) for i in range(0, len(parts), PARAGRAPHS)]


def _modules(package, step=1, pattern="*.py"):
    """The text of every `step`-th file of a package; tests and files up to 4 kB are left out."""
    files = sorted(path for path in _folder(package).rglob(pattern) if "test" not in str(path.parent))
    return [path.read_text("utf-8") for path in files if path.stat().st_size > 4000][::step]


def _docstrings(package, step):
    """The docstrings of each module, joined; modules with few of them are left out."""
    texts = []
    for code in _modules(package, step):
        nodes = ast.walk(ast.parse(code))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        texts.append("\n\n".join(doc for doc in docs if doc and len(doc) > 80))
    return [text for text in texts if len(text) > 1000]


def _gensim(name) -> pathlib.Path:
    return _folder("gensim") / "test" / "test_data" / name


def _news():
    return _gensim("lee_background.cor").read_text("utf-8").splitlines()


def _encyclopaedia():
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    dump = bz2.decompress(_gensim(name).read_bytes()).decode("utf-8")
    pages = re.findall(r"<text [^>]*>(.*?)</text>", dump, re.DOTALL)
    return [page[:12_000] for page in pages if len(page) > 500]


def _reviews():
    lines = _gensim("pang_lee_polarity.cor").read_text("cp1252").splitlines()
    lines = [re.sub(r"__label__\w+ ", "", line) for line in lines]
    return ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]


def _jokes():
    """One text for each language."""
    texts = []
    for path in sorted(_folder("pyjokes").glob("jokes_*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        parts = [node.value for node in nodes if isinstance(node, ast.Constant)]
        texts.append("\n\n".join(part for part in parts if isinstance(part, str)))
    return texts


def _data_sets():
    paths = sorted((_folder("tensorflow_datasets") / "datasets").glob("*/README.md"))
    texts = [path.read_text("utf-8") for path in paths]
    return ["\n\n".join(texts[i : i + 6]) for i in range(0, len(texts), 6)]


def _man_pages():
    paths = sorted(pathlib.Path("/usr/share/man/man1").glob("*.1.gz"))
    paths = [path for path in paths if not path.is_symlink() and path.stat().st_size > 4000][::8]
    env = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
    options = {"env": env, "capture_output": True, "text": True, "errors": "replace"}
    return [subprocess.run(["man", "-l", str(path)], **options).stdout[:30_000] for path in paths]


def _concepts_and_hints():
    problems = json.loads((_folder("champ_dataset") / "dataset_files" / "v0.json").read_text("utf-8"))
    texts = [entry["_raw_text"] for part in ("concepts", "hints") for entry in problems[part].values()]
    return ["\n".join(texts[i : i + 5]) for i in range(0, len(texts), 5)]


def _changes():
    paths = [_stdlib() / "idlelib" / name for name in ("NEWS.txt", "NEWS2x.txt", "HISTORY.txt", "TODO.txt")]
    paths += [_folder("optax") / "CHANGELOG.md", _folder("numpy") / "ma" / "API_CHANGES.txt"]
    return [piece for path in paths for piece in _pieces(path.read_text("utf-8", "replace"))]


def _headers():
    folder = pathlib.Path(sysconfig.get_paths()["include"])
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.rglob("*.h"))]
    return [text for text in texts if len(text) > 4000] + _modules("numpy", pattern="*.h")


SOURCES = {
    "news": _news,
    "encyclopaedia (wiki markup)": _encyclopaedia,
    "film reviews": _reviews,
    "Russian novel": lambda: _pieces(_gensim("crime-and-punishment.txt").read_text("utf-8")),
    "jokes": _jokes,
    "descriptions of data sets": _data_sets,
    "man pages": _man_pages,
    "docstrings of mpmath (LaTeX)": functools.partial(_docstrings, "mpmath", 1),
    "docstrings of sympy (LaTeX)": functools.partial(_docstrings, "sympy", 5),
    "docstrings of scipy (LaTeX)": functools.partial(_docstrings, "scipy", 3),
    "docstrings of numpy": functools.partial(_docstrings, "numpy", 2),
    "docstrings of matplotlib": functools.partial(_docstrings, "matplotlib", 1),
    "docstrings of transformers (Markdown)": functools.partial(_docstrings, "transformers", 16),
    "docstrings of hypothesis": functools.partial(_docstrings, "hypothesis", 1),
    "champ concepts and hints (LaTeX)": _concepts_and_hints,
    "changelogs (lists)": _changes,
    "code of sympy": functools.partial(_modules, "sympy", 20),
    "code of jax": functools.partial(_modules, "jax", 10),
    "C headers": _headers,
    "protocol buffers": functools.partial(_modules, "google", 1, "*.proto"),
}
