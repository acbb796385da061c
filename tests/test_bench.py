"""The benchmark's command line: its table has every phase, and wrong arguments get one line."""

import re

import pytest

from tests import tiny

SHAPE = (1, 32, 48, 4, 2, 8, 264, 4, 8, 8)


@pytest.fixture(scope="module")
def printed(models):
    """The lines of a run with an int8 teacher."""
    run = tiny.entry(
        *("opd_jax.bench", *SHAPE, "--teacher_weights=int8", "--teacher_layers=2"),
        f"--tokenizer={models / 'student'}",
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_every_phase_has_its_seconds_and_rate(printed):
    machine, sizes, columns, *rows, cost = printed
    assert "a 2048³ matrix product runs at" in machine
    assert sizes.startswith("layers=1 width=32 ffn=48")
    assert columns.split()[:2] == ["phase", "seconds"]
    table = {row.split()[0]: list(map(float, row.replace("%", "").split()[1:])) for row in rows}
    assert list(table) == ["sample", "score", "release", "update", "step"]
    assert "a copy at" in machine and columns.split()[-2:] == ["predicted", "measured/predicted"]
    for name in ("sample", "score", "step"):
        *_, predicted, ratio = table[name]
        assert predicted >= 0 and ratio > 0, name
    batch, response = SHAPE[7], SHAPE[9]
    for name, (seconds, speed, *_) in table.items():
        # Seconds have four decimals, which at this size are few digits.
        assert abs(seconds - batch * response / speed) < 1e-4, name
    for name in ("sample", "score", "update"):
        *_, share_of_matmul, _, _ = table[name]
        # The update is the step less score and release: at this size a difference of noise, of either sign.
        assert len(table[name]) == 7 and (name == "update" or 0 <= share_of_matmul < 1000), name
    share = r"(-?\d+\.\d\d)%"
    added = rf"sentences and the release rule add {share} to the step, from {share} to {share}: .*"
    middle, least, most = map(float, re.fullmatch(added, cost).groups())
    assert least <= middle <= most
    assert "5 train_steps with release.rule=paper, each less one with none and no sentences" in cost


@pytest.mark.parametrize(
    "shape, flag, said",
    [
        (SHAPE, "--micro_batch=3", "--micro_batch=3 does not divide BATCH=4"),
        ((1, 32, 48, 4, 3, 8, 264, 4, 8, 8), "--chunk=8", "HEADS=4 is no multiple of KV_HEADS=3"),
        ((0, *SHAPE[1:]), "--chunk=8", "LAYERS=0 is out of range"),
        (SHAPE, "--remat=foo", "none|dots|full"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(shape, flag, said):
    run = tiny.entry("opd_jax.bench", *shape, flag)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert said in run.stderr


def test_a_shape_that_is_not_ten_numbers_is_refused_in_one_line():
    run = tiny.entry("opd_jax.bench", *SHAPE[:9])
    assert run.returncode == 2
    assert run.stderr == (
        "error: give ten whole numbers: "
        "layers width ffn heads kv_heads head_size vocabulary batch prompt response\n"
    )
