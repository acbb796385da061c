"""What a traced program does, read from its jaxpr: calls of the host, and FLOPs of matrix products."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

# How often loops run whose limit a program does not show. A number: each of them as often, at any depth.
# Several: the first such loop, the second and so on, each with those inside it; others do not run.
Trips = int | Sequence[tuple[int, "Trips"]]


def host_calls(jaxpr) -> list[str]:
    """Names of the primitives of a traced program, inner ones included, that reach the host."""
    return sorted(
        {
            e.primitive.name
            for e, _ in _equations(jaxpr)
            if "callback" in e.primitive.name or e.primitive.name in ("infeed", "outfeed", "debug_print")
        }
    )


def matmul_flops(jaxpr, unknown_trips: Trips = 1, experts=(), tensor: int = 1) -> int:
    """FLOPs of all matrix products of a traced program, over all devices, rematerialised ones included.

    A grouped product multiplies each row by one group, and a device that holds some of the experts its share
    of the rows it is given, each expert as likely as another. Of branches the one with most FLOPs is taken.

    Args:
      unknown_trips: rounds of loops whose limit the program does not show.
      experts: (width, an expert's width, experts in a block) of each sparse model. None given: every grouped
        product has all experts.
      tensor: parts that an expert's width may be cut into, where the experts themselves are not.

    Raises:
      ValueError: a grouped product is of no such model.
    """
    total = 0
    trips = _each(unknown_trips)
    costliest = functools.partial(matmul_flops, unknown_trips=unknown_trips, experts=experts, tensor=tensor)
    for e, times in _equations(jaxpr, trips=trips, choose=costliest):
        if e.primitive.name == "dot_general":
            (contract, _), _ = e.params["dimension_numbers"]
            lhs = e.invars[0].aval.shape
            total += 2 * times * math.prod(e.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
        elif e.primitive.name == "ragged_dot_general":  # its values' and both its gradients' form
            products = 2 * times * math.prod(e.invars[0].aval.shape) * e.outvars[0].aval.shape[-1]
            held = e.invars[2].aval.shape[0]
            total += products * held // _experts(e, experts, tensor) if experts else products
    return total


def _experts(grouped, experts, tensor: int) -> int:
    """Experts in a block of the model that a grouped product belongs to, known by its rows' two widths.

    A model whose experts are whole in width is preferred. Of several that are, that of whose experts the
    product has one part of `tensor`.
    """
    sides = grouped.invars[0].aval.shape[-1], grouped.outvars[0].aval.shape[-1]
    held = grouped.invars[2].aval.shape[0]
    found = []
    for width, ffn, count in experts:
        for cut in (1, tensor):
            if sides in ((width, ffn / cut), (ffn / cut, width)):
                found.append((cut > 1, count * cut != held * tensor, count))
    if not found:
        raise ValueError(f"a grouped product of widths {sides[0]} and {sides[1]} is of no sparse model")
    return min(found)[-1]


def _each(trips: Trips) -> Iterator[tuple[int, Trips]]:
    return itertools.repeat((trips, trips)) if isinstance(trips, int) else iter(trips)


ONCE = _each(1)


def _equations(jaxpr, times: int = 1, trips: Iterator[tuple[int, Trips]] = ONCE, choose=None):
    """Every equation with the number of times it runs; of branches those with the highest choose(jaxpr).

    Args:
      trips: gives the rounds of each loop whose limit the program does not show, and of loops inside it.
    """
    for e in jaxpr.eqns:
        yield e, times
        inner, within = times, trips
        if e.primitive.name == "scan":
            inner *= e.params["length"]
        elif e.primitive.name == "while":
            rounds, nested = next(trips, (0, 0))
            inner, within = inner * rounds, _each(nested)
        elif e.primitive.name == "shard_map":  # its shapes are one device's
            inner *= e.params["mesh"].size
        elif e.primitive.name == "pallas_call":
            grid = e.params["grid_mapping"].grid
            inner *= _steps(e.params["grid_mapping"])
            if e.params["name"].startswith("splash"):  # of n x n blocks those above the diagonal are skipped
                inner = inner * (grid[-1] + 1) // (2 * grid[-1])
        values = list(e.params.values())
        if e.primitive.name == "cond" and choose:
            values = [max((branch.jaxpr for branch in e.params["branches"]), key=choose)]
        for value in values:
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from _equations(part, inner, within, choose)


def _steps(mapping) -> int:
    """Steps of a Pallas kernel's grid; where one of its sizes is known at runtime alone, the most it can be.

    That is the number of blocks of its largest input, each read once.
    """
    if all(isinstance(size, int) for size in mapping.grid):
        return math.prod(mapping.grid)
    return max(
        math.prod(
            -(-size // getattr(block, "block_size", block))
            for size, block in zip(m.array_aval.shape, m.block_shape)
        )
        for m in mapping.block_mappings[: mapping.num_inputs]
    )
