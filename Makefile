# The two commands of the README. Each does all its own set-up, once.
PYTHON ?= python3
ARGS ?= --overwrite
BIN := .venv/bin

.PHONY: run test audit bench lab docs notebooks readme clean

run: .venv/.run  ## fine-tune the built-in model on the built-in data
	$(BIN)/lorabook run $(ARGS)

test: .venv/.dev  ## everything that CI checks; what takes longer: .venv/bin/pytest --slow tests
	@echo "== lint"; $(BIN)/ruff check . && $(BIN)/ruff format --check nbs tests docs tools benchmarks
	@echo "== type hints"; $(BIN)/mypy
	@echo "== security"; $(BIN)/bandit -q -c pyproject.toml -r lorabook tools
	@echo "== chapters"; OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --skip_file_re '^[_.]|^02_guided_run'  # tests/test_guided_run.py runs it in a browser
	@echo "== tests"; $(BIN)/python tools/browser.py || true
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 tests

audit: .venv/.dev  ## known holes in the installed libraries; asks a service for them
	$(BIN)/python -m pip install --quiet --no-compile pip-audit
	$(BIN)/pip-audit --desc --skip-editable

bench: .venv/.bench  ## set up what the benchmarks compare with; benchmarks/LOG.md says how to run each

lab: .venv/.dev  ## JupyterLab on the guides
	$(BIN)/jupyter lab nbs/guides/01_quickstart.ipynb

docs: .venv/.dev  ## the docs site, into _docs
	$(BIN)/python docs/build.py

notebooks: .venv/.dev  ## run all notebooks and save their outputs; or some: make notebooks NB=nbs/80_run.ipynb
	$(BIN)/python tools/run_notebooks.py $(NB)

readme: .venv/.dev  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/make_readme.py

clean:
	rm -rf .venv _docs _proc outputs build dist *.egg-info

.venv/.run: settings.ini setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== setting up .venv (once; the libraries are about 2 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.run tests/colab_requirements.txt
	@echo "== adding the development tools to .venv (once)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/colab -r tests/colab_requirements.txt
	@touch $@

.venv/.bench: .venv/.dev benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r benchmarks/requirements.txt
	@touch $@
