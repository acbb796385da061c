"""The report page: its numbers, what it says of missing data, and that it stands alone."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from opd_jax.errors import UserError
from opd_jax.report import answers as report_answers
from opd_jax.report import build as report
from opd_jax.report import canvas
from opd_jax.report import display as report_display
from opd_jax.report import figures as report_figures
from opd_jax.report import html as report_html
from opd_jax.report import page as report_page
from opd_jax.report import rollouts as report_rollouts
from opd_jax.run import run_record

BINS = 4


def train_line(step: int, rng: np.random.Generator, released: bool) -> dict:
    tokens = rng.integers(10, 50, BINS).astype(float)
    kept = int(tokens[:2].sum() if released else tokens.sum())
    return {
        "kind": "train",
        "step": step,
        "loss": 1.0 / step,
        "kl": 2.0 / step,
        "advantage_std": 1.0,
        "grad_norm": 0.5,
        "response_tokens": int(tokens.sum()),
        "supervised_tokens": kept,
        "kept_share": kept / tokens.sum(),
        "accepted_share": 0.5 if released else 0.0,
        "gain": 12.0 if released else None,
        "response_length": 40.0,
        "finished_share": 0.9,
        "repeated_share": 0.1,
        "stop_probability": 0.02,
        "teacher_stop_probability": 0.01,
        "tokens_per_second": 100.0,
        "seconds_sample": 2.0,
        "seconds_train": 1.0,
        "seconds_data": 0.25,
        "seconds_step": 4.0,
        "position_tokens": tokens.tolist(),
        "position_contrast_sum": (tokens * rng.uniform(0, 3, BINS)).tolist(),
        "position_advantage_sum": (tokens * -0.5).tolist(),
        "position_advantage_sq_sum": (tokens * (0.25 + 0.09)).tolist(),
        "position_kept_tokens": (tokens * [1, 1, 0, 0] if released else tokens).tolist(),
        "release_histogram": [0, 3, 1, 0] if released else [0, 0, 0, 0],
    } | {
        f"gradient_{name}_{part}": value
        for part, value in (("kept", 2.0), ("all", 1.5), ("released", 0.25 if released else None))
        for name in (("norm", "snr") if step % 2 else ())
    }


def rollout(step: int, text: str = "One. ", accepted: bool = True, **more) -> dict:
    return {
        "step": step,
        "prompt": "Why <i>?",
        "finished": True,
        "accepted": accepted,
        "gain": 9.5 if accepted else None,
        "kept_tokens": 3,
        "tokens": 5,
        "sentences": [
            {
                "text": text,
                "tokens": 3,
                "kept": True,
                "contrast": 1.5,
                "advantage": -0.25,
                "advantage_std": 0.5,
            },
            {"text": "Two.", "tokens": 2, "kept": False, "contrast": None, "advantage": None},
        ],
    } | more


ALARM = {"kind": "alarm", "step": 9, "alarm": "repeated_share", "of": "train", "value": 0.25}


def write_run(folder: Path, train=(), evals=(), rollouts=(), rule="paper") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"release": {"rule": rule}, "seed": 0}))
    for name, lines in (("metrics", [*train, *evals]), ("rollouts", rollouts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    base, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    evals = [
        {"kind": "eval", "step": s, "kl": kl, "kl_low": kl - 0.1, "kl_high": kl + 0.2}
        for s, kl in ((0, 1.5), (10, 0.75))
    ]
    full = [train_line(step, rng, released=False) for step in range(1, 13)]
    paper = [train_line(step, rng, released=True) for step in range(1, 13)]
    return [
        write_run(base / "full", full, evals, [rollout(3, accepted=False, right=True)], rule="none"),
        write_run(base / "paper", paper, evals, [rollout(1, right=False), rollout(12, right=True)]),
    ]


@pytest.fixture(scope="module")
def drawn(workdirs, tmp_path_factory):
    """The page of two runs, and (label of x, label of y) of each of its plots."""
    labels, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        labels.extend((axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes)
        return save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        out = report.build(workdirs, tmp_path_factory.mktemp("out") / "deep" / "report.html")
        report_figures.sentence_margins(rollout(1)["sentences"])
        report_figures.intervals("accuracy, share of responses right", ["a"], [(0.5, 0.4, 0.6)], [0])
    return out.read_text(encoding="utf-8"), labels


@pytest.fixture(scope="module")
def page(drawn):
    return drawn[0]


# What an axis is in; runs and arms are named, and have no unit.
UNITS = r"\b(step|tokens?|nats|nat|seconds|share|ratio|probability|BIC units|run|arm)\b"


def test_both_axes_of_every_plot_are_labelled_with_their_units(drawn):
    labels = drawn[1]
    assert len(labels) == 27
    for pair in labels:
        assert all(re.search(UNITS, label) for label in pair), pair


def test_forty_runs_have_forty_looks():
    looks = {(canvas.colour(n), *map(str, canvas.marks(n, 1).values())) for n in range(40)}
    assert len(looks) == 40
    swatches = {re.sub("<.*?>", "", report_html.swatch(n)) + canvas.colour(n) for n in range(40)}
    assert len(swatches) == 40


class Outline(HTMLParser):
    """Collects tags with their attributes, the text, and tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open, self.broken = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_and_loads_nothing(page):
    outline = Outline(page)
    assert not outline.broken and not outline.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in outline.tags}
    references = [
        value
        for _, attrs in outline.tags
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_every_plot_is_valid_svg_with_the_colours_of_the_page(page):
    plots = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(plots) == 25
    for plot in plots:
        ElementTree.fromstring(plot)
        assert "#1112" not in plot and "#11110" not in plot  # no placeholder is left
        assert "var(--run-1)" in plot


def test_ids_of_different_plots_do_not_collide(page):
    defined = [
        set(re.findall(r'<(?:path|clipPath|g)[^>]* id="([mp][0-9a-f]{10})"', plot))
        for plot in re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    ]
    assert all(defined)
    assert len(set().union(*defined)) == sum(map(len, defined))


def test_summary_holds_the_numbers_of_the_run(workdirs):
    run = run_record.read_run(workdirs[1])
    row = run_record.summary(run)
    lines = (workdirs[1] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:12]]
    tokens, kept = (sum(r[k] for r in records) for k in ("response_tokens", "supervised_tokens"))
    assert (row["Run"], row["Rule"], row["Steps"]) == ("paper", "paper", "12")
    assert row["Held-out KL, nats/token"] == "1.500 [1.400, 1.700] → 0.750 [0.650, 0.950]"
    assert row["Sampled KL, nats/token"] == f"2.000 → {2 / 12:.3f}"
    assert row["Supervised tokens"] == f"{kept:,} ({100 * kept / tokens:.0f}%)"
    assert row["Releases accepted"] == "50%"
    assert row["Seconds a step: sample, train, data"] == "2, 1, 0.25"


