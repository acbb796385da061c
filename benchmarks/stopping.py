"""What release.stop=rule saves, and how often it agrees with the rule on whole responses.

    python -m benchmarks.stopping sample --student=FOLDER --out=FILE.csv  # long whole responses
    python -m benchmarks.stopping curve FILE.csv [--picture=FILE.svg]     # every pair of thresholds on them
    python -m benchmarks.stopping curve RUN/rollouts.jsonl                # on the rollouts of a run
    python -m benchmarks.stopping curve simulated                         # in the regime of the paper
    python -m benchmarks.stopping step --student=FOLDER                   # seconds of a step, three ways

What the rule would have done online follows from a whole response's scores: it reads the sentences that have
ended when a block is full. So the thresholds are compared on responses that are written once, with
release.stop=never. `step` times the programs that training runs.

The teacher is the demo's, SmolLM2-135M-Instruct; the student is a folder that `opd_jax.export` wrote.
"""

import argparse
import copy
import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from opd_jax import release as releasing
from opd_jax.config import load
from opd_jax.distill import StepInputs, train_step
from opd_jax.errors import UserError, fail
from opd_jax.progress import Progress
from opd_jax.run import Draw, Key, long_job

BLOCK = 64  # the default of release.stop_block
NEAR = 0.1  # a cut as near as this share of the length agrees
GAINS, AFTERS = (0, 1, 2, 4, 6, 10), (2, 4, 8, 10, 16)
# The paper's regime: sentences a response, share of responses with a drop, share of the response before it,
# and the step of the mean in standard deviations of a sentence's score, which is worth about 24 nats.
SENTENCES, DROPPING, BEFORE, STEP = 400, 0.79, 0.13, 0.88


def pair(student: str, batch: int, tokens: int, **fields):
    """The job of a run with long answers."""
    config = load("demo")
    config.update_from_flattened_dict({"student.path": student, "student.drop_layers": ()} | fields)
    return long_job(config, batch, tokens)


