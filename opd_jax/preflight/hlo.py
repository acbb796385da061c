"""What a compiled program does, read from its text: loops, collectives, host transfers, large arrays.

Shapes in the text are one device's. A loop's body stands there once, so everything in it is counted as
often as the loop runs: by its own limit where the text shows one, else by a number that the caller gives.
"""

import collections
import dataclasses
import itertools
import re

from opd_jax.preflight.hlo_text import Array, Instruction, group_size, parse
from opd_jax.preflight.jaxprs import Trips

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([^\s,})]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What only names or groups arrays.
_NO_WORK = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "call")
# Callbacks reach the host by custom calls or by send and recv.
_CALLS_HOST = re.compile(r'is_host_transfer=true|custom_call_target="[^"]*(?:callback|[Hh]ost)[^"]*"')
_HOST_MEMORY = 5

# Collectives between slices go over the hosts' network, written as transfers that this runtime serves.
_BETWEEN_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_EXCHANGE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation: devices in a group, result bytes a device, times it runs."""

    kind: str
    group: int
    bytes: int
    times: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in all, on a ring."""
        share = (self.group - 1) / self.group
        each = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }[self.kind]
        return self.bytes * each * self.times


class Program:
    """A compiled module's text, parsed.

    Args:
      text: `compiled.as_text()`.
      unknown_trips: how often loops run whose limit the text does not show.
    """

    def __init__(self, text: str, unknown_trips: Trips = 1):
        self.unknown_trips = unknown_trips
        self.computations, self.entry = parse(text)
        self._unknown = self._unknown_loops()
        self.times = self._times()

    def __iter__(self):
        """(instruction, times it runs, whether it stands inside a fusion and so need not be in memory)."""
        for name, instructions in self.computations.items():
            for instruction in instructions:
                yield instruction, self.times[name], name in self._fused

    def collectives(self) -> list[Collective]:
        """Every collective, one that is split into parts counted once."""
        found = {}
        for instruction, times, _ in self:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or not times:
                continue
            group = group_size(instruction.text)
            if group < 2:
                continue
            arrays = instruction.arrays
            if instruction.opcode.endswith("-start"):
                arrays = [array for array in arrays if array.dims]  # without the signals' scalars
                arrays = arrays[len(arrays) // 2 :]  # operands stand before results
            size = sum(array.bytes for array in arrays)
            if kind == "all-reduce" and self._scattered(instruction):
                kind, size = "reduce-scatter", size // group
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            key = channel[1] if channel else instruction.name
            found[key] = max(
                Collective(kind, group, size, times),
                found.get(key, Collective(kind, group, 0, 0)),
                key=lambda c: c.bytes * c.times,
            )
        return list(found.values())

    def between_slices(self, slices: int) -> list[Collective]:
        """The collectives in which a device sends to other slices."""
        found = []
        for i, times, _ in self:
            exchange = _EXCHANGE.search(i.text)
            if i.opcode == "send" and exchange and times:
                kind = exchange[1].lower().replace("_", "-")
                kind = kind if kind in COLLECTIVES else "collective-permute"  # one that is only passed on
                size = i.arrays[0].bytes // (slices if kind == "reduce-scatter" else 1)
                size *= slices if kind == "all-gather" else 1  # a result's bytes
                found.append(Collective(kind, slices, size, times))
        return found

    def host_transfers(self) -> list[str]:
        """Instructions that call the host or feed data to or from it; not what slices exchange."""
        return [
            f"{i.opcode} {i.op}".strip()
            for i, _, _ in self
            if (i.opcode in ("infeed", "outfeed") or _CALLS_HOST.search(i.text))
            and _BETWEEN_SLICES not in i.text
        ]

    def host_memory(self) -> tuple[int, int, list[str]]:
        """Copies from and to the host's memory, and operations that are done there.

        Returns:
          (bytes copied from it, bytes copied to it, instructions on it that are no such copy).
        """
        fetched = returned = 0
        others = []
        for name, instructions in self.computations.items():
            there = {i.name for i in instructions if any(a.space == _HOST_MEMORY for a in i.arrays)}
            for i in instructions:
                reads = i.text.partition(f" {i.opcode}(")[2].partition(")")[0]
                if i.name not in there and not there & set(re.findall(r"%([^\s,()]+)", reads)):
                    continue
                if i.opcode == "copy-start":
                    copy = i.arrays[0]  # the result stands before the source
                    size = self.times[name] * copy.bytes
                    to_host = copy.space == _HOST_MEMORY
                    fetched, returned = fetched + size * (not to_host), returned + size * to_host
                elif i.opcode not in (*_NO_WORK, "copy-done"):
                    others.append(f"{i.opcode} {i.op}".strip())
        return fetched, returned, others

    def vocabulary_arrays(self, rows: int, vocabularies, widths=()) -> list[str]:
        """Arrays of the size of logits at `rows` positions or more, in any layout.

        Args:
          rows: rollouts x response positions of one device.
          vocabularies: the V, or parts of it, that a device may hold.
          widths: D, or parts of it, of weights [V, D], which may be as large and are no logits.
        """
        found = {}
        weights = {(v, d) for v in vocabularies for d in widths}
        weights |= {(d, v) for v, d in weights if d != rows}
        for instruction, _, _ in self:
            for array in instruction.arrays:
                if tuple(n for n in array.dims if n > 1) in weights or array in found:
                    continue
                for v in vocabularies:
                    if array.elements >= rows * v and _holds(array.dims, v):
                        found[array] = f"{array} {instruction.op}".strip()
        return list(found.values())

    def largest(self, count: int) -> list[tuple[Array, str]]:
        """The largest arrays in HBM that operations write, one of each shape, and where they come from."""
        found = {}
        for instruction, _, fused in self:
            if fused or instruction.opcode in _NO_WORK:
                continue
            for array in instruction.arrays:
                if array.space == 0:
                    found.setdefault(array, instruction.op)
        return sorted(found.items(), key=lambda item: -item[0].bytes)[:count]

    def scope(self, name: str) -> tuple[int, int]:
        """(operations, HBM bytes) of what was traced under jax.named_scope(name), an upper estimate.

        Every instruction counts one operation an element of its result, inside fusions too. Bytes are twice
        what stands outside fusions writes: once written and once read.
        """
        operations = size = 0
        for instruction, times, fused in self:
            if f"/{name}/" not in f"/{instruction.op}/" or instruction.opcode in _NO_WORK:
                continue
            operations += times * sum(array.elements for array in instruction.arrays)
            if not fused:
                size += 2 * times * sum(array.bytes for array in instruction.arrays)
        return operations, size

    def _scattered(self, instruction: Instruction) -> bool:
        """Whether an all-reduce is the first half of a reduce-scatter, as TPUs write one."""
        return any(
            instruction in instructions and name.startswith("all-reduce-scatter")
            for name, instructions in self.computations.items()
        )

    def _times(self) -> collections.Counter:
        self._fused = set()
        times = collections.Counter({self.entry: 1})
        order, seen = [], set()

        def visit(name):
            if name not in seen:
                seen.add(name)
                for callee, _ in self._callees(name):
                    visit(callee)
                order.append(name)

        visit(self.entry)
        for name in reversed(order):
            for callee, trips in self._callees(name):
                times[callee] += times[name] * trips
        return times

    def _callees(self, name):
        for instruction in self.computations.get(name, ()):
            called = dict(_CALLED.findall(instruction.text))
            branches = _BRANCHES.search(instruction.text)
            names = [n.strip().lstrip("%") for n in branches[1].split(",")] if branches else []
            if instruction.opcode == "conditional":
                names += called.values()
                yield max(names, key=self._written), 1
                yield from ((name, 0) for name in names)  # looked through, but not taken
                continue
            trips = 1
            if instruction.opcode == "while":
                trips = self._trips(instruction, called["condition"])
            if instruction.opcode == "fusion":
                self._fused.update(called.values())
            for callee in [*called.values(), *names]:
                if callee in self.computations:
                    yield callee, trips

    def _written(self, computation: str) -> int:
        """Bytes of all results of a computation and of what it calls, as often as loops run it."""
        own = sum(array.bytes for i in self.computations[computation] for array in i.arrays)
        return own + sum(trips * self._written(name) for name, trips in self._callees(computation))

    def _limit(self, loop: Instruction, condition: str) -> int | None:
        """Rounds of a loop if the text shows them."""
        known = re.search(r'known_trip_count":?\{"n":"?(\d+)', loop.text)
        if known:
            return int(known[1])
        lines = self.computations[condition]
        root = next(line for line in lines if line.root)
        limits = {line.name: re.search(r"constant\((\d+)\)", line.text) for line in lines}
        operands = re.search(r"compare\(([^)]*)\)", root.text)
        if operands and "direction=LT" in root.text:
            limit = limits.get(operands[1].split("%")[-1].strip())
            return int(limit[1]) if limit else None
        return None

    def _trips(self, loop: Instruction, condition: str) -> int:
        limit = self._limit(loop, condition)
        if limit is not None:
            return limit
        trips, rounds = self.unknown_trips, 0
        for place in self._unknown[loop.name]:
            if isinstance(trips, int):
                return trips
            rounds, trips = trips[place] if place < len(trips) else (0, 0)
        return rounds

    def _unknown_loops(self) -> dict[str, tuple[int, ...]]:
        """Loops whose limit the text does not show, by their places: (2, 0) is the first inside the third."""
        found: dict[str, tuple[int, ...]] = {}
        inside: dict[str, tuple[int, ...]] = {}

        def visit(computation: str, within: tuple[int, ...]):
            for i in self.computations.get(computation, ()):
                called = dict(_CALLED.findall(i.text))
                branches = _BRANCHES.search(i.text)
                names = [n.strip().lstrip("%") for n in branches[1].split(",")] if branches else []
                own = within
                if i.opcode == "while" and self._limit(i, called["condition"]) is None:
                    if i.name not in found:
                        beside = sum(place[:-1] == within for place in found.values())
                        found[i.name] = (*within, beside)
                    own = found[i.name]
                for name in (*called.values(), *names):
                    if inside.get(name) != own:
                        inside[name] = own
                        visit(name, own)

        visit(self.entry, ())
        return found


def _holds(dims, v: int) -> bool:
    """Whether V is one of the dimensions, a factor of one (flattened), or folded into two neighbours."""
    folded = [a * b for a, b in itertools.pairwise(dims) if 128 in (a, b)]
    return any(n % v == 0 for n in dims if n) or any(v <= n < v + 128 for n in folded)