def test_first_step_which_compiles_is_left_out_of_the_times(tmp_path):
    rng = np.random.default_rng(1)
    lines = [train_line(step, rng, released=True) for step in (1, 2, 3)]
    lines[0] |= {"seconds_sample": 500.0, "seconds_step": 900.0}
    lines[1] |= {"seconds_sample": 3.0}
    seconds = run_record.phase_seconds(run_record.read_run(write_run(tmp_path / "r", lines)))
    assert seconds == {"sample": 2.5, "train": 1.0, "data": 0.25, "other": 0.25}


def test_profiles_over_the_position_weigh_every_token_alike(workdirs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        report_figures, "position", lambda name, unit, profiles, **_: drawn.update({name: profiles})
    )
    run = run_record.read_run(workdirs[1])
    report_page.render([run], [run_record.summary(run)], [])
    first, last = run.train[:3], run.train[-3:]
    for window, lines in (("first quarter of steps", first), ("last quarter", last)):
        tokens = sum(np.array(line["position_tokens"]) for line in lines)
        contrast = sum(np.array(line["position_contrast_sum"]) for line in lines)
        np.testing.assert_allclose(drawn["Teacher margin M"][0][window], contrast / tokens)
        np.testing.assert_allclose(drawn["Advantage A, mean"][0][window], -0.5)
        np.testing.assert_allclose(drawn["Advantage A, spread"][0][window], 0.3)
        np.testing.assert_allclose(drawn["Supervised share"][0][window], [1, 1, 0, 0])


