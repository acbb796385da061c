"""How long planned work will still take, judged by the pieces done so far."""

import collections
import dataclasses


@dataclasses.dataclass(eq=False)
class Pieces:
    """Planned work of one kind.

    Attributes:
      left: pieces still to do.
      foreseen: seconds of a piece, as estimated before any is measured; None if unknown.
      measured: seconds of the last pieces.
      warm: the first piece, which ran with cold caches, is no longer in `measured`.
    """

    left: int = 0
    foreseen: float | None = None
    measured: collections.deque = dataclasses.field(default_factory=lambda: collections.deque(maxlen=4))
    warm: bool = False

    @property
    def seconds(self) -> float | None:
        """Seconds of a piece: the mean of the last ones, else the estimate, else None."""
        return sum(self.measured) / len(self.measured) if self.measured else self.foreseen

    def foresee(self, seconds: float) -> None:
        """Sets the estimate for a piece, which holds until one is measured."""
        self.foreseen, self.warm = seconds, False
        self.measured.clear()

    def measure(self, seconds: float) -> None:
        """Adds a measurement. The second one replaces the first, which ran with cold caches."""
        if self.measured and not self.warm:
            self.measured.clear()
            self.warm = True
        self.measured.append(seconds)


class Plan:
    """The work of a command, in pieces of several kinds.

    Attributes:
      pieces: name -> Pieces.
      worked: total seconds of the pieces done.
    """

    def __init__(self):
        self.pieces: dict[str, Pieces] = {}
        self.worked = 0.0

    def of(self, name: str) -> Pieces:
        """The pieces of one name; adds the name without pieces if it is new."""
        return self.pieces.setdefault(name, Pieces())

    def add(self, name: str, count: int) -> None:
        """Adds pieces; a negative count removes some."""
        pieces = self.of(name)
        pieces.left = max(0, pieces.left + count)

    def done(self, name: str, seconds: float) -> None:
        """One piece is done."""
        self.add(name, -1)
        self.of(name).measure(seconds)
        self.worked += seconds

    @property
    def partly_known(self) -> bool:
        """Whether some pieces are left whose duration is still unknown."""
        return any(pieces.left and pieces.seconds is None for pieces in self.pieces.values())

    def left(self, doing: str = "", elapsed: float = 0.0) -> float | None:
        """Seconds of the pieces left whose duration is known; None if most are unknown or none is left.

        Args:
          doing: the kind of the piece in progress, which began `elapsed` seconds ago.
        """
        left = [pieces for pieces in self.pieces.values() if pieces.left]
        known = [(pieces, seconds) for pieces in left if (seconds := pieces.seconds) is not None]
        if 2 * sum(pieces.left for pieces, _ in known) <= sum(pieces.left for pieces in left):
            return None
        total = sum(pieces.left * seconds for pieces, seconds in known)
        for pieces, seconds in known:
            if pieces is self.pieces.get(doing):
                total -= min(max(0.0, elapsed), seconds)
        return total
