"""The campaigns of benchmarks/torture find what they look for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks.torture import compare, fuzz, fuzz_inputs, kills
from opd_jax.distill import TrainState
from opd_jax.run.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
RECORDS = [
    {"kind": "eval", "step": 0, "kl": 0.5, "seconds": 1.0},
    {"kind": "train", "step": 1, "loss": 0.25, "seconds_step": 2.0},
    {"kind": "train", "step": 2, "loss": 0.125, "tokens_per_second": 3.0},
]


def write_run(folder, records=RECORDS, weight=1.0, moment=1.0, position=2):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text('{"eval": {"every": 2}, "train": {"steps": 4}}')
    (folder / ".lock").write_text(str(folder))
    w, m = (jax.numpy.full((2, 3), value, jax.numpy.float32) for value in (weight, moment))
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(2, TrainState(jax.numpy.int32(2), {"w": w}, {"m": m}), {"step": position}, None)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("torture") / "whole")


def test_runs_that_differ_in_times_alone_are_the_same(whole, tmp_path):
    later = [{key: 9.0 if "second" in key else value for key, value in r.items()} for r in RECORDS]
    assert compare.differences(whole, write_run(tmp_path / "other", later)) == []


@pytest.mark.parametrize(("changed", "name"), [("weight", "['w']"), ("moment", "['m']")])
def test_a_changed_bit_of_a_checkpoint_is_found(whole, tmp_path, changed, name):
    other = write_run(tmp_path / "other", **{changed: np.nextafter(np.float32(1), np.float32(2))})
    found = compare.differences(whole, other)
    assert found and all(text.startswith("checkpoints/2: ") for text in found)
    assert any(name in text and "has other bits" in text for text in found)
    others = {"['w']", "['m']"} - {name}
    assert not any(text in line for text in others for line in found)


def test_another_position_in_the_prompts_is_found(whole, tmp_path):
    found = compare.differences(whole, write_run(tmp_path / "other", position=3))
    assert "checkpoints/2: other prompts" in found


def test_unfinished_files_are_counted_and_no_difference(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "other")
    assert compare.leftovers(tmp_path / "other") == []
    (tmp_path / "other" / ".building-x").mkdir()
    (tmp_path / "other" / ".building-x" / "data").touch()
    assert compare.leftovers(tmp_path / "other") == [".building-x"]
    assert compare.differences(whole, tmp_path / "other") == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-9], "ends in a torn line"),
        (lambda text: "".join(text.splitlines(True)[:-1]), "has 2 lines, not 3"),
        (lambda text: text + text.splitlines(True)[-1], "has 4 lines, not 3"),
        (lambda text: text.replace("0.25", "0.5"), "line 2 differs"),
    ],
)
def test_a_gap_a_duplicate_a_torn_line_and_another_value_are_found(whole, tmp_path, damage, said):
    shutil.copytree(whole, tmp_path / "other")
    file = tmp_path / "other" / "metrics.jsonl"
    file.write_text(damage(file.read_text()))
    assert any(said in text for text in compare.differences(whole, tmp_path / "other"))


def test_a_file_that_is_missing_or_too_much_is_found(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "other")
    shutil.move(tmp_path / "other" / "checkpoints" / "2", tmp_path / "other" / "checkpoints" / "1")
    found = compare.differences(whole, tmp_path / "other")
    assert found == ["checkpoints/2 is missing", "checkpoints/1 is too much"]


class Rows(tfds.core.GeneratorBasedBuilder):
    """A data set of the texts that it is given."""

    VERSION = tfds.core.Version("1.0.0")
    texts: tuple[str, ...] = ()

    def _info(self):
        features = tfds.features.FeaturesDict({"prompt": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": ((n, {"prompt": text}) for n, text in enumerate(self.texts))}

    def _generate_examples(self):
        raise NotImplementedError


def test_a_data_set_with_another_record_is_found(tmp_path):
    def build(name, texts):
        builder = Rows(data_dir=tmp_path / name, file_format="array_record")
        builder.texts = texts
        builder.download_and_prepare()
        return Path(builder.data_path)

    whole = build("whole", ("a", "b", "c"))
    assert compare.differences(whole, build("same", ("a", "b", "c"))) == []
    assert any("other records" in text for text in compare.differences(whole, build("new", ("a", "c", "b"))))


def test_the_moment_of_a_kill_is_told_by_what_it_left(whole, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    assert kills.moment(folder, began=False) == "start"
    assert kills.moment(folder, began=True) == "evaluation"
    file, records = folder / "metrics.jsonl", [*RECORDS]
    for record, where in (
        ({"kind": "eval", "step": 2}, "rollouts and update"),
        ({"kind": "train", "step": 3}, "rollouts and update"),
        ({"kind": "train", "step": 4}, "evaluation"),
        ({"kind": "eval", "step": 4}, "end"),
    ):
        records.append(record)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert kills.moment(folder, began=True) == where
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert kills.moment(folder, began=True) == "checkpoint"


@pytest.mark.slow
def test_a_fault_is_told_from_an_input_that_is_read_and_one_that_is_refused(tmp_path):
    fuzz_inputs.write(tmp_path / "sound")
    worker = fuzz.Worker(("JSONL", tmp_path / "sound"))
    try:
        assert worker.read("JSONL", tmp_path / "sound") == ("read", "")
        fuzz_inputs.place("JSONL", tmp_path / "sound", tmp_path / "now", b"[" * 100_000)
        outcome, said = worker.read("JSONL", tmp_path / "now")
        assert (outcome, "line 1 is not JSON" in said) == ("refused", True)
        assert worker.read("no such kind", tmp_path / "now")[0] == "fault"
    finally:
        worker.end()


DRAWN = """
import hashlib, random, sys
from benchmarks.torture import mutate
drawn = [mutate.mutate("config.json", sys.argv[1].encode(), random.Random(f"0/{n}")) for n in range(50)]
print(hashlib.sha256(repr(drawn).encode()).hexdigest(), len(set(drawn)))
"""


def test_an_input_is_drawn_from_its_seed_and_number_alone_in_every_process():
    sound = json.dumps({"a": [1, {"b": "c"}], "d": None})
    command = [sys.executable, "-c", DRAWN, sound]
    said = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, text=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    (line,) = said
    assert int(line.split()[1]) > 40
