# Daily commands. Everything is made in $(VENV) and build/. `make clean` removes what was built; $(VENV) can be deleted.
#
#   VENV     virtual environment to make and use
#   TORCH    version of torch to install in it
#   PYTHON   interpreter to make it from
#   ARGS     further arguments for the demo, for the streams of corpora, for the benchmarks, or for pytest
#   WHEEL    wheel of peer to install and test, instead of one that is built here
#   WORKERS  processes that run the Python tests
#
# The environment variables of setup.py apply too; its first lines list them.

ifneq ($(words $(CURDIR)),1)
  $(error Make cannot work in $(CURDIR), whose path has a space)
endif

VENV ?= .venv
TORCH ?= 2.15.*
PYTHON ?= python3
ARGS ?=
WHEEL ?=
WORKERS ?= 2
# Sanitizers for `make test-cpp`: address,undefined or thread; for `make test-cuda`: memcheck, racecheck, initcheck or synccheck.
SANITIZE ?=

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# Tests and demos use only what is installed in the environment.
unexport PYTHONPATH

torch := $(VENV)/.made-torch-$(subst *,x,$(TORCH))
# The CUDA kernels take minutes to compile. Without a GPU they are compiled only if PEER_CUDA says so.
ifeq ($(PEER_CUDA)$(FORCE_CUDA),)
  ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),)
    PEER_CUDA := 0
  endif
endif
export PEER_CUDA
package := $(VENV)/.made-package$(if $(WHEEL),-of-$(notdir $(WHEEL)),$(if $(PEER_CUDA),-cuda$(PEER_CUDA)))
# The package is made like a release: a source distribution, unpacked, and a wheel that is built from it. The build directory stays, so that
# only changed files are compiled again.
packaging := $(abspath build)/package-$(notdir $(abspath $(VENV)))
build_tools := $(VENV)/.made-build-tools
test_tools := $(VENV)/.made-test-tools
lint_tools := $(VENV)/.made-lint-tools
demo_tools := $(VENV)/.made-demo-tools
bench_tools := $(VENV)/.made-bench-tools
model_tools := $(VENV)/.made-model-tools

