"""A rule in a file of the user's own: its fields, its checks, and a whole run by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax import config
from opd_jax.config import fields, plugins, recipes
from opd_jax.declare import PARAMETERS, Field, parameters
from opd_jax.distill import objectives
from opd_jax.errors import UserError
from opd_jax.release import rules
from opd_jax.run.restore import run_config
from opd_jax.sweep import arms
from tests import tiny

ROOT = Path(__file__).parents[2]
RULE = """
import jax.numpy as jnp

from opd_jax.declare import Field
from opd_jax.release import propose, rule


@rule("first_part", first_share=Field(0.5, "Share of each response that is supervised.", least=0, most=1))
def first_part(scores, segments, config, step, key):
    place_BT = jnp.cumsum(segments.mask_BT, axis=1)
    return propose((place_BT <= config.first_share * place_BT[:, -1:]).astype(jnp.float32), segments)
"""
OBJECTIVE = """
from opd_jax.declare import Field
from opd_jax.distill import objective
from opd_jax.distill.objectives import sft


@objective("scaled", loss_scale=Field(2.0, "Factor of the loss.", least=0))
def scaled(tokens, options):
    return options.loss_scale * sft(tokens, options)
"""


@pytest.fixture(autouse=True)
def registries():
    """Each test starts and ends with the rules and objectives of the package alone."""
    tables = rules.RULES, objectives.OBJECTIVES, PARAMETERS, plugins._LOADED
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)


@pytest.fixture
def rule_file(tmp_path):
    file = tmp_path / "my_rule.py"
    file.write_text(RULE)
    return str(file)


def command(module, *arguments, cwd):
    return tiny.entry(module, *arguments, cwd=cwd, env={"PYTHONPATH": str(ROOT)})


# ---- Declarations.


def test_building_the_default_config_imports_no_model_run_or_evaluation():
    code = """
import sys
from opd_jax import config
config.default()
heavy = ("transformers", "tokenizers", "optax", "orbax")
rooms = ("models", "evaluation", "run", "data", "preflight")
print([name for name in sys.modules if name.split(".")[0] in heavy
       or name.startswith(tuple(f"opd_jax.{room}" for room in rooms))])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_declaring_a_field_imports_no_jax():
    code = "import sys, opd_jax.declare, opd_jax.config.sections.method; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_allowed_words_are_looked_up_when_they_are_asked_for():
    field = Field("a", "Text.", allowed=lambda: words)
    words = ("a", "bcd")
    field.check("x.y", "bcd")
    with pytest.raises(UserError, match=r"x.y=bce is not known \(did you mean bcd\?\); use one of a, bcd"):
        field.check("x.y", "bce")


def test_a_range_may_be_open_above_or_below():
    Field(1, "Text.", least=1).check("n", 10**9)
    Field(1, "Text.", most=1).check("n", -(10**9))
    with pytest.raises(UserError, match=r"n=0 is out of range; it must be at least 1"):
        Field(1, "Text.", least=1).check("n", 0)
    with pytest.raises(UserError, match=r"n=2 is out of range; it must be at most 1"):
        Field(1, "Text.", most=1).check("n", 2)


def test_two_rules_cannot_declare_the_same_field():
    parameters("release", "mine", {"mine_share": Field(0.5, "Text.")})
    parameters("release", "mine", {"mine_share": Field(0.6, "Text.")})  # the same rule, imported again
    with pytest.raises(ValueError, match=r"release.mine_share of yours is a field of mine too; rename"):
        parameters("release", "yours", {"mine_share": Field(0.5, "Text.")})
    parameters("objective", "yours", {"mine_share": Field(0.5, "Text.")})


def test_a_rule_cannot_declare_a_field_of_every_run():
    rules.rule("mine", rescale=Field("all", "Text."))(lambda *_: None)
    with pytest.raises(UserError, match=r"release.rescale of mine is a field of every run; rename mine's"):
        config.default()


def test_rules_of_the_package_declare_what_they_alone_read():
    declared = {f"release.{name}" for (s, _), own in PARAMETERS.items() if s == "release" for name in own}
    shared = {key for key in fields.FIELDS if key.startswith("release.")}
    stops = ("stop", "stop_block", "stop_gain", "stop_after", "stop_cache_dtype", "stop_audit")
    assert shared == {f"release.{name}" for name in ("rule", "min_segments", "rescale", *stops)}
    assert len(declared) == 15 and fields.reader("release.iw_gamma") == ("release", "iw_opd")
    assert fields.reader("objective.beta") == ("objective", "jsd")
    assert fields.reader("objective.top_k") is None


# ---- Files of the user's own.


def test_a_rule_of_a_file_has_its_field_default_and_range(models, rule_file):
    c = config.default(plugins=(rule_file,))
    assert c.release.first_share == 0.5 and c.plugins == (rule_file,)
    c.student.path = c.teacher.path = "x"
    c.release.rule = "first_part"
    config.validate(c)
    c.release.first_share = 1.5
    with pytest.raises(UserError, match=r"release.first_share=1.5 is out of range; .* between 0 and 1"):
        config.validate(c)


def test_configs_without_the_file_know_nothing_of_its_rule(rule_file):
    config.default(plugins=(rule_file,))
    c = config.default()
    assert "first_share" not in c.release and c.plugins == ()
    c.student.path = c.teacher.path = "x"
    c.release.rule = "first_part"
    with pytest.raises(UserError, match=r"release.rule=first_part is of a file that `plugins` does not name"):
        config.validate(c)


def test_a_config_that_names_the_file_too_late_is_told_where_to_name_it(rule_file):
    c = config.default()
    c.plugins = (rule_file,)
    with pytest.raises(UserError, match=r"release.first_share is not set; start from .*default\(plugins="):
        config.validate(c)


