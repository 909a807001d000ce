# `make demo` and `make test` need nothing but a Debian with Python 3.11 or newer: each installs the
# system packages that are missing (as root; otherwise it prints the command) and fills .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

# The first interpreter that is new enough; `make PYTHON=/path/to/python3 dev` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)

# More for pytest, such as ARGS='-k prune -x', or for the benchmark, such as ARGS=--quick.
ARGS ?=
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

# A .venv whose interpreter went away, or that was moved here with its folder, is made again.
VENV_LIVES = $(BIN)/python -c '' 2>/dev/null && [ "$$(cat $(STAMP) 2>/dev/null)" = '$(CURDIR)' ]
VENV_STATE := $(shell $(VENV_LIVES) && echo lives)
ifneq ($(VENV_STATE),lives)
.PHONY: $(STAMP)
endif

.PHONY: help
help: ## what there is to make (this list)
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) \
		| while IFS=$$'\t' read -r name text; do printf '  make %-9s  %s\n' "$$name" "$$text"; done

$(STAMP): requirements.txt requirements-dev.txt setup.cfg pyproject.toml
	@if [ -z '$(PYTHON)' ]; then echo 'casfs needs Python 3.11 or newer, and none was found' >&2; exit 1; fi
	@tools/system-packages --python '$(PYTHON)' build
	@echo 'Filling $(VENV) with the pinned dependencies and casfs (only when these change)'
	@$(VENV_LIVES) || '$(PYTHON)' -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	@$(BIN)/python -m pip check
	@echo '$(CURDIR)' > $@

.PHONY: dev
dev: $(STAMP) ## .venv with everything, and casfs itself: then run .venv/bin/casfs
	@echo '$(BIN)/casfs is ready'

.PHONY: lint
lint: $(STAMP) ## formatting and rules (ruff)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.PHONY: typecheck
typecheck: $(STAMP) ## mypy --strict
	$(BIN)/mypy

.PHONY: check
check: lint typecheck ## lint, types and the fast tests, in under two minutes
	$(PYTEST) -m 'not slow and not fuse' tests/unit tests/property tests/golden $(ARGS)

.PHONY: test
test: packages-test lint typecheck ## everything, with real mounts: what CI runs
	$(PYTEST) tests $(ARGS)

.PHONY: test-e2e
test-e2e: packages-test $(STAMP) ## only the tests of the installed command, of mounts and of damage
	$(PYTEST) tests/e2e tests/fault $(ARGS)

.PHONY: test-elsewhere
test-elsewhere: packages-test $(STAMP) ## the end-to-end tests with the repository on SeaweedFS and behind sshd
	CASFS_PLACES='s3 sftp' $(PYTEST) tests/e2e $(ARGS)

# Atheris has wheels for x86-64 only, and no other target needs it.
FUZZ_STAMP := $(VENV)/.fuzz-made
$(FUZZ_STAMP): $(STAMP) requirements-fuzz.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-fuzz.txt
	@touch $@

# How much longer than in `make test` the tests go on that could go on forever.
EFFORT ?= 20

# How many inputs the parsers get in `make soak`, all together; a run that was stopped goes on where it was.
FUZZ_INPUTS ?= 10000000

.PHONY: fuzz
fuzz: $(FUZZ_STAMP) ## FUZZ_INPUTS hostile inputs for the parsers, by coverage; ARGS names some of them
	$(BIN)/python -m tests.fuzz --inputs '$(FUZZ_INPUTS)' $(ARGS)

.PHONY: soak
soak: packages-test $(STAMP) $(FUZZ_STAMP) ## kills, power cuts, crowds, models, mounts and hostile input, EFFORT times as long
	CASFS_EFFORT='$(EFFORT)' CASFS_HYPOTHESIS=long $(PYTEST) tests/property tests/fault/test_random_kills.py \
		tests/fault/test_many_processes.py tests/fault/test_power_loss.py tests/fault/test_io_errors.py \
		tests/fault/test_explorer.py tests/fault/test_race_matrix.py tests/fault/test_race_mutants.py \
		tests/fault/test_many_hosts.py \
		tests/fault/test_mount_loop.py tests/fault/test_network.py $(ARGS)
	CASFS_PLACES='s3 sftp' $(PYTEST) tests/e2e $(ARGS)
	$(BIN)/python -m tests.fuzz --inputs '$(FUZZ_INPUTS)'

.PHONY: coverage
coverage: packages-test $(STAMP) ## all tests, and which lines they reach (htmlcov/index.html)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadgroup tests $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

.PHONY: demo
demo: packages-demo $(STAMP) ## back up, change, back up, mount, copy out and compare a real tree
	@PATH='$(CURDIR)/$(BIN)':"$$PATH" tools/demo

.PHONY: bench
bench: $(STAMP) ## time and memory on a real tree, beside borg and restic
	# As an installation does: otherwise each start compiles what git has changed.
	$(BIN)/python -m compileall -q casfs mount/casfs_mount
	$(BIN)/python -m bench setup
	$(BIN)/python -m bench $(ARGS)

.PHONY: bench-remote
bench-remote: $(STAMP) ## the same over a distance, beside restic: SeaweedFS behind lines of 0 to 100 ms
	$(BIN)/python -m bench setup
	$(BIN)/python -m bench.remote $(ARGS)

.PHONY: bench-scale
bench-scale: $(STAMP) ## how costs grow from one to ten million blobs in an object storage (SeaweedFS); an hour
	$(BIN)/python -m bench.remote.scale $(ARGS)

# What builds the documentation, the Debian package, and checks the distributions.
DOCS_STAMP := $(VENV)/.docs-made
$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-docs.txt
	@touch $@

.PHONY: docs
docs: $(DOCS_STAMP) ## the documentation site and the man pages in build/docs; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs build/docs/html
	$(BIN)/python -m sphinx -q -W --keep-going -E -b man docs build/docs/man
	@echo 'build/docs/html/index.html is ready'

.PHONY: linkcheck
linkcheck: $(DOCS_STAMP) ## follow the external links of the documentation (needs the network; no part of CI)
	$(BIN)/python -m sphinx -q -E -b linkcheck docs build/docs/links

.PHONY: dist
dist: $(DOCS_STAMP) ## an sdist and a wheel in dist/, checked
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

.PHONY: deb
deb: $(DOCS_STAMP) ## a Debian package for this distribution in dist/
	@tools/build-deb

.PHONY: test-deb
test-deb: deb ## try the package in a new Debian, of this suite and of the newest (debootstrap, root)
	@tools/test-deb

.PHONY: clean
clean: ## remove what was built and cached here; .venv and repositories stay
	rm -rf build dist htmlcov casfs.egg-info .coverage .coverage.* \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find casfs mount tests bench -xdev -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: packages-demo packages-test
packages-demo packages-test: packages-%:
	@tools/system-packages --python '$(PYTHON)' $(if $(VENV_STATE),,build) $*
