"""Alarms: plain rules over a run's records that say when its numbers or its student's responses break down.

The rules read what `metrics.jsonl` has and touch no device. docs/metrics.md has them as a table.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

WINDOW = 8  # training steps over which a mean is taken
STOP_RATIO = 0.2  # least stop probability of the student, as a share of the teacher's on the same text
STOP_ENDS = 1.0  # ends that the teacher must expect in the window, or its probability says nothing
FINISHED_RATIO = 0.5  # least finished share, as a share of the teacher's own, or else of the start's
FINISHED_DROP = 0.15  # and it must be lower by so much
FINISHED_STOP_RATIO = 0.5  # the start's is no goal where the student's stop probability is above this
REPEATED_SHARE = 0.2  # most responses that may end in a loop

TEXTS = {
    "stop_probability": "the student no longer ends its responses: its probability of an end token is"
    " {value:.0%} of the teacher's on the same text, over {WINDOW} steps",
    "finished_share": "few responses end by themselves: {value:.0%}, where {reference}'s are {goal:.0%}",
    "skipped_updates": "an update was skipped, because the loss or the gradient was not finite",
    "not_finite": "the held-out KL is not finite",
    "repeated_share": "responses end in a loop of the same tokens: {value:.0%} of them",
}
PAGE = "docs/troubleshooting.md"


class Alarms:
    """Follows the records of one run and raises each alarm once.

    Args:
      records: those that are there already, in order, of a run that goes on: alarms among them are not
        raised again.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self._raised: set[str] = set()
        self._steps: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._start: dict[str, float] = {}  # finished share by kind of record
        self._teacher: float | None = None  # finished share of the teacher's own responses
        for record in records:
            if record["kind"] == "alarm":
                self._raised.add(record["alarm"])
            else:
                self._found(record)

    def read(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The alarms that a record raises, each a record of its own with kind "alarm"."""
        found = {name: values for name, values in self._found(record) if name not in self._raised}
        self._raised |= found.keys()
        return [
            {"kind": "alarm", "step": record["step"], "alarm": name, "of": record["kind"]} | values
            for name, values in found.items()
        ]

    def _found(self, record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Every rule that holds after this record, raised before or not."""
        found = []
        shares: Mapping[str, Any] = {}
        if record["kind"] == "eval":
            shares = record
            self._teacher = record.get("teacher_finished_share", self._teacher)
            if "kl" in record and record["kl"] is None:
                found.append(("not_finite", {}))
        elif record["kind"] == "train":
            self._steps.append(record)
            if record.get("skipped_updates"):
                found.append(("skipped_updates", {"value": record["skipped_updates"]}))
            if len(self._steps) == WINDOW:
                shares = {name: _mean(self._steps, name) for name in ("finished_share", "repeated_share")}
                written = 1 - (_mean(self._steps, "stopped_share") or 0)  # others were not stopped
                if shares["finished_share"] is not None:
                    shares["finished_share"] = shares["finished_share"] / written if written else None
                ratio = self._stop_ratio(STOP_ENDS)
                if ratio is not None and ratio < STOP_RATIO:
                    found.append(("stop_probability", {"value": ratio}))
        finished, repeated = shares.get("finished_share"), shares.get("repeated_share")
        if finished is not None:
            found += self._finishing(finished, self._start.setdefault(record["kind"], finished))
        if repeated is not None and repeated > REPEATED_SHARE:
            found.append(("repeated_share", {"value": repeated}))
        return found

    def _finishing(self, finished: float, start: float) -> list[tuple[str, dict[str, Any]]]:
        """A start that ends too early may end less often; only the teacher's own share is a goal as such."""
        reference, goal = ("the start", start) if self._teacher is None else ("the teacher", self._teacher)
        ratio = self._stop_ratio()
        if finished >= FINISHED_RATIO * goal or finished > goal - FINISHED_DROP:
            return []
        if self._teacher is None and ratio is not None and ratio > FINISHED_STOP_RATIO:
            return []
        return [("finished_share", {"value": finished, "reference": reference, "goal": goal})]

    def _stop_ratio(self, least_ends: float = 0.0) -> float | None:
        """Student's over teacher's mean stop probability in the window; None where it says nothing."""
        student, teacher, tokens = (
            _mean(self._steps, name)
            for name in ("stop_probability", "teacher_stop_probability", "response_tokens")
        )
        if student is None or not teacher or (tokens or 0) * teacher * len(self._steps) < least_ends:
            return None
        return student / teacher


def text(alarm: Mapping[str, Any]) -> str:
    """What an alarm's record says, in one line."""
    name = str(alarm["alarm"])
    words = TEXTS.get(name, name).format(WINDOW=WINDOW, **alarm)
    return f"step {alarm['step']}: {words}; see {PAGE}"


def _mean(records: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None