def test_each_run_has_marks_of_its_own_beside_its_colour(page):
    for plot in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        drawn = re.findall(r'<use [^>]*xlink:href="#(m\w+)"[^>]*fill: var\(--run-(\d)\)', plot)
        shapes = {run: {shape for shape, of in drawn if of == run} for _, run in drawn}
        assert not shapes.get("0", set()) & shapes.get("1", set())
    key = re.search(r'<p class="key">.*?</p>', page)[0]
    assert "●" in key and "■" in key


def test_the_gradients_signal_to_noise_is_told_by_the_tokens_it_is_of(page):
    text = " ".join(Outline(page).text)
    assert "median signal-to-noise 2.00 (trained on), 1.50 (all tokens), 0.25 (released alone)" in text
    assert "1.50 (all tokens), – (released alone), over 6 measurements" in text


def test_right_and_wrong_answers_are_counted_and_their_absence_is_explained(page, tmp_path):
    assert "2 recorded rollouts, 1 right, 1 wrong." in page
    lines = [train_line(1, np.random.default_rng(0), released=True)]
    for name, rollouts, why in (
        ("none", [], "No rollout was recorded, so none is graded"),
        ("ungraded", [rollout(1)], "its prompts carry no answer"),
    ):
        run = run_record.read_run(write_run(tmp_path / name, lines, rollouts=rollouts))
        section = report_answers.section([run])
        assert why in section and "<svg" not in section


def test_release_is_told_in_words_with_the_median_inside_its_bin(page):
    text = " ".join(Outline(page).text)
    # 12 steps x (3 in bin 2, 1 in bin 3): the median is 2/3 into the second quarter.
    expected = "48 accepted releases (50% of rollouts), median position 42% of the response"
    assert expected in text
    assert "rule “none”, no accepted releases; 100% of the response tokens are supervised" in text


def test_the_mean_gain_weighs_every_accepted_release_alike(tmp_path):
    lines = [train_line(step, np.random.default_rng(0), released=True) for step in (1, 2)]
    lines[0] |= {"gain": 10.0, "release_histogram": [0, 1, 0, 0]}
    lines[1] |= {"gain": 2.0, "release_histogram": [0, 3, 0, 0]}
    text = report.build([write_run(tmp_path / "r", lines)], tmp_path / "o.html").read_text()
    assert "mean BIC gain 4.0" in text


def test_a_sentence_that_is_cut_inside_is_shown_as_partly_supervised():
    cut = rollout(1)
    cut["sentences"][0] |= {"kept": False, "kept_tokens": 2}
    article = report_rollouts.articles([cut])
    hint = "M 1.50, A -0.25 nats/token, 3 tokens, 2 of them supervised"
    assert f'<span class="partly" title="{hint}">' in article
    assert article.count('class="cut"') == 1


