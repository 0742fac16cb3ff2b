PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-compiled test-wheel lint docs bench fidelity

demo: $(INSTALLED)
	$(BIN)/twinserve demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The tests of what is compiled, against a wheel of it; `make test` runs all tests against the source.
test-compiled: $(INSTALLED)
	rm -rf build/compiled
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/compiled .
	$(BIN)/python -m pip install --quiet --no-deps --target build/compiled/site build/compiled/*.whl
	PYTHONPATH=$(CURDIR)/build/compiled/site $(BIN)/python -P -c "from twinserve.policies import IS_COMPILED; assert IS_COMPILED"
	PYTHONPATH=$(CURDIR)/build/compiled/site $(BIN)/pytest tests/policies tests/equivalence tests/sim tests/traces tests/test_block_manager.py tests/test_prefix_cache.py tests/test_continuous_batching.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the docs, into build/site; fails at a link that leads nowhere.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The README as who has only the wheel walks it: in an environment of its own, without torch.
test-wheel: $(INSTALLED)
	rm -rf build/wheel
	TWINSERVE_PURE=1 $(BIN)/python -m build --no-isolation --outdir build/wheel . >/dev/null
	$(PYTHON) -m venv build/wheel/empty
	build/wheel/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls build/wheel/*.whl)" pytest hypothesis pandas pyarrow
	build/wheel/empty/bin/python -P -c "import twinserve; assert twinserve.__file__.startswith('$(CURDIR)/build/wheel')"
	build/wheel/empty/bin/pytest tests/test_readme.py tests/test_examples.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run_all.py --out benchmarks/results; status=$$?; $(BIN)/python benchmarks/render.py && exit $$status

# Every number of docs/fidelity.md again, from the records that ship; fails where one is another.
fidelity: $(INSTALLED)
	$(BIN)/python benchmarks/fidelity.py page --check

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	TWINSERVE_PURE=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[engine,test,dev,docs]"
	touch $@
