# make demo       run the whole pipeline on the bundled model, and print the command that opens the explorer
# make demo-all   the same with all main architectures, compared in one table
# make test       run the tests that must pass before a change is merged
# make test-slow  run the slow tests
# make check      check the style, the types and the links of the documentation
# make docs       build the documentation as a site in site/
# make peers      install the libraries that saebench is compared with in .venv-peers; run the tests against them
# make format     format the code
# Each target first creates .venv, which needs only python3 (3.11 or newer) with venv and pip.

PYTHON ?= python3
EXTRAS ?= dev
OUT ?= demo
VENV = .venv
INSTALLED = $(VENV)/.installed
PEERS = .venv-peers
PEERS_INSTALLED = $(PEERS)/.installed
CODE = saebench app data kernels tests docs
DOCS = $(ONE_THREAD) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
# Tests work on small arrays, where several threads are slower than one.
ONE_THREAD = OMP_NUM_THREADS=1

.PHONY: demo demo-all test test-slow peers check docs format
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

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "saebench needs Python 3.11 or newer as $(PYTHON); name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(PEERS_INSTALLED): constraints-peers.txt | $(INSTALLED)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints-peers.txt torch sae-lens eai-sparsify
	$(PEERS)/bin/python -m pip install --no-deps -c constraints-peers.txt circuit-tracer
	touch $@
