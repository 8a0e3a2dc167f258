# The two commands of the README. Each does all its own set-up, once.
PYTHON ?= python3
ARGS ?= --overwrite
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PORT ?= 8000
BIN := $(VENV)/bin

.PHONY: run test lint suite test-oldest test-newest audit bench lab docs docs-serve notebooks readme clean

run: $(VENV)/.run  ## fine-tune the built-in model on the built-in data
	$(BIN)/lorabook run $(ARGS)

test: lint suite  ## everything that CI checks; what takes longer: .venv/bin/pytest --slow tests

lint: $(VENV)/.dev  ## style, type hints, security
	@echo "== lint"; $(BIN)/ruff check . && $(BIN)/ruff format --check nbs tests docs tools benchmarks
	@echo "== type hints"; $(BIN)/mypy
	@echo "== security"; $(BIN)/bandit -q -c pyproject.toml -r lorabook tools

suite: $(VENV)/.dev  ## all chapters and tests
	@echo "== chapters"; OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --skip_file_re '^[_.]|^02_guided_run'  # tests/test_guided_run.py runs it in a browser
	@echo "== tests"; $(BIN)/python tools/browser.py || true
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 tests

test-oldest: build/oldest.txt  ## the suite with the oldest libraries that settings.ini admits; best with PYTHON=python3.10
	$(MAKE) suite VENV=.venv-oldest CONSTRAINTS=build/oldest.txt

test-newest: build/newest.txt  ## the same with the newest; best with PYTHON=python3.13
	$(MAKE) suite VENV=.venv-newest CONSTRAINTS=build/newest.txt

audit: $(VENV)/.dev  ## known holes in the installed libraries; asks a service for them
	$(BIN)/python -m pip install --quiet --no-compile pip-audit
	$(BIN)/pip-audit --desc --skip-editable

bench: $(VENV)/.bench  ## set up what the benchmarks compare with; benchmarks/LOG.md says how to run each

lab: $(VENV)/.dev  ## JupyterLab on the guides
	$(BIN)/jupyter lab nbs/guides/01_quickstart.ipynb

docs: $(VENV)/.dev  ## the docs site, into _docs
	$(BIN)/python docs/build.py

docs-serve: _docs/index.html  ## the same at http://localhost:8000, built anew if something has changed
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

_docs/index.html: $(VENV)/.dev $(shell find nbs docs lorabook -type f -not -path '*/.*' -not -path '*/outputs/*' -not -name '*.pyc') CHANGELOG.md benchmarks/LOG.md
	$(BIN)/python docs/build.py

notebooks: $(VENV)/.dev  ## run all notebooks and save their outputs; or some: make notebooks NB=nbs/80_run.ipynb
	$(BIN)/python tools/run_notebooks.py $(NB)

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/make_readme.py

clean:
	rm -rf .venv .venv-oldest .venv-newest _docs _proc outputs build dist *.egg-info

$(VENV)/.run: settings.ini setup.py $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== setting up $(VENV) (once; the libraries are about 2 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run tests/colab_requirements.txt
	@echo "== adding the development tools to $(VENV) (once)"
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/colab -r tests/colab_requirements.txt
	@touch $@

build/oldest.txt: tools/versions.py settings.ini constraints.txt
	@mkdir -p build
	$(PYTHON) tools/versions.py > $@

build/newest.txt: settings.ini
	@mkdir -p build
	@echo "# nothing: pip takes the newest" > $@

$(VENV)/.bench: $(VENV)/.dev benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r benchmarks/requirements.txt
	@touch $@
