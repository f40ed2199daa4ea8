# `make demo` and `make test` set everything up by themselves; python3 and make are all they expect.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
OUT    ?= demo
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs export readme outputs clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready ## a virtual environment with everything in it

$(VENV)/.ready: pyproject.toml settings.ini setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[dev]'
	@touch $@

demo: setup ## train, evaluate and ask a recommender: DATA=a ratings file or folder, else a synthetic set
	$(BIN)/cfext fit $(DATA) --out $(OUT)
	$(BIN)/cfext evaluate $(OUT)
	$(BIN)/cfext recommend $(OUT)
	$(BIN)/cfext similar $(OUT)

test: setup ## run every notebook, then tests/
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(JOBS) --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --durations 10 tests

docs: setup ## the site, into _docs/, from the notebooks as recorded; a dead link fails
	$(BIN)/python docs/build.py

export: setup ## notebooks -> modules
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: setup ## nbs/index.ipynb -> README.md
	$(BIN)/python docs/readme.py

outputs: setup ## run the notebooks and keep their outputs
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 nbs/*.ipynb nbs/pages/*.ipynb nbs/tutorials/*.ipynb
	$(BIN)/nbdev-clean

clean: ## remove what `setup` and `demo` made
	rm -rf $(VENV) $(OUT) _proc _docs build *.egg-info
