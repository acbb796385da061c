"""The map of the rooms: which part of opd_jax imports which, read from the source, and its picture.

    python -m docs.map > docs/images/rooms.svg      # make map

The files are parsed and none is imported, so this needs Python alone. tests/test_imports.py holds the rules.
"""

import ast
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "opd_jax"
# A room imports from the levels above its own; rooms of one level do not import each other.
LEVELS = (
    ("errors",),
    ("declare", "progress"),
    ("parallel",),
    ("models",),
    ("data", "release"),
    ("distill",),
    ("evaluation",),
    ("config",),
    ("run",),
    ("preflight", "report"),
    ("train", "evaluate", "sft", "export", "bench", "compare"),
    ("sweep", "demo"),
)
# Packages inside a room that other rooms may import names from, as from the room itself.
SUBPACKAGES = ("models.files", "release.segments", "data.prompts")
OUTSIDE = ("studies", "configs", "benchmarks", "colab")


@dataclasses.dataclass(frozen=True)
class Import:
    """One name that a file takes from a package or a module.

    Attributes:
      file: path:line, for messages.
      module: dotted name of the module that imports.
      source: dotted name that it imports from.
      name: the name; None for `import source`.
      attribute: it is written source.name, where `source` itself was imported.
    """

    file: str
    module: str
    source: str
    name: str | None
    attribute: bool = False

    @property
    def rooms(self) -> tuple[str, str]:
        """(importing, imported). opd_jax/__init__.py is the room opd_jax."""
        of_package = self.source == PACKAGE and self.name
        return room(self.module), room(f"{PACKAGE}.{self.name}" if of_package else self.source)


def room(module: str) -> str:
    """opd_jax.models.files.hf -> models; opd_jax -> opd_jax; studies.report -> studies."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


class Tree:
    """A repository's imports.

    Attributes:
      modules: dotted name -> path of every module of opd_jax; __main__.py counts as its package.
      imports: what opd_jax and its lazy stubs import.
      outside: what studies, configs, benchmarks and notebooks import.
      exports: public package -> names that it exports.
      sizes: room -> number of its modules.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules, self.sizes = {}, Counter()
        self.imports, self.outside = [], []
        for path in sorted((root / PACKAGE).rglob("*.py*")):
            if path.suffix not in (".py", ".pyi"):
                continue
            name = self._module(path)
            if path.suffix == ".py" and path.stem != "__main__":
                self.modules[name] = path
            self.sizes[room(name)] += path.suffix == ".py" and path.stem != "__init__"
            self.imports += self._read(path.read_text(), path)
        for folder in OUTSIDE:
            for path in sorted((root / folder).rglob("*")):
                if path.suffix == ".py":
                    self.outside += self._read(path.read_text(), path)
                elif path.suffix == ".ipynb":
                    self.outside += self._read(_code(path), path)
        self.exports = {name: _exported(path) for name, path in self.modules.items() if _public(name, path)}

    def edges(self) -> Counter:
        """(importing room, imported room) -> number of names, inside opd_jax."""
        found = (i for i in self.imports if i.source.split(".")[0] == PACKAGE and not i.attribute)
        return Counter(i.rooms for i in found if i.rooms[0] != i.rooms[1])

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)

    def _read(self, text: str, path: Path) -> Iterator[Import]:
        tree, module = ast.parse(text), self._module(path)
        package = module if path.stem in ("__init__", "__main__") else module.rpartition(".")[0]
        bound = {}  # a name of this file -> what was imported under it
        for node in ast.walk(tree):
            at = f"{path.relative_to(self.root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(at, module, alias.name, None)
                    if alias.asname:
                        bound[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield Import(at, module, source, alias.name)
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
        for node in ast.walk(tree):  # a parameter of the same name hides what was imported
            if isinstance(node, ast.arg):
                bound.pop(node.arg, None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in bound:
                at = f"{path.relative_to(self.root)}:{node.lineno}"
                yield Import(at, module, bound[node.value.id], node.attr, attribute=True)


def _public(name: str, path: Path) -> bool:
    short = name.removeprefix(f"{PACKAGE}.")
    return path.stem == "__init__" and name != PACKAGE and ("." not in short or short in SUBPACKAGES)


def _exported(path: Path) -> set[str]:
    """The names of a package's stub; without a stub those of __all__."""
    stub = path.with_suffix(".pyi")
    if stub.exists():
        nodes = ast.walk(ast.parse(stub.read_text()))
        return {a.asname or a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _code(path: Path) -> str:
    """A notebook's code without its shell lines and magics."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", code, flags=re.MULTILINE)


STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px; fill: #57606a }
.room { fill: #ddf4ff; stroke: #54aeff }
.entry { fill: #fff8c5; stroke: #d4a72c }
.grid { stroke: #d0d7de }
.uses { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d } .uses { fill: #4493f8 }
  .room { fill: #121d2f; stroke: #1f6feb } .entry { fill: #272115; stroke: #9e6a03 }
}
"""
ROW, LABEL, TOP = 26, 190, 104


def picture(tree: Tree) -> str:
    """The rooms in their order, as SVG: a row for each, and a dot for each earlier room that it imports.

    No dot stands right of the diagonal.
    """
    rooms = [name for names in LEVELS for name in names if tree.sizes[name]]
    edges, packages = tree.edges(), {name.split(".")[1] for name in tree.exports}
    width, height = LABEL + ROW * len(rooms) + 60, TOP + ROW * len(rooms) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<style>{STYLE}</style>",
        '<text class="small" x="8" y="18">A row imports the rooms of its dots.</text>',
        '<text class="small" x="8" y="34">Blue: packages. Yellow: modules.</text>',
    ]
    for number, name in enumerate(rooms):
        x, y = LABEL + ROW * number, TOP + ROW * number
        kind = "room" if name in packages else "entry"
        size = f"{tree.sizes[name]} modules" if kind == "room" else ""
        out += [
            f'<line class="grid" x1="8" y1="{y}" x2="{x + ROW}" y2="{y}"/>',
            f'<line class="grid" x1="{x}" y1="{y}" x2="{x}" y2="{height - 12}"/>',
            f'<rect class="{kind}" x="8" y="{y + 3}" width="{LABEL - 16}" height="{ROW - 6}" rx="4"/>',
            f'<text x="16" y="{y + 18}">{name}</text>',
            f'<text class="small" x="{LABEL - 14}" y="{y + 18}" text-anchor="end">{size}</text>',
            f'<rect class="{kind}" x="{x + 7}" y="{y + 7}" width="12" height="12" rx="3"/>',
            f'<text transform="translate({x + 17} {y - 6}) rotate(-40)">{name}</text>',
        ]
        for other, imported in enumerate(rooms):
            if edges[name, imported]:
                centre = f'cx="{LABEL + ROW * other + 13}" cy="{y + 13}" r="6"'
                out.append(f'<circle class="uses" {centre}><title>{name} imports {imported}</title></circle>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    print(picture(Tree()), end="")
