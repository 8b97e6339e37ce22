# `make bench` and `make test` set up their own virtual environment; `make gpu` uses the python3 at hand.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What has been set up: what `make bench` needs, and on top of it, in the same environment, what development needs.
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
# One process for each core, each with one thread: the tests' tensors are too small for more, which would mostly wait for each other.
TEST_JOBS ?= auto
TEST_THREADS ?= 1
# Files in their order: those of most tests first, which is usual, leaves for the end the few whose single tests compile for a minute.
PYTEST = OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

CXX_SOURCES = $(shell git ls-files '*.cpp' '*.cu' '*.h' '*.cuh')

.PHONY: help setup test test-slow test-long fuzz same bench serving example experiments figures gpu gpu-carry lint format aot kernels loops headers wheel clean

help:
	@echo "make bench   numerical check, training on real images, block times: table, plot, result file (sets itself up)"
	@echo "make serving evaluation beside ONNX Runtime, OpenVINO and torch.compile, in about two hours; when cut off, the same goes on"
	@echo "make test    the tests (sets itself up)"
	@echo "make test-slow   those of many seconds, which CI runs too"
	@echo "make test-long   repetitions on more data, which CI does not run: before a release; ARGS=tests/test_FILE.py after touching what is tested"
	@echo "make fuzz    random cases of every primitive and of blocks: ARGS=\"--minutes 10 --seed 1\" says how long and which"
	@echo "make same    this checkout against another, bit for bit: ARGS=<other checkout>"
	@echo "make example examples/train.py, a script to copy: trains a fused ResNet-18 on real images; ARGS='--help' for all it can"
	@echo "make experiments  the experiments of examples/ that explain residual blocks, in minutes, and docs/experiments.md anew"
	@echo "make figures the tables, sentences and plots of README.md and docs/ from the committed result files"
	@echo "make lint    ruff, clang-format and zizmor, as CI runs them; make format applies the first two"
	@echo "make aot     compile every Triton kernel variant for sm_80 to sm_120, no GPU needed"
	@echo "make kernels  the same, and docs/kernels.csv and docs/kernels.md anew; ARGS='--only conv_fprop --arch 90' for a part of them"
	@echo "make loops   what the kernels' inner loops issue, counted in machine code, into docs/loops.csv; ARGS='--arch 90'"
	@echo "make headers  compile csrc/ against the headers of every torch that is supported, which it downloads (several GB)"
	@echo "make wheel   build the sdist, the wheel from it, check both, and run a block in a fresh environment"
	@echo "make gpu-carry  compile here what a GPU's machine need not: the library and the kernels of its timings; then copy the folder there"
	@echo "make gpu     on a machine with an NVIDIA GPU, without network: proof in minutes; ARGS='--minutes 9', then again"

setup: $(READY)

# A development environment compiles the CUDA kernels for the GPUs at hand only, or for one architecture where there is none.
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' -)
$(RUNS) wheel: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),$(GPUS),9.0)

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(RUNS): pyproject.toml setup.py constraints.txt $(CXX_SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"needs Python 3.11 or later, got {v[0]}.{v[1]}: set PYTHON" if v < (3, 11) else 0)'
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): once, a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@echo "  torch: the largest download"
	@$(PIP) torch
	@echo "  fused_res: compiles its kernels, C++ and where nvcc is CUDA; rich, matplotlib and scikit-learn for the benchmark"
	@$(PIP) --editable ".[bench]"
	@$(BIN)/fused-res info
	@touch $@

# The package is there: only what the extra names is installed.
$(READY): $(RUNS)
	@echo "Setting up what tests and checks need besides: pytest, torchvision, timm, ruff, ... (the extra dev)"
	@$(PIP) "fused-res[dev]"
	@touch $@

test: $(READY)
	$(PYTEST) $(ARGS)

bench: $(RUNS)
	$(BIN)/fused-res bench --time-budget 75 $(ARGS)

# Both layouts of eager: by what these differ a network's output is judged.
EAGER = 'eager NCHW' 'eager channels_last'
SERVERS = $(EAGER) 'torch.compile freezing' 'ONNX Runtime' OpenVINO fused_res 'fused_res compiled freezing'
SERVING = $(BIN)/python -m fused_res bench --resume --keep-memory --output benchmarks/results/serving

serving: $(RUNS)
	@$(BIN)/python -c 'import onnxruntime, openvino' || $(PIP) --editable ".[bench,peers]"
	$(SERVING) --suite serving --mode eval --dtype fp32 --batch 1 8 --time-budget 900 --peers $(SERVERS) $(ARGS)
	$(SERVING) --suite serving --mode eval --dtype bf16 --batch 1 8 --time-budget 900 --peers $(SERVERS) $(ARGS)
	$(SERVING) --suite served --mode train --dtype fp32 --batch 8 --time-budget 300 --peers $(EAGER) torch.compile fused_res 'fused_res compiled' $(ARGS)

example: $(READY)
	$(BIN)/python examples/train.py --model fused_res:resnet18 --output build/example $(ARGS)

EXPERIMENTS = degradation gradient_flow identity_start

experiments: $(RUNS)
	for name in $(EXPERIMENTS); do $(BIN)/python examples/$$name.py --output docs/experiments/$$name.png $(ARGS) || exit 1; done
	$(BIN)/python -m fused_res.benchmarks.readme docs/experiments.md

figures: $(RUNS)
	$(BIN)/python -m fused_res.benchmarks.readme README.md docs/*.md

gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

gpu-carry: $(READY)
	TORCH_CUDA_ARCH_LIST=$(or $(TORCH_CUDA_ARCH_LIST),9.0) $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m fused_res.benchmarks.carry $(ARGS)

test-slow: $(READY)
	$(PYTEST) --dist worksteal -m 'slow and not long' $(ARGS)

test-long: $(READY)
	$(PYTEST) --dist worksteal -m long --timeout 1800 $(ARGS)

fuzz: $(READY)
	PYTHONPATH=tests OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m fuzz $(ARGS)

same: $(READY)
	$(BIN)/python .ci/same.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/zizmor --quiet --offline --strict-collection .github

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

aot: $(READY)
	$(BIN)/python -m fused_res.aot $(ARGS)

kernels: $(READY)
	$(BIN)/python -m fused_res.aot --update docs/kernels.md $(ARGS)

loops: $(READY)
	$(BIN)/python -m fused_res.benchmarks.loops --update docs/loops.csv $(ARGS)

headers: $(READY)
	$(BIN)/python .ci/check_headers.py $(ARGS)

wheel: $(READY)
	rm -rf dist build/wheel
	$(BIN)/python -m build --quiet --sdist .
	FUSED_RES_BUILD="$(abspath build/native)" PATH="$(abspath $(BIN)):$$PATH" .ci/wheel dist/*.tar.gz
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	build/wheel/bin/python -m pip install --quiet --no-compile --constraint constraints.txt dist/*.whl
	cd build/wheel && bin/python $(CURDIR)/.ci/check_wheel.py

clean:
	rm -rf $(VENV) build dist *.egg-info