sources := $(shell find csrc cmake build_backend peer -path peer/include -prune -o -path peer/lib -prune -o -path peer/share -prune -o -type f \
             \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.in' -o -name '*.cmake' -o -name '*.py' -o -name py.typed \) -print)
cpp_files = $(shell find csrc tests examples -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.hpp' -o -name '*.cuh')
python_files := peer tests examples build_backend setup.py $(wildcard benchmarks)

.PHONY: help demo lifelong bench test test-long test-short test-cpp test-python test-hostile test-install test-cuda test-cuda-installed test-emulated rehearse kernel-budget build lint format clean catch2 compiler
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo          train a small language model with a PEER layer beside its dense twin"
	@echo "make lifelong      train language models on a stream of corpora, by several methods; hours"
	@echo "make test          C++ and Python tests without the sweeps"
	@echo "make test-long     all tests but test-install and those that need a GPU"
	@echo "make test-install  installation by pip, in clean environments"
	@echo "make test-hostile  hostile files and ids, under sanitizers"
	@echo "make test-cuda     the tests that need a GPU, after a build with CUDA"
	@echo "make test-emulated the tests of the operators, with the CUDA operators on an emulated device"
	@echo "make rehearse      the GPU script on an emulated device"
	@echo "make kernel-budget compare registers, spills and sizes of the CUDA kernels with the committed table"
	@echo "make bench         measure the layer beside the layers that it replaces"
	@echo "make build         compile in place, so that 'import peer' works from the checkout"
	@echo "make lint          ruff, mypy and clang-format, changing nothing"
	@echo "make format        ruff and clang-format, changing files"
	@echo "make clean         remove what was built"
	@echo
	@echo "Variables: VENV=$(VENV) TORCH=$(TORCH) PYTHON=$(PYTHON) ARGS= WHEEL="

# Started in examples/, where the package's source tree does not hide the installed package.
demo: $(package) $(demo_tools)
	cd examples && $(BIN)/python -m language_model --out "$(CURDIR)/demo-output" $(ARGS)

lifelong: $(package) $(demo_tools)
	cd examples && $(BIN)/python -m lifelong lifelong/methods.txt --out "$(CURDIR)/lifelong-output" \
	  --csv "$(CURDIR)/lifelong-output/rows.csv" $(ARGS)

# Started in benchmarks/, which has peer_bench but not the package's source tree.
bench: $(package) $(bench_tools)
	cd benchmarks && $(BIN)/python -m peer_bench --preset targets --csv "$(CURDIR)/benchmark-rows.csv" $(ARGS)

test: test-cpp test-short
test-long: test-cpp test-python test-hostile test-emulated

test_build := build/tests$(if $(SANITIZE),-$(shell echo '$(SANITIZE)' | tr ',' '-'))
test-cpp: $(test_tools) compiler catch2
	cmake -S . -B $(test_build) -G Ninja -DPEER_BUILD_LIBRARY=OFF -DPEER_BUILD_TESTS=ON -DPEER_SANITIZE=$(SANITIZE)
	cmake --build $(test_build)
	ctest --test-dir $(test_build) --output-on-failure --no-tests=error --parallel 2

# The readers of files read hostile files, with a library under AddressSanitizer and UndefinedBehaviorSanitizer. The sanitized C++ tests have the
# same kernels, so both share a build directory. Python is not instrumented: its leaks are not reported, libstdc++ is preloaded so that the
# sanitizer finds the functions that throw, and signals reach the tests.
sanitized := build/tests-address-undefined
test-hostile: $(torch) $(test_tools) compiler catch2
	cmake -S . -B $(sanitized) -G Ninja -DPEER_BUILD_LIBRARY=ON -DPEER_BUILD_TESTS=ON -DPEER_SANITIZE=address,undefined -DPEER_PYTHON=$(BIN)/python
	cmake --build $(sanitized) --target peer
	rm -rf $(sanitized)/site && mkdir $(sanitized)/site && cp -r peer $(sanitized)/site/peer
	cmake --install $(sanitized) --prefix $(sanitized)/site/peer
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0:handle_segv=0 PYTHONPATH=$(abspath $(sanitized))/site \
	  CXXFLAGS="-fsanitize=address,undefined -fno-sanitize=vptr" $(BIN)/pytest $(ARGS) \
	  tests/python/test_hostile_files.py tests/python/test_cpp.py::test_program_tests_pass

# The pytest program, not `python -m pytest`, which would put this directory, with the package's source tree, on the path. Tests of one file
# share fixtures, such as compiled programs, so a file stays with one worker.
test-short: private selection := -m "not long"
test-python test-short: $(package) $(test_tools) $(demo_tools) $(bench_tools) $(model_tools) catch2
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile $(selection) $(ARGS)

# The tests make environments of their own, which share only torch with this one. PEER_OTHER_TORCH names the site-packages directory of an
# environment with another minor version of torch, for the test of the error message.
test-install: $(if $(WHEEL),$(torch) $(build_tools),$(package)) $(test_tools)
	PEER_WHEEL="$(if $(WHEEL),$(abspath $(WHEEL)),$$(echo $(packaging)/*.whl))" PEER_PACKAGING="$(if $(WHEEL),,$(packaging))" \
	  $(BIN)/pytest --confcutdir tests/installation tests/installation $(ARGS)

# Requires a GPU and nvcc; the other targets do not.
test-cuda:
	@nvidia-smi -L || { echo "There is no GPU here that could run the CUDA tests: nvidia-smi -L lists none" >&2; exit 1; }
	$(MAKE) PEER_CUDA=1 test-cuda-installed

# Without Torch's caching allocator, compute-sanitizer sees where every tensor ends.
test-cuda-installed: $(package) $(test_tools)
ifeq ($(SANITIZE),)
	$(BIN)/pytest tests/cuda $(ARGS)
else
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(SANITIZE) --error-exitcode 1 $(BIN)/python $(BIN)/pytest tests/cuda/test_agreement.py $(ARGS)
endif

# Runs the script for a machine with a GPU on an emulated device, at tiny sizes.
rehearse: $(torch) $(test_tools) $(bench_tools) compiler
	rm -rf build/rehearsal
	PEER_REHEARSE=1 benchmarks/gpu.sh build/rehearsal build agree tests scale bench profile counters sanitize compiled; \
	  status=$$?; cat build/rehearsal/log.txt; exit $$status

# The tests of the operators, with the CUDA operators in place of the CPU's. Tests of intended differences are left out: a bad index ends a CUDA
# kernel, k is at most 64, and only CPU kernels have capabilities and threads.
emulated_tests := $(addprefix tests/python/test_,expert_mlp.py product_key_topk.py disabled_experts.py frozen_rows.py optim.py fused_update.py fused_operators.py opcheck.py autograd.py)
test-emulated: rehearse
	PEER_EMULATE_EVERYTHING=1 PYTHONPATH=$(abspath build/emulated/site):$(abspath tests/emulated_cuda) \
	  $(BIN)/pytest -n 2 -p emulated_cuda $(emulated_tests) $(ARGS)

# Needs nvcc and nvdisasm, which CUDA's folder or the triton package has, and no GPU. ARGS=--write renews the table.
kernel-budget: | $(BIN)/python
	$(BIN)/python benchmarks/gpu/kernel_budget.py $(ARGS)

build: $(torch) $(test_tools) compiler
	$(BIN)/python setup.py build_ext --inplace

lint: $(torch) $(lint_tools)
	ruff check $(python_files)
	ruff format --check $(python_files)
	mypy
	clang-format --dry-run -Werror $(cpp_files)

format: $(lint_tools)
	ruff check --fix $(python_files)
	ruff format $(python_files)
	clang-format -i $(cpp_files)

clean:
	rm -rf build peer/lib peer/include peer/share peer/_build_info.json torch_peer.egg-info
	rm -f $(VENV)/.made-package*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

# A package that was built for one torch does not work with another.
$(torch): | $(BIN)/python
	rm -f $(VENV)/.made-torch-* $(VENV)/.made-package*
	$(BIN)/python -m pip install 'torch==$(TORCH)'
	touch $@

ifeq ($(WHEEL),)
$(package): $(torch) $(build_tools) $(sources) CMakeLists.txt MANIFEST.in setup.py pyproject.toml | compiler
	rm -f $(VENV)/.made-package*
	mkdir -p $(packaging)/source
	find $(packaging) -maxdepth 1 -type f -delete
	find $(packaging)/source -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	$(BIN)/python -m build --sdist --outdir $(packaging) .
	tar -xzf $(packaging)/torch_peer-*.tar.gz -C $(packaging)/source --strip-components=1
	$(BIN)/python -m pip wheel --no-deps --wheel-dir $(packaging) $(packaging)/source
	$(BIN)/python -m pip install --force-reinstall --no-deps $(packaging)/torch_peer-*.whl
	touch $@
else
$(package): $(torch) $(WHEEL)
	rm -f $(VENV)/.made-package*
	$(BIN)/python -m pip install --force-reinstall --no-deps $(WHEEL)
	touch $@
endif

$(build_tools): | $(BIN)/python
	$(BIN)/python -m pip install --quiet build
	touch $@

$(test_tools): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(lint_tools): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

$(demo_tools): examples/language_model/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

# Their requirements include torch, which must not be replaced, so torch comes first.
$(bench_tools): pyproject.toml $(torch)
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

$(model_tools): pyproject.toml $(torch)
	$(BIN)/python -m pip install --quiet --group models
	touch $@

compiler:
	@command -v $(CXX) >/dev/null || { \
	  echo "peer needs a C++20 compiler, such as g++ 11 or newer; on Debian and Ubuntu: sudo apt-get install g++" >&2; exit 1; }

# Checks that the compiler finds Catch2. On Debian and Ubuntu, root installs the package; others get the command.
catch2:
	@echo '#include "tests/kernels/catch.hpp"' | $(CXX) -std=c++20 -I. -x c++ -fsyntax-only - 2>/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq catch2; \
	else \
	  echo "The C++ tests need Catch2, version 2 or 3; on Debian and Ubuntu: sudo apt-get install catch2" >&2; exit 1; \
	fi