def sample(options) -> None:
    """Writes one line for each sentence of whole responses."""
    job = pair(options.student, options.batch, options.tokens)
    params, teacher_params = job.start().params, job.teacher_params()
    draw, batches = Draw(job.sample_group, job.key(Key.SAMPLING), job.mesh), job.training_batches()

    @jax.jit
    def supervise(params, inputs):
        scores, released, _ = train_step.supervise(job.student, job.teacher, job.config, params, 0, inputs)
        return scores.contrast_BT, released

    with Progress() as shown, Path(options.out).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("response", "sentence", "tokens", "contrast"))
        for number in range(-(-options.rollouts // options.batch)):
            _, rollouts = draw(params, next(batches), number, shown)
            inputs = StepInputs(teacher_params, rollouts, job.table, job.key(Key.RELEASE))
            contrast_BT, released = jax.device_get(supervise(params, inputs))
            mask_BT = np.asarray(rollouts.mask_BT)
            for b in range(len(mask_BT)):
                for sentence in range(released.segment_BT[b][mask_BT[b]].max(initial=-1) + 1):
                    here_T = mask_BT[b] & (released.segment_BT[b] == sentence)
                    mean = float(contrast_BT[b][here_T].astype(np.float64).mean())
                    row = number * options.batch + b, sentence, here_T.sum(), f"{mean:.6f}"
                    writer.writerow(row)
            file.flush()
            shown.say(f"{(number + 1) * options.batch} responses")


ARMS = {
    "full supervision": {"release.rule": "none"},
    "paper's rule": {"release.rule": "paper"},
    "paper's rule, stops": {"release.rule": "paper", "release.stop": "rule", "release.stop_audit": 0.0},
}


def step(options) -> None:
    """Times a step on the same prompts with the same draws: no rule, the rule, and the rule with stops."""
    job = pair(options.student, options.batch, options.tokens)
    teacher_params, local = job.teacher_params(), next(job.training_batches())
    print("| | written | supervised | sampling, s | score, release, update, s | step, s |")
    print("|---|---|---|---|---|---|", flush=True)
    with Progress() as shown:
        for name, fields in ARMS.items():
            config = copy.deepcopy(job.config)
            with config.unlocked():
                config.update_from_flattened_dict(fields)
            own = dataclasses.replace(job, config=config)
            draw, least, measured = own.training_draw(teacher_params), [np.inf, np.inf], {}
            for turn in range(1 + options.repeats):  # the first one compiles
                state = own.start()
                begin = time.perf_counter()
                _, rollouts = jax.block_until_ready(draw(state.params, local, state.step, shown))
                sampled = time.perf_counter()
                inputs = StepInputs(teacher_params, rollouts, own.table, own.key(Key.RELEASE))
                measured = jax.block_until_ready(own.train_step(state, inputs))[1]
                seconds = [sampled - begin, time.perf_counter() - sampled]
                least = [min(pair) for pair in zip(least, seconds, strict=True)] if turn else least
            tokens = (f"{int(measured[key]):,}" for key in ("response_tokens", "supervised_tokens"))
            times = (f"{value:.1f}" for value in (*least, sum(least)))
            print(f"| {name} | {' | '.join([*tokens, *times])} |", flush=True)


def read(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens of each sentence, its mean margin) of each response."""
    if path == "simulated":
        return simulated(1000)
    if path.endswith(".jsonl"):
        rows = [json.loads(line)["sentences"] for line in Path(path).read_text().splitlines()]
        return [(_column(row, "tokens"), _column(row, "contrast")) for row in rows if row]
    found: dict[str, list[dict]] = {}
    with Path(path).open() as file:
        for line in csv.DictReader(file):
            found.setdefault(line["response"], []).append(line)
    return [(_column(rows, "tokens"), _column(rows, "contrast")) for rows in found.values()]


def _column(rows, name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def simulated(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Responses in the paper's regime: normal sentence scores of equal spread, whose mean steps down once."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        score_N = 3 + 0.5 * rng.standard_normal(SENTENCES)
        if rng.random() < DROPPING:
            score_N[round(BEFORE * SENTENCES) :] -= 0.5 * STEP
        found.append((np.full(SENTENCES, 20.0), np.expm1(np.maximum(score_N, 0))))
    return found


@jax.jit
def _points(score_BN, valid_BN):
    return releasing.change_point(score_BN, valid_BN, min_segments=4)


class Online:
    """What the rule finds in every response after each block, and at the end."""

    def __init__(self, responses, block: int):
        most = max(len(tokens) for tokens, _ in responses)
        longest = max(int(tokens.sum()) for tokens, _ in responses)
        score_BN = np.zeros((len(responses), most), np.float32)
        self.end_BN = np.full((len(responses), most), np.inf)
        for b, (tokens, margin) in enumerate(responses):
            score_BN[b, : len(tokens)] = np.log1p(margin)
            self.end_BN[b, : len(tokens)] = np.cumsum(tokens)
        there_BN = np.isfinite(self.end_BN)
        self.length_B = np.where(there_BN, self.end_BN, 0).max(axis=1)
        self.whole = jax.device_get(_points(score_BN, there_BN))
        self.kept_B = self._tokens(self.whole.cut_B)
        self.steps = []  # (tokens written, what the rule says of the sentences that have ended)
        for t in range(block, longest + block, block):
            begun_BN = there_BN & (np.pad(self.end_BN, ((0, 0), (1, 0)))[:, :-1] < t)
            ended_BN = begun_BN & (np.arange(most) < begun_BN.sum(axis=1)[:, None] - 1)
            self.steps.append((t, jax.device_get(_points(score_BN, ended_BN)), ended_BN.sum(axis=1)))

    def _tokens(self, cut_B):
        """Tokens of the first sentences."""
        last_B = np.take_along_axis(self.end_BN, np.maximum(cut_B - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(cut_B > 0, last_B, 0)

    def stopped(self, gain: float, after: int):
        """(share of the tokens that is written, share of the responses that agree, of those that stop)."""
        written_B, kept_B = self.length_B.copy(), self.kept_B.copy()
        going_B = np.ones(len(written_B), bool)
        for t, point, sentences_B in self.steps:
            certain_B = point.accepted_B & (point.gain_B > gain) & (sentences_B - point.cut_B >= after)
            now_B = going_B & certain_B & (t < self.length_B)
            written_B[now_B], kept_B[now_B] = t, self._tokens(point.cut_B)[now_B]
            going_B &= ~now_B
        near_B = np.abs(kept_B - self.kept_B) <= NEAR * self.length_B
        agrees_B = going_B | (near_B & self.whole.accepted_B)
        return written_B.sum() / self.length_B.sum(), agrees_B.mean(), 1 - going_B.mean()


def curve(options) -> None:
    """Prints a table of thresholds; draws it if asked to."""
    responses = [row for row in read(options.responses) if len(row[0]) >= options.least]
    if not responses:
        raise UserError(f"{options.responses} has no response of {options.least} sentences or more")
    found = Online(responses, options.block)
    sentences = statistics.mean(len(tokens) for tokens, _ in responses)
    accepted_B = found.whole.accepted_B
    kept = (found.kept_B / found.length_B)[accepted_B]
    median, gain = (np.median(kept), np.median(found.whole.gain_B[accepted_B])) if len(kept) else (1, 0)
    print(
        f"{len(responses)} responses of {sentences:.1f} sentences and {found.length_B.mean():.0f} tokens; "
        f"{accepted_B.mean():.0%} released, the median after {median:.0%}, with a gain of {gain:.1f} nats\n"
    )
    print("| stop_gain | stop_after | tokens written | decision and cut agree | responses stopped |")
    print("|---|---|---|---|---|")
    points = [(gain, after, *found.stopped(gain, after)) for gain in GAINS for after in AFTERS]
    for gain, after, *shares in points:
        print(f"| {gain} | {after} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    if options.picture:
        _draw(points, options.picture)


def _draw(points, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "stopping", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for after in AFTERS:
        own = [(written, agrees, gain) for gain, of, written, agrees, _ in points if of == after]
        line = axes.plot(
            [x for x, _, _ in own], [y for _, y, _ in own], "o-", ms=4, label=f"{after} sentences"
        )
        for x, y, gain in own:
            axes.annotate(
                str(gain), (x, y), (3, 4), textcoords="offset points", size=7, color=line[0].get_color()
            )
    axes.axhline(0.9, color="0.6", lw=0.8, ls="--")
    axes.set(xlabel="share of the tokens that is written", ylabel="share of responses that agree")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(title="stop_after; labels: stop_gain", fontsize=8, title_fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    drawing = {}
    for name, run, batch in (("sample", sample, 32), ("step", step, 16)):
        drawing[name] = command = commands.add_parser(name)
        command.add_argument("--student", required=True)
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--tokens", type=int, default=640)
        command.set_defaults(run=run)
    drawing["sample"].add_argument("--out", required=True)
    drawing["sample"].add_argument("--rollouts", type=int, default=256)
    drawing["step"].add_argument("--repeats", type=int, default=2)
    command = commands.add_parser("curve")
    command.add_argument("responses")
    command.add_argument("--block", type=int, default=BLOCK)
    command.add_argument("--least", type=int, default=0, help="only responses of so many sentences")
    command.add_argument("--picture")
    command.set_defaults(run=curve)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(error)
