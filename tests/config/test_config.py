"""Every mistake a user can make ends in one line that names the key, the value and the remedy."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from opd_jax import config, export
from opd_jax.distill import train_step
from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.run import job
from opd_jax.run.restore import run_config
from tests import tiny

ROOT = Path(__file__).parents[2]
EVERY_NAME = tuple({path[-1] for path in traverse_util.flatten_dict(transformer.abstract(tiny.STUDENT))})
DEMO = "--config=configs/demo.py"


COMPILES = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILES.append(event) if "backend_compile" in event else None
)


@pytest.fixture
def no_compiling():
    """Fails a test in which XLA compiled something."""
    COMPILES.clear()
    yield
    assert not COMPILES


def test_compiling_is_noticed():
    COMPILES.clear()
    jax.jit(lambda x: x + 17)(3)
    assert COMPILES


def refusal(settings, workdir=None) -> str:
    with pytest.raises(UserError) as error:
        job.prepare(settings, workdir)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("seed", -1, "between 0 and 4294967295"),
        ("seed", 2**32, "between 0 and 4294967295"),
        ("segments.kind", "punk", "did you mean punkt?"),
        ("data.source", "jsnl", "did you mean jsonl?"),
        ("release.rule", "papr", "did you mean paper?"),
        ("release.rule", "iw-opd", "did you mean iw_opd?"),
        ("release.prefix_fraction", 0.0, "between"),
        ("release.prefix_tokens", -1, "at least 0"),
        ("release.fopd_start", 2000, "fopd_end=1024"),
        ("release.fopd_steps", 0, "at least 1"),
        ("release.iw_gamma", -0.5, "at least 0"),
        ("release.prune_overlap", 1.5, "between 0 and 1"),
        ("release.prune_drop", 2.0, "between 0 and 1"),
        ("release.ta_share", 5.0, "between"),
        ("release.stop", "sometimes", "never, rule, length:N"),
        ("release.stop", "length:0", "never, rule, length:N"),
        ("release.stop", "length:3:4", "never, rule, length:N"),
        ("release.stop", "grow:9:3:5", "smaller"),
        ("release.stop", "length:12", "rollout.max_tokens=12"),
        ("release.stop_block", 1, "at least 2"),
        ("release.stop_audit", 1.5, "between 0 and 1"),
        ("segments.kind", "fixed:0", "1 or more"),
        ("segments.kind", "line", "use one of punkt"),
        ("segments.punkt", "/nowhere/at/all", "punkt_tab"),
        ("rollout.halvings", -1, "at least 0"),
        ("rollout.slots", 4, "mesh.data"),
        ("rollout.cache_dtype", "int4", "auto, int8"),
        ("data.prompt_buckets", (16, 64), "data.prompt_tokens=48"),
        ("data.prompt_buckets", (0,), "from 1 to"),
        ("data.prompt_buckets", ("16",), "from 1 to"),
        ("rollout.samples_per_prompt", 3, "rollout.batch=8"),
        ("rollout.samples_per_prompt", 2, "rollout.batch / rollout.samples_per_prompt=4"),
        ("scoring.student", "sample", "did you mean sampler?"),
        ("attention.kernel", "splsh", "did you mean splash?"),
        ("attention.kernel", "splash", "runs on TPU alone"),
        ("teacher.weights", "int4", "use one of float, int8"),
        ("optimizer.schedule", "zigzag", "constant, linear, cosine"),
        ("data.over_long", "cut", "error, drop"),
        ("scoring.candidates", 1, "between 2 and 128"),
        ("optimizer.learning_rate", float("nan"), "no finite number"),
        ("rollout.temperature", float("inf"), "no finite number"),
        ("rollout.temperature", -1.0, "at least 0"),
        ("rollout.top_p", 0.0, "between"),
        ("rollout.min_p", 1.5, "between 0 and 1"),
        ("train.steps", 0, "at least 1"),
        ("train.micro_batch", 3, "rollout.batch=8"),
        ("train.frozen", ("embeding",), "did you mean embedding?"),
        ("train.frozen", EVERY_NAME, "leave one to train"),
        ("train.frozen", (1,), "give strings"),
        ("eval.benchmark", (-1,), "give strings"),
        ("rollout.end_ids", ("258",), "give whole numbers"),
        ("student.drop_layers", (0.5,), "give whole numbers"),
        ("student.path", "x" * 5000, "File name too long"),
        ("student.path", "~nobody_of_this_name/x", "home directory"),
        ("data.path", "x" * 5000 + ".jsonl", "File name too long"),
        ("data.template", "[" * 100_000, "JSON object"),
        ("data.heldout", 0, "eval.every=0"),
        ("student.path", "", "model folder"),
        ("teacher.path", "/nowhere/at/all", "no folder"),
        ("student.path", "pkg:no_such_package", "pip install"),
        ("student.drop_layers", (2,), "0 to 1"),
        ("student.drop_layers", (0, 1), "at least one"),
        ("mesh.data", 3, "8 devices"),
        ("mesh.tensor", -2, "1 or more"),
        ("mesh.preset", "one_chips", "did you mean one_chip?"),
        ("sharding.student", "fdsp", "did you mean fsdp?"),
        ("sharding.cache", "head", "did you mean heads?"),
        ("data.prompt_tokens", 20, "data.over_long=drop"),
        ("data.template", "{", "JSON object"),
        ("teacher.end_id", 5, "258"),
        ("rollout.end_ids", (259,), "258"),
        ("data.path", "/nowhere/prompts.jsonl", "/nowhere/prompts.jsonl"),
        ("rollout.max_tokens", 1000, "256 positions"),
        ("objective.name", "revers_kl", "did you mean reverse_kl?"),
        ("objective.beta", 1.5, "between 0 and 1"),
        ("objective.top_k", 0, "between 1 and 64"),
        ("objective.advantage_clip", -1.0, "at least 0"),
        ("reward.weight", 1.0, "no training prompt has an `answer`"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key_before_anything_compiles(models, no_compiling, key, value, said):
    said_instead = refusal(tiny.config(models, **{key: value}))
    assert key in said_instead
    assert said in said_instead


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"release.rule": "random"}, "use one of advantage_std"),
        ({"release.rule": "prune_opd"}, "set release.prune_base=0"),
        ({"segments.kind": "nltk"}, "use punkt"),
        ({"objective.name": "sft"}, "the teacher writes"),
        ({"reward.weight": 0.5}, "reward.weight=0.5"),
        ({"rollout.max_tokens": 1}, "2 or more"),
    ],
)
def test_stopping_by_the_rule_is_refused_where_it_cannot_be(models, fields, said):
    assert said in refusal(tiny.config(models, **{"release.stop": "rule"}, **fields))


def test_an_int8_cache_has_the_student_run_again_unless_the_samplers_numbers_are_asked_for(models):
    rounded = {"rollout.cache_dtype": "int8"}
    assert train_step.recomputes(job.prepare(tiny.config(models, **rounded)).config)
    said = refusal(tiny.config(models, **rounded, **{"scoring.student": "sampler"}))
    assert "rollout.cache_dtype" in said and "set scoring.student=recompute" in said
    assert not train_step.recomputes(tiny.config(models))
    assert train_step.recomputes(tiny.config(models, **{"train.updates_per_rollout": 2}))


def test_a_teacher_that_more_ids_end_is_refused_unless_the_config_says_which_count(models, tmp_path):
    teacher = shutil.copytree(models / "teacher", tmp_path / "teacher")
    (teacher / "generation_config.json").write_text('{"eos_token_id": [258, 10]}')
    config = tiny.config(models, **{"teacher.path": str(teacher)})
    said = refusal(config)
    assert "[258] in student.path, at [10, 258] in teacher.path" in said and "rollout.end_ids" in said
    config.rollout.end_ids = (10, 258)
    assert job.prepare(config).student.eos_ids == (10, 258)


def test_a_micro_batch_that_the_mesh_cannot_cut_is_refused(models):
    message = refusal(tiny.config(models, **{"rollout.batch": 24, "train.micro_batch": 12}))
    assert "train.micro_batch=12" in message
    assert "multiple of 8" in message


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sft"])
@pytest.mark.parametrize("key", ["reward.weight", "objective.advantage_clip"])
def test_what_acts_on_advantages_is_refused_for_an_objective_that_has_none(models, name, key):
    message = refusal(tiny.config(models, **{key: 0.5, "objective.name": name}))
    assert f"{key}=0.5 has no effect on objective.name={name}" in message
    assert "policy_gradient" in message


def test_weights_and_biases_that_are_missing_are_refused_before_weights_load(models, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is missing" in refusal(tiny.config(models, **{"metrics.wandb": "p"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


WRONG_FILES = {
    "def get_config(:\n": "SyntaxError",
    "x = 1\n": "has no get_config()",
    "def get_config():\n    return nothing\n": "NameError",
    "import no_such_module\n": "ModuleNotFoundError",
}


@pytest.mark.parametrize("text", WRONG_FILES, ids=WRONG_FILES.get)
def test_a_config_file_that_python_cannot_run_is_told_with_its_line(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(WRONG_FILES[text])) as caught:
        config.load(str(tmp_path / "c.py"))
    assert "\n" not in str(caught.value) and str(tmp_path / "c.py") in str(caught.value)


@pytest.mark.parametrize("read", [run_config, lambda workdir: export.export(workdir, workdir / "out")])
@pytest.mark.parametrize("content", ["{", "[]", '{"seed": "x"}'])
def test_a_damaged_config_of_a_run_is_a_mistake_for_every_reader(tmp_path, read, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_fields_that_older_versions_had_are_left_out_of_a_runs_config_and_named(tmp_path, caplog):
    stored = config.default().to_dict() | {"seed": 7, "no_section": {"a": 1}}
    stored["rollout"] = {"batch": 24, "cache_stages": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with caplog.at_level("WARNING"):
        read = run_config(tmp_path)
    assert (read.seed, read.rollout.batch) == (7, 24)
    assert read.rollout.halvings == config.default().rollout.halvings
    assert "rollout.cache_stages=4 is no field" in caplog.text and "no_section=" in caplog.text


def test_a_micro_batch_of_zero_is_the_whole_batch(models):
    settings = config.validate(tiny.config(models))
    assert settings.train.micro_batch == 8


def test_a_model_of_another_architecture_is_refused(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    message = refusal(tiny.config(models, **{"student.path": str(tmp_path)}))
    assert "student.path" in message
    assert "'gpt2'" in message
    assert "llama" in message


def test_a_teacher_with_another_tokenizer_is_refused(models, tmp_path):
    for file in (models / "teacher").iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            vocab = json.loads(text)
            table = vocab["model"]["vocab"]
            table["a"], table["b"] = table["b"], table["a"]
            text = json.dumps(vocab).encode()
        (tmp_path / file.name).write_bytes(text)
    message = refusal(tiny.config(models, **{"teacher.path": str(tmp_path)}))
    assert "teacher.path" in message
    assert "do not share a tokenizer" in message


def test_a_workdir_below_a_file_is_refused(models, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(tiny.config(models), tmp_path / "file" / "run")
    assert f"--workdir={tmp_path / 'file' / 'run'}" in message
    assert "another folder" in message


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that even root cannot write to")
def test_a_workdir_that_is_read_only_is_refused(models):
    message = refusal(tiny.config(models), Path("/sys/kernel/run"))
    assert "--workdir=/sys/kernel/run cannot be written" in message
    assert "another folder" in message


def test_a_workdir_with_a_run_of_another_config_is_refused(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(models).to_dict()))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    other = tiny.config(models, **{"optimizer.learning_rate": 0.5, "train.micro_batch": 8})
    message = refusal(other, tmp_path)
    assert "another --workdir" in message
    assert "0.5" in message


def test_more_steps_are_no_other_config(models, tmp_path):
    first = config.validate(tiny.config(models))
    (tmp_path / "config.json").write_text(json.dumps(first.to_dict()))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    job.prepare(tiny.config(models, **{"train.steps": 9}), tmp_path)


def test_a_config_read_back_from_json_is_the_same_job(models):
    settings = tiny.config(models, **{"student.drop_layers": (0,)})
    first = job.prepare(settings)
    again = job.prepare(ConfigDict(json.loads(json.dumps(settings.to_dict()))))
    assert again.student == first.student
    assert again.student.layers == 1


def test_every_recipe_has_the_fields_of_the_default():
    recipes = sorted((ROOT / "configs").rglob("[a-z]*.py"))
    fields = {path: config.load(str(path)).to_dict() for path in recipes}
    default = config.default().to_dict()
    assert fields
    for path, recipe in fields.items():
        assert recipe.keys() == default.keys(), path
        for section in ("release", "objective", "reward", "train", "optimizer", "data", "rollout"):
            assert recipe[section].keys() == default[section].keys(), path


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([DEMO, "--config.release.rul=none"], "did you mean release.rule?); see docs/configs.md"),
        ([DEMO, "--config.release.rule=papr"], "did you mean paper?"),
        (["--config=configs/dem.py"], "configs/dem.py: no such file"),
        (["--config=configs/ablations/rule.py:configs/none.py"], "--config=configs/none.py: no such file or"),
        ([DEMO, "--config.rollout.batch[0]=1"], "does not support integer indexing"),
        ([DEMO, "--config.student.drop_layers[0]=1"], "is not a valid index"),
        ([], "--config is not set"),
        ([DEMO, "--workdir="], "--workdir is not set"),
    ],
)
def test_the_command_line_ends_in_one_line_and_status_2(tmp_path, arguments, said):
    workdir = tmp_path / "run"
    done = tiny.entry("opd_jax.train", f"--workdir={workdir}", *arguments)
    assert done.returncode == 2, done.stderr
    line, end = done.stderr.split("\n")
    assert (line.startswith("error: "), end) == (True, "")
    assert said in line
    assert done.stdout == ""
    assert not workdir.exists()