@pytest.mark.parametrize(
    "name, content",
    [("config.json", "{"), ("config.json", "[1]"), ("versions.json", "\\"), ("prompts.json", "7")],
)
def test_a_damaged_file_of_a_run_ends_in_one_line(tmp_path, name, content):
    run = write_run(tmp_path / "r", [train_line(1, np.random.default_rng(0), released=True)])
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name) as caught:
        report.build([run], tmp_path / "o.html")
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_ends_in_one_line(workdirs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for main in (report.main, report_display.main):
        with pytest.raises(SystemExit) as ended:
            main([f"--workdir={workdirs[1]}", f"--out={tmp_path}/file/x"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --out={tmp_path}/file/x cannot be written") and said.count("\n") == 1


def test_where_configs_differ_is_shown_and_equal_keys_are_not(workdirs):
    runs = [run_record.read_run(workdir) for workdir in workdirs]
    assert run_record.differences(runs) == {"release.rule": ['"none"', '"paper"']}


def test_model_text_titles_and_prompts_are_escaped(tmp_path):
    evil = '<script>alert("x")</script> $\\frac{1}{'
    line = train_line(1, np.random.default_rng(0), released=True)
    run = write_run(tmp_path / "r", [line], rollouts=[rollout(1, text=evil + " \ud83d")], rule=evil)
    answers = [{"prompt": evil, "answers": {evil: evil}}]
    out = report.build([run], tmp_path / "o.html", [evil], [{evil: evil}], answers)
    text = out.read_text(encoding="utf-8")
    outline = Outline(text)
    assert "script" not in {tag for tag, _ in outline.tags} and not outline.broken
    assert "".join(outline.text).count(evil) >= 6


def test_kept_and_released_sentences_differ_and_carry_their_margin(page):
    article = re.findall(r"<article>.*?</article>", page, re.DOTALL)[1]  # the first has none
    spans = re.findall(r'<span class="(\w+)"[^>]*>(.*?)</span><sub>(.*?)</sub>', article)
    assert spans == [("kept", "One.", "1.50"), ("released", "Two.", "–")]
    assert article.count('class="cut"') == 1
    assert "3 of 5 tokens supervised" in article and "BIC gain 9.5" in article


def test_rollouts_of_the_latest_step_come_first_and_those_with_a_release_before_others():
    stored = [rollout(s, accepted=a) for s in (1, 5, 9) for a in (False, True, False)]
    shown = [(r["step"], r["accepted"]) for r in report_rollouts._choose(stored)]
    assert shown == [(9, True), (9, False), (9, False), (1, True), (1, False)]
    assert list(report_rollouts._choose([])) == []


@pytest.mark.parametrize(
    ("train", "evals"),
    [
        ([{"kind": "train", "step": 1}], []),
        ([], [{"kind": "eval", "step": 0, "kl": 1.0}]),
        ([{"kind": "train", "step": 1, "loss": None, "kl": None, "position_tokens": [0, 0]}], []),
    ],
)
def test_missing_data_is_said_in_words(tmp_path, train, evals):
    run = write_run(tmp_path / "r", train, evals)
    (run / "config.json").unlink()
    (run / "rollouts.jsonl").unlink()
    text = report.build([run], tmp_path / "o.html").read_text(encoding="utf-8")
    for words in ("No rollouts were recorded.", "No times were recorded.", "No loss was recorded."):
        assert words in text
    assert evals or "not measured" in text


def test_loss_that_is_not_finite_is_a_warning(tmp_path):
    lines = [train_line(s, np.random.default_rng(s), released=True) for s in (1, 2, 3)]
    lines[1]["loss"] = None
    text = report.build([write_run(tmp_path / "r", lines)], tmp_path / "o.html").read_text()
    assert "the loss is not finite in 1 of 3 steps, first in step 2" in text


def test_runs_of_different_length_share_a_page(workdirs, tmp_path):
    short = write_run(tmp_path / "paper", [train_line(1, np.random.default_rng(0), released=True)])
    text = report.build([*workdirs, short], tmp_path / "o.html").read_text(encoding="utf-8")
    assert "all steps" in text and "last quarter" in text
    # Two folders are called "paper", so both bear their parents' names.
    assert f"{tmp_path.name}/paper" in text


def test_long_run_makes_no_heavy_page():
    steps = list(range(20_000))
    series = (steps, [step % 7 for step in steps])
    svg = report_figures.curves("c", "u", [("a", "-", [series])])
    assert len(svg) < 60_000


def test_unfinished_last_line_is_ignored_and_an_earlier_bad_line_is_named(tmp_path):
    run = write_run(tmp_path / "r", [{"kind": "train", "step": 1}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    assert len(run_record.read_run(run).train) == 1
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        run_record.read_run(run)


def test_entry_without_a_run_is_one_line_and_status_2_and_never_imports_jax(workdirs, tmp_path):
    program = (
        "import sys; from opd_jax.report import build as report; code = 0\n"
        "try: report.main(sys.argv[1:])\n"
        "finally: assert 'jax' not in sys.modules"
    )

    def call(*arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    good = call(f"--workdir={workdirs[0]}", f"--workdir={workdirs[1]}", f"--out={tmp_path}/r.html")
    assert (good.returncode, good.stdout.strip()) == (0, f"{tmp_path}/r.html"), good.stderr
    bad = call(f"--workdir={tmp_path}")
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1 and "no metrics.jsonl" in bad.stderr
    assert bad.stderr.startswith("error: ")


def test_alarms_stand_before_everything_else_with_the_name_of_their_run(workdirs, page, tmp_path):
    assert "Alarm" not in page
    train = [json.loads(line) for line in (workdirs[1] / "metrics.jsonl").read_text().splitlines()]
    folder = write_run(tmp_path / "a<b", [*train, ALARM])
    text = report.build([workdirs[0], folder], tmp_path / "out.html").read_text(encoding="utf-8")
    alarm = "Alarm, a&lt;b: step 9: responses end in a loop of the same tokens: 25% of them"
    assert text.count("Alarm, ") == 1 and 0 < text.index(alarm) < text.index("<h2")
