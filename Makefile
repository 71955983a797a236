# make demo       run the whole pipeline on the bundled model, and print the command that opens the explorer
# make demo-all   the same with all main architectures, compared in one table
# make test       run the tests that must pass before a change is merged
# make test-slow  run the slow tests
# make check      check the style, the types and the links of the documentation
# make docs       build the documentation as a site in site/
# make torture    the reliability campaign, an hour; MINUTES=5 for less
# make lock       write the lock files in requirements/ anew (--upgrade: make lock UPDATE=--upgrade)
# make licenses   list the installed packages with their licenses, and as a software bill of materials
# make peers      install the libraries that saebench is compared with in .venv-peers; run the tests against them
# make format     format the code
# Each target first creates .venv, which needs only python3 (3.11 or newer) with venv and pip.

PYTHON ?= python3
OUT ?= demo
VENV = .venv
INSTALLED = $(VENV)/.installed
PEERS = .venv-peers
TOOLS = .venv-tools
MINUTES ?= 60
UPDATE ?=
PEERS_INSTALLED = $(PEERS)/.installed
CODE = saebench app data kernels tests docs requirements
DOCS = $(ONE_THREAD) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
# Every file is checked against the lock file's hashes; pip resolves nothing.
LOCKED = $(VENV)/bin/python -m pip install --require-hashes --no-deps --no-build-isolation
LICENSES = MIT;Apache;BSD;ISC;MPL-2.0;Mozilla Public License 2.0;PSF-2.0;Python Software Foundation;NVIDIA;CNRI-Python;zlib;CC0
# Tests work on small arrays, where several threads are slower than one.
ONE_THREAD = OMP_NUM_THREADS=1

.PHONY: demo demo-all test test-slow torture peers check docs format lock licenses
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	$(VENV)/bin/saebench demo --out $(OUT)

demo-all: OUT = demo-all
demo-all: $(INSTALLED)
	$(VENV)/bin/saebench demo --all --out $(OUT)

test: $(INSTALLED)
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -q -n auto --dist worksteal

test-slow: $(INSTALLED)
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -q -m slow

torture: $(INSTALLED)
	$(ONE_THREAD) $(VENV)/bin/python -m tests.torture --minutes $(MINUTES)

peers: $(INSTALLED) $(PEERS_INSTALLED)
	$(VENV)/bin/python -m pytest -q -s -m peers

check: $(INSTALLED)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(DOCS) --site-dir $(VENV)/site

docs: $(INSTALLED)
	$(DOCS)
	@echo "Open site/index.html. For the search, serve the site: $(VENV)/bin/python -m http.server -d site"

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

lock: $(TOOLS)/.installed
	$(TOOLS)/bin/python requirements/update.py $(UPDATE)

# Fails on a license outside the list, until somebody has read it.
licenses: $(INSTALLED) $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment $(VENV)/bin/python --pyproject pyproject.toml --of JSON -o sbom.json
	$(TOOLS)/bin/pip-licenses --python=$(VENV)/bin/python --format=markdown --with-urls --output-file licenses.md \
	  --partial-match --allow-only '$(LICENSES)'

$(INSTALLED): pyproject.toml $(wildcard requirements/*.txt) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "saebench needs Python 3.11 or newer as $(PYTHON); name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) -r requirements/build.txt
	$(LOCKED) -r requirements/lock.txt
	if $(VENV)/bin/python requirements/cuda_build.py; then $(LOCKED) -r requirements/cuda.txt; fi
	$(VENV)/bin/python -m pip install --no-deps --no-build-isolation -e .
	$(VENV)/bin/python -m pip check
	touch $@

$(TOOLS)/.installed: requirements/tools.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -r requirements/tools.txt
	touch $@

$(PEERS_INSTALLED): constraints-peers.txt | $(INSTALLED)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints-peers.txt torch sae-lens eai-sparsify
	$(PEERS)/bin/python -m pip install --no-deps -c constraints-peers.txt circuit-tracer
	touch $@
