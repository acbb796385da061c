"""Prompts at the width that they need: a few static widths, one program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MULTIPLE = 32  # widths are multiples of it


def rounded(shares: Sequence[float], full: int) -> tuple[int, ...]:
    """Shares of `full` positions, rounded up to multiples of MULTIPLE; those below `full`, ascending."""
    found = {-(-int(share * full) // MULTIPLE) * MULTIPLE for share in shares}
    return tuple(sorted(width for width in found if 0 < width < full))


def narrowest(widths: Sequence[int], need_B, at_width: Callable[[int], Callable[[Any], Any]], piece):
    """at_width(w)(piece) for the smallest width w that holds the needs of all rows.

    Args:
      widths: ascending; the last holds any row.
      at_width: returns a function for each width; all must return the same shapes and dtypes.
    """
    if len(widths) == 1:
        return at_width(widths[0])(piece)
    choice = (need_B.max() > jnp.array(widths[:-1], jnp.int32)).sum()
    return jax.lax.switch(choice, [at_width(width) for width in widths], piece)