def test_an_objective_of_a_file_reads_its_field(tmp_path):
    (tmp_path / "my_objective.py").write_text(OBJECTIVE)
    c = config.default(plugins=str(tmp_path / "my_objective.py"))
    assert objectives.options(c).loss_scale == 2.0 and objectives.options(c).beta == 0.5
    assert objectives.Options(beta=0.1).loss_scale == 2.0
    with pytest.raises(AttributeError, match="objective.loss_scal is no field"):
        _ = objectives.options(c).loss_scal


def test_a_file_is_imported_again_only_where_it_changed_or_lost_its_rule(tmp_path, rule_file):
    config.default(plugins=(rule_file,))
    first = rules.RULES["first_part"]
    config.default(plugins=(rule_file,))
    assert rules.RULES["first_part"] is first
    (tmp_path / "other.py").write_text(RULE.replace("0.5", "0.25"))
    assert config.default(plugins=(str(tmp_path / "other.py"),)).release.first_share == 0.25
    assert config.default(plugins=(rule_file,)).release.first_share == 0.5
    Path(rule_file).write_text(RULE.replace("0.5", "0.75"))
    os.utime(rule_file, (1, 1))
    assert config.default(plugins=(rule_file,)).release.first_share == 0.75


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no such file in "),
        ("def (", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
        (RULE.replace('"first_part"', '"paper"'), "release.rule=paper is a rule of opd_jax"),
        (OBJECTIVE.replace('"scaled"', '"sft"'), "objective.name=sft is an objective of opd_jax"),
        (RULE.replace("first_share=", "iw_gamma="), "release.iw_gamma of first_part is a field of iw_opd"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(tmp_path, text, said):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        config.default(plugins=(str(file),))
    message = str(caught.value)
    assert message.startswith(f"plugins={file}") and said in message and "\n" not in message


def test_a_recipe_is_read_with_a_rule_that_it_does_not_name(rule_file):
    c = config.load("demo", plugins=(rule_file,))
    assert c.plugins == (rule_file,) and c.release.first_share == 0.5 and c.train.steps == 24
    assert recipes.PLUGINS == []


def test_arms_of_an_ablation_set_a_field_of_the_users_rule(tmp_path, rule_file):
    (tmp_path / "ablation.py").write_text(f"""
from opd_jax.config import load
SEEDS = (0,)
def get_config():
    return load("demo", plugins=({rule_file!r},))
def arms(config):
    return {{"a": {{"release.rule": "first_part", "release.first_share": 0.25}}}}
""")
    path = str(tmp_path / "ablation.py")
    [planned] = arms.plan(path, config.load(path), tmp_path / "out")
    assert planned.config.release.first_share == 0.25 and planned.config.plugins == (rule_file,)


def test_the_config_of_a_run_imports_its_files_again(models, rule_file, tmp_path):
    c = config.default(plugins=(rule_file,))
    c.release.first_share = 0.125
    (tmp_path / "config.json").write_text(json.dumps(c.to_dict()))
    del rules.RULES["first_part"], PARAMETERS["release", "first_part"]
    again = run_config(tmp_path)
    assert again.release.first_share == 0.125 and "first_part" in rules.RULES
    Path(rule_file).unlink()
    with pytest.raises(UserError, match=r"^plugins=.*my_rule.py: no such file"):
        run_config(tmp_path)


# ---- A whole run.


def test_a_run_by_a_rule_of_ones_own_trains_resumes_is_evaluated_reported_and_swept(models, tmp_path):
    """The rule stands in the recipe itself; the command line names a second file."""
    changes = {"train.steps": 1, "eval.every": 1, "checkpoint.every": 1}
    changes |= {"rollout.batch": 4, "data.heldout": 4}
    settings = tiny.config(models, **changes).to_dict()
    del settings["plugins"]
    (tmp_path / "recipe.py").write_text(f"""{RULE}

from opd_jax import config

SEEDS = (0,)


def arms(config):
    return {{"mine": {{}}}}


def get_config():
    c = config.default(plugins=(__file__,))
    c.update({settings!r})
    c.release.rule = "first_part"
    return c
""")
    second = RULE.replace("first_part", "second").replace("first_share", "second_share")
    (tmp_path / "second.py").write_text(second)
    words = ["--config=recipe.py", "--config.release.rule=second", "--config.plugins=second.py"]
    words += ["--config.release.second_share=0.34"]
    workdir = tmp_path / "out" / "mine" / "seed-0"
    for steps in (1, 2):
        done = command(
            "opd_jax.train", *words, f"--config.train.steps={steps}", f"--workdir={workdir}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    kept = json.loads((workdir / "config.json").read_text())
    assert [Path(file).name for file in kept["plugins"]] == ["second.py", "recipe.py"]
    assert kept["release"]["second_share"] == 0.34 and kept["release"]["first_share"] == 0.5
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2]
    assert all(0 < line["kept_share"] <= 0.34 for line in train)

    evaluated = command("opd_jax.evaluate", f"--workdir={workdir}", cwd=tmp_path)
    assert evaluated.returncode == 0 and "kl" in evaluated.stdout, evaluated.stderr
    reported = command("opd_jax.report", f"--workdir={workdir}", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    words_of_table = [*words, "--config.train.steps=2", f"--out={tmp_path / 'out'}", "--table"]
    table = command("opd_jax.sweep", *words_of_table, cwd=tmp_path)
    assert table.returncode == 0 and "mine" in table.stdout, table.stderr
    refused = command("opd_jax.train", *words[:2], f"--workdir={workdir}", cwd=tmp_path)
    assert refused.returncode == 2 and "release.rule=second is not known" in refused.stderr
