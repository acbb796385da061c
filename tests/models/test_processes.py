"""Reading and writing model folders from two processes, as on a pod of two hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

# Each process holds half of every cut parameter, reads only that, and both save together.
PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

port, process, source, out = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(process))

from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.models.files import hf, weights

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
config = hf.read_config(source)
rules = {"embed": "fsdp"}
shardings = jax.tree.map(
    lambda names: NamedSharding(mesh, PartitionSpec(*map(rules.get, names))),
    transformer.logical_axes(config),
    is_leaf=lambda x: isinstance(x, tuple),
)
_, params = hf.load(source, shardings=shardings)
assert not params["embedding"].is_fully_addressable

# A disk that fills up, and a tokenizer that cannot be written, in process 0 alone.
class Broken:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")

write = hf.safetensors_out.write
def full(*args):
    raise OSError(28, "No space left on device")

for tokenizer, writer in ((Broken(), write), (None, full)):
    hf.safetensors_out.write = writer
    try:
        hf.save(out, config, params, tokenizer)
    except OSError as error:
        print("failed", error.strerror)
    except UserError as error:
        print("failed", error)
hf.safetensors_out.write = write
hf.save(out, config, params)

read = []
def count(name, index):
    shape = {t.name: t.shape for t in weights.tensors(config, "hf")}[name]
    read.append(np.zeros(shape, np.float32)[index].size)
    return np.zeros(shape, np.float32)[index]

weights.read_tree(config, "hf", count, dtype=np.float32, shardings=shardings)
print("share read", sum(read) / config.parameter_count())
"""


def test_two_processes_read_their_own_parts_fail_together_and_save_one_folder(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = (str(GOLDEN / "tiny_qwen3"), str(tmp_path / "out"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(process), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for number, process in enumerate(processes):
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            failed = [line for line in out.splitlines() if line.startswith("failed")]
            said = "No space left" if number == 0 else "the process that failed says why"
            assert [said in line for line in failed] == [True, True], out
            # Norms of a head are whole on both; everything else is halved.
            assert 0.5 <= float(out.split()[-1]) < 0.51
    finally:
        for process in processes:
            process.kill()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    original = {}
    for file in GOLDEN.glob("tiny_qwen3/*.safetensors"):
        original |= load_file(file)
    assert saved.keys() == original.keys()
    assert all((saved[name] == original[name]).all() for name in original)
