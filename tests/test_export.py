"""A run's student leaves as a Hugging Face folder that loads back bit for bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import transformers

from opd_jax.errors import UserError
from opd_jax.export import export
from opd_jax.models import tokenizers, transformer
from opd_jax.models.files import hf
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.job import prepare
from tests import tiny


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A workdir of a pruned student with checkpoints of steps 2 (the best) and 4, and their states."""
    workdir = tmp_path_factory.mktemp("run")
    job = prepare(tiny.config(models, **{"student.drop_layers": (1,)}))
    (workdir / "config.json").write_text(json.dumps(job.config.to_dict()))
    start = job.start()
    states = {}
    with Checkpoints(workdir, 2) as checkpoints:
        for step, kl in ((2, 0.1), (4, 0.2)):
            moved = jax.tree.map(lambda x, step=step: x + step / 7, start.params)
            states[step] = dataclasses.replace(start, params=moved)
            checkpoints.save(step, states[step], {"step": step}, kl)
    return workdir, states


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(("wanted", "step"), [("latest", 4), ("best", 2), ("2", 2)])
def test_the_exported_student_loads_back_bit_for_bit(run, tmp_path, wanted, step):
    workdir, states = run
    assert export(workdir, tmp_path / "out", wanted)[0] == step
    config, params = hf.load(tmp_path / "out")
    assert_same(params, states[step].params)
    assert config == tiny.STUDENT.replace(layers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_exported_tokenizer_is_the_students(run, tmp_path):
    export(run[0], tmp_path / "out", dtype="bfloat16")
    ours = tokenizers.load(tmp_path / "out")
    tokenizers.check_pair(ours, tiny.tokenizer())
    assert hf.read_generation(tmp_path / "out")["eos_token_id"] == [tiny.END]


def test_half_precision_is_the_rounded_checkpoint(run, tmp_path):
    workdir, states = run
    export(workdir, tmp_path / "out", dtype="bfloat16")
    _, params = hf.load(tmp_path / "out", dtype="bfloat16")
    assert_same(params, jax.tree.map(lambda x: x.astype("bfloat16"), states[4].params))


@pytest.mark.parametrize("prefix", ["", "random:"])
def test_how_the_student_is_meant_to_be_sampled_is_kept(models, run, tmp_path, prefix):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(run[0] / "checkpoints")
    settings = json.loads((run[0] / "config.json").read_text())
    settings["student"]["path"] = f"{prefix}{models / 'student'}"
    (workdir / "config.json").write_text(json.dumps(settings))
    file = models / "student" / "generation_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({"temperature": 0.6, "bos_token_id": 257, "_from_model_config": True}))
        export(workdir, tmp_path / "out")
    finally:
        file.write_text(before)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {
        "temperature": 0.6,
        "bos_token_id": 257,
        "eos_token_id": [tiny.END],
        "pad_token_id": tiny.PAD,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 257


def test_transformers_runs_the_exported_student_with_the_same_logits(run, tmp_path):
    """Gated: needs torch."""
    torch = pytest.importorskip("torch")
    export(run[0], tmp_path / "out")
    config, params = hf.load(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens_BL = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
    with torch.no_grad():
        want_BLV = theirs(torch.tensor(tokens_BL, dtype=torch.int64)).logits.numpy()
    hidden_BLD = transformer.forward(config, params, tokens_BL, np.ones((2, 9), bool))
    logits_BLV = transformer.logits(config, transformer.head(config, params), hidden_BLD)
    valid = config.valid_vocab
    np.testing.assert_allclose(logits_BLV[..., :valid], want_BLV[..., :valid], atol=2e-4, rtol=0)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode(tokens_BL[0])
    assert text == tiny.tokenizer().decode(tokens_BL[0])


def refusal(*args) -> str:
    with pytest.raises(UserError) as error:
        export(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_end_in_one_line_and_write_nothing(models, run, tmp_path):
    workdir, out = run[0], tmp_path / "out"
    assert "no run" in refusal(tmp_path, out)
    assert "--step=3" in (message := refusal(workdir, out, "3")) and "2, 4" in message
    assert "--step=first" in refusal(workdir, out, "first")
    assert "float32, bfloat16" in refusal(workdir, out, "best", "int8")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert str(taken) in refusal(workdir, taken)
    assert "cannot be written" in refusal(workdir, taken / "file" / "out")
    assert [path.name for path in taken.iterdir()] == ["file"]
    assert not out.exists()


def test_a_run_without_checkpoints_is_refused_and_left_as_it_is(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(run[0] / "config.json", workdir)
    assert "no checkpoint" in refusal(workdir, tmp_path / "out")
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_student_folder_that_holds_another_model_by_now_is_refused(models, run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(run[0] / "checkpoints")
    settings = json.loads((run[0] / "config.json").read_text())
    settings["student"]["path"] = str(models / "teacher")
    (workdir / "config.json").write_text(json.dumps(settings))
    message = refusal(workdir, tmp_path / "out")
    assert "another model" in message and "student.path" in message


def test_the_command_line_needs_a_folder_to_write(run):
    done = tiny.entry("opd_jax.export", f"--workdir={run[0]}")
    assert (done.returncode, done.stderr) == (2, "error: --out is not set\n")
