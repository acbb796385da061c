"""Model folders: round trips, both config spellings, sharded reads, one clear line a defect."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.models.files import hf, source, weights

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny single-file model, to damage."""
    return shutil.copytree(GOLDEN / "tiny_llama", tmp_path / "model")


@pytest.fixture
def sharded_folder(tmp_path):
    """A copy of a tiny model in four files."""
    return shutil.copytree(GOLDEN / "tiny_qwen3", tmp_path / "model")


def raw_config(name="tiny_llama"):
    return json.loads((GOLDEN / name / "config.json").read_text())


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def all_tensors(folder):
    """Every tensor of a folder, by safetensors itself."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def refused(call, *words):
    """The call raises a UserError of one line that holds every word."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@TINY
def test_load_save_load_gives_the_same_bits(name, tmp_path):
    config, params = hf.load(GOLDEN / name)
    hf.save(tmp_path / "out", config, params)
    again_config, again = hf.load(tmp_path / "out")
    assert again_config == config
    assert_same(params, again)


@TINY
def test_saved_tensors_are_the_ones_transformers_wrote(name, tmp_path):
    hf.save(tmp_path / "out", *hf.load(GOLDEN / name))
    want, got = all_tensors(GOLDEN / name), all_tensors(tmp_path / "out")
    assert want.keys() == got.keys()
    assert_same(want, got)


@TINY
def test_transformers_reads_the_saved_config_as_the_original(name, tmp_path):
    hf.save(tmp_path / "out", *hf.load(GOLDEN / name))
    want = transformers.AutoConfig.from_pretrained(GOLDEN / name).to_dict()
    got = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    # Ours always names the head size; bos and pad are not the model's; end ids become a list.
    loose = {"_name_or_path", "head_dim", "bos_token_id", "pad_token_id", "eos_token_id"}
    loose |= {"rope_theta", "transformers_version", "rope_parameters", "intermediate_size"}
    want["max_position_embeddings"] = hf.read_config(GOLDEN / name).max_positions  # with YaRN, all of them
    assert {k: v for k, v in want.items() if k not in loose} == {
        k: v for k, v in got.items() if k not in loose
    }
    # Rotary settings: the same, those of YaRN spelt out.
    assert want["rope_parameters"].items() <= got["rope_parameters"].items()
    if "moe_intermediate_size" not in want:  # where unused by blocks of experts alone
        assert want["intermediate_size"] == got["intermediate_size"]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert tuple(generation.eos_token_id) == hf.read_config(GOLDEN / name).eos_ids


