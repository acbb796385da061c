"""Reads the text of a compiled program: its computations, their instructions, and the arrays of each.

`hlo.py` counts and judges them.
"""

import dataclasses
import math
import re

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_BYTES = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the text: element type, dimensions, and the memory space of its layout (0 is HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        width = _BYTES.get(self.dtype) or int(re.sub(r"\D", "", self.dtype.partition("e")[0]) or 8) / 8
        return int(self.elements * width)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `op` is the operation's path in the traced program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    text: str
    root: bool

    @property
    def op(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(the instructions of each computation, the name of the first one to run)."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            name, _, rest = line.strip().partition(" = ")
            kind = rest[: _type_end(rest)]
            opcode = rest[len(kind) :].strip().partition("(")[0]
            arrays = tuple(_array(*match) for match in _SHAPE.findall(kind))
            root = name.startswith("ROOT ")
            name = name.removeprefix("ROOT ").lstrip("%")
            current.append(Instruction(name, opcode, arrays, rest, root))
    return computations, entry


def _type_end(rest: str) -> int:
    """Where the type at the start of a line ends: at the first space outside of parentheses."""
    depth = 0
    for place, character in enumerate(rest):
        depth += (character in "({") - (character in ")}")
        if character == " " and depth == 0:
            return place
    return len(rest)


def _array(dtype, dims, layout) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    return Array(dtype, tuple(int(n) for n in dims.split(",") if n), int(space[1]) if space else 0)


def group_size(text: str) -> int:
    """Devices that one group of a collective has."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return listed[1].count(",") + 1
    return 2 if "source_target_pairs=" in text else 1