def test_a_model_past_the_shard_size_is_saved_in_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 30_000)
    config, params = hf.load(GOLDEN / "tiny_llama")
    hf.save(tmp_path / "out", config, params)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 30_000 + 4096 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    want = all_tensors(GOLDEN / "tiny_llama")
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    assert_same(params, hf.load(tmp_path / "out")[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_files_load_into_either_precision(dtype, tmp_path):
    config, params = hf.load(GOLDEN / "tiny_qwen2")
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    hf.save(tmp_path / "out", config, params, dtype=dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype.dtype.name
    assert_same(hf.load(tmp_path / "out", dtype=dtype)[1], rounded)
    widened = hf.load(tmp_path / "out")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {jnp.dtype(jnp.float32)}
    assert_same(widened, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded))


def shardings_on_eight_devices(config, *, inside_heads):
    """A 2x4 layout that cuts every kind of axis somewhere."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    rules = {"embed": "fsdp", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}

    def sharding(names):
        spec = [rules.get(name) for name in names]
        if inside_heads and "kv_heads" in names:
            spec[names.index("head_size")] = "tensor"
        return NamedSharding(mesh, PartitionSpec(*spec))

    axes = transformer.logical_axes(config)
    return jax.tree.map(sharding, axes, is_leaf=lambda x: isinstance(x, tuple))


def test_sharded_loading_places_the_same_values_as_asked():
    config, params = hf.load(GOLDEN / "tiny_qwen3")
    shardings = shardings_on_eight_devices(config, inside_heads=True)
    _, sharded = source.load(GOLDEN / "tiny_qwen3", shardings=shardings)
    assert_same(params, sharded)
    jax.tree.map(lambda leaf, want: leaf.sharding == want or pytest.fail(), sharded, shardings)


def test_a_mesh_without_shardings_replicates():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    _, params = hf.load(GOLDEN / "tiny_llama", mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))


def test_a_process_reads_each_stored_value_at_most_once():
    config = hf.read_config(GOLDEN / "tiny_qwen3")
    # Cut along whole heads only: a cut inside a head reads the head once a part.
    shardings = shardings_on_eight_devices(config, inside_heads=False)
    tensors, read = all_tensors(GOLDEN / "tiny_qwen3"), []

    def count(name, index):
        part = tensors[name][index]
        read.append(part.size)
        return part

    weights.read_tree(config, "hf", count, dtype=jnp.float32, shardings=shardings)
    assert sum(read) == config.parameter_count()
    assert len(read) > len(tensors)


@pytest.mark.parametrize(("axes", "ways"), [(None, 1), ("fsdp", 2), (("fsdp", "tensor"), 6)])
@pytest.mark.parametrize("stored", ["float", "int8"])
def test_experts_are_read_one_a_device_at_a_time(axes, ways, stored, monkeypatch):
    name = "tiny_moe"
    config, whole = hf.load(GOLDEN / name, stored=stored)
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("fsdp", "tensor"))
    logical = transformer.logical_axes(config)
    rules = {"experts": axes}
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*map(rules.get, names))),
        logical,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    pieces, place = [], weights._place
    monkeypatch.setattr(weights, "_place", lambda reader, *a: pieces.append(reader) or place(reader, *a))
    _, params = hf.load(GOLDEN / name, shardings=shardings, stored=stored)
    assert_same(params, whole)
    read = [piece.like.shape for piece in pieces if "experts" in piece.axes]
    assert {shape[0] for shape in read} == {ways}
    assert len(read) == 3 * config.layers * config.experts // ways


def test_sharded_parameters_are_saved_like_whole_ones(tmp_path):
    config, params = hf.load(GOLDEN / "tiny_qwen3")
    shardings = shardings_on_eight_devices(config, inside_heads=True)
    hf.save(tmp_path / "out", config, jax.device_put(params, shardings))
    assert_same(all_tensors(tmp_path / "out"), all_tensors(GOLDEN / "tiny_qwen3"))


def test_end_ids_are_the_union_of_both_configs(folder):
    edit_json(folder / "config.json", eos_token_id=2)
    edit_json(folder / "generation_config.json", eos_token_id=[7, 5])
    assert hf.read_config(folder).eos_ids == (2, 5, 7)


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer.json": {
                "model": {"vocab": {"a": 0, "b": 90}},
                "added_tokens": [{"id": 99, "content": "<e>"}],
            }
        },
        {
            "vocab.json": {"a": 0, "b": 90},
            "tokenizer_config.json": {"added_tokens_decoder": {"99": {"content": "<e>"}}},
        },
    ],
)
def test_ids_past_the_tokenizers_last_one_are_not_valid(files, folder):
    assert hf.read_config(folder).valid_vocab == 128
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert hf.read_config(folder).valid_vocab == 100


def test_a_tokenizer_longer_than_the_embedding_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 128}}}')
    refused(lambda: hf.load(folder), "student.path", "129", "128")


def test_a_copy_of_the_tied_head_and_rotary_constants_are_ignored(folder):
    want = hf.load(folder)[1]

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_weights(folder, add)
    assert_same(hf.load(folder)[1], want)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["has no tensor", "model.norm.weight"]),
        (
            lambda t: t.update({"model.layers.0.extra": np.ones(1, np.float32)}),
            ["does not have", "model.layers.0.extra"],
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
            ["model.norm.weight", "(7,)", "(36,)"],
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(36, np.int8)}),
            ["model.norm.weight", "I8"],
        ),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(edit, words, folder):
    edit_weights(folder, edit)
    refused(lambda: hf.load(folder, key="teacher.path"), "teacher.path", str(folder), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.*.mlp.up_proj.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_its_name(folder, name, said, value):
    def damage(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    edit_weights(folder, damage)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    for options in ({}, {"stored": "int8"}, {"mesh": mesh}):
        refused(lambda options=options: hf.load(folder, **options), said, "not finite")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": 7}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "x"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0.5}}}'),
        ("tokenizer.json", '{"added_tokens": [7]}'),
        ("tokenizer.json", '{"added_tokens": [{"content": "a"}]}'),
        ("tokenizer.json", '{"added_tokens": 7}'),
        ("vocab.json", '{"a": {"id": 1}}'),
        ("config.json", '{"x":' * 100_000),
    ],
)
def test_a_file_of_another_form_is_named_in_one_line(folder, file, text):
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / file).write_text(text)
    refused(lambda: hf.read_config(folder, "teacher.path"), "teacher.path", file, "copy it again")


def test_an_index_whose_file_name_is_too_long_is_refused(sharded_folder):
    edit_json(sharded_folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "x" * 5000})
    refused(lambda: hf.load(sharded_folder), "lacks xxx", "complete download")


def test_more_blocks_than_there_are_tensors_are_refused_at_once(folder):
    edit_json(folder / "config.json", num_hidden_layers=2**31 - 1)
    refused(lambda: hf.load(folder), "tensors, fewer than the 2147483647", "complete llama model")


def test_a_truncated_weight_file_is_refused(folder):
    file = folder / "model.safetensors"
    for length in (file.stat().st_size - 1, 100, 0):
        file.write_bytes((GOLDEN / "tiny_llama/model.safetensors").read_bytes()[:length])
        refused(lambda: hf.load(folder), "model.safetensors", "copy it again")


def test_an_index_that_points_outside_the_folder_is_refused(sharded_folder):
    index = sharded_folder / "model.safetensors.index.json"
    for outside in ("../other.safetensors", "/other.safetensors", "sub/other.safetensors"):
        edit_json(index, weight_map={"model.norm.weight": outside})
        refused(lambda: hf.load(sharded_folder), "outside the folder", outside)


def test_a_missing_weight_file_is_named(sharded_folder):
    (sharded_folder / "model-00002-of-00004.safetensors").unlink()
    refused(lambda: hf.load(sharded_folder), "model-00002-of-00004.safetensors")


def test_a_tensor_in_two_files_is_refused(sharded_folder):
    first, second = (sharded_folder / f"model-0000{n}-of-00004.safetensors" for n in (1, 2))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    refused(lambda: hf.load(sharded_folder), name, first.name, second.name)


@pytest.mark.parametrize("there", ["model-00002-of-00004.safetensors", None])
def test_a_tensor_in_another_file_than_the_index_says_is_refused(sharded_folder, there):
    index = sharded_folder / "model.safetensors.index.json"
    first = sharded_folder / "model-00001-of-00004.safetensors"
    name = next(iter(load_file(first)))
    weight_map = json.loads(index.read_text())["weight_map"]
    changed = {k: v for k, v in (weight_map | {name: there}).items() if v}
    edit_json(index, weight_map=changed)
    refused(lambda: hf.load(sharded_folder), name, first.name, str(there))


def test_end_ids_of_a_generation_config_are_ids_of_the_vocabulary(folder):
    for value in ("2", [128], -1):
        edit_json(folder / "generation_config.json", eos_token_id=value)
        refused(lambda: hf.read_config(folder), "generation_config.json", repr(value))


def test_an_index_without_entries_is_refused(sharded_folder):
    edit_json(sharded_folder / "model.safetensors.index.json", weight_map={})
    refused(lambda: hf.load(sharded_folder), "weight_map")


def test_weights_in_another_form_are_named_with_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    for name, remedy in (
        ("pytorch_model.bin", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("model.gguf", "path of the .gguf"),
    ):
        (folder / name).write_bytes(b"x")
        refused(lambda: hf.load(folder), name, remedy)
        (folder / name).unlink()


def test_new_weights_beside_an_old_index_are_refused(sharded_folder):
    save_file({}, sharded_folder / "model.safetensors")
    refused(lambda: hf.load(sharded_folder), "model.safetensors and an index", "that are old")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_the_prefix_that_a_wrapper_leaves_is_named(folder, prefix):
    file = folder / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    refused(lambda: hf.load(folder), repr(prefix), "save the model itself")


def test_a_tied_model_with_another_head_is_refused_and_with_a_copy_is_read(tmp_path):
    folder = tmp_path / "tied"
    config, params = hf.load(GOLDEN / "tiny_llama")
    tied = {name: value for name, value in params.items() if name != "head"}
    hf.save(folder, config.replace(tie_embeddings=True), tied)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.copy()}, file)
    assert hf.load(folder)[0].tie_embeddings
    other = embedding.copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, file)
    refused(lambda: hf.load(folder), "tie_word_embeddings", "lm_head.weight is another matrix")


def test_a_folder_that_is_not_a_model_is_refused_in_one_line(tmp_path, folder):
    refused(lambda: hf.load(tmp_path / "nowhere"), "student.path", "nowhere")
    refused(lambda: hf.load(tmp_path), "student.path", "config.json")
    (folder / "model.safetensors").unlink()
    refused(lambda: hf.load(folder), "model.safetensors")
    for text in ("{", "[]", "\udc80".encode("utf-8", "surrogateescape").decode("latin1")):
        (folder / "config.json").write_text(text)
        refused(lambda: hf.load(folder), "config.json", "copy it again")


def test_saving_refuses_a_folder_that_holds_something(folder):
    config, params = hf.load(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused(lambda: hf.save(folder, config, params), str(folder), "not an empty folder")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    config, params = hf.load(GOLDEN / "tiny_llama")
    with pytest.raises(RuntimeError, match="disk full"):
        hf.save(tmp_path / "out", config, params, Broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_is_written_into_its_parameter_without_a_copy_of_it(dtype):
    _, put = weights._programs(None, ())
    whole, block = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((12, 64, 32), (64, 32)))
    used = put.lower(whole, block, 0, 0).compile().memory_analysis()
    assert used.alias_size_in_bytes == used.output_size_in_bytes
    assert used.temp_size_in_bytes <= math.prod(block.shape) * whole.dtype.itemsize
