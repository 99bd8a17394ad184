# Everything runs in one virtual environment, .venv, which make creates and fills by itself.
# `demo` installs only what the command line needs; `test` adds torch, the optional clients and the tools.
# An install runs again only when pyproject.toml or the pinned versions change.

PYTHON ?= python3
ARGS ?= --tokens 2000 --blocks 8 --block-tokens 128 --hidden 3584 --dtype bfloat16
WORKERS ?= 2
# For tests that wait for other processes most of the time.
MORE_WORKERS ?= $(shell expr $(WORKERS) + 1)
SCENES ?= --quick
FUZZ_SECONDS ?= 6
MINUTES ?= 5
ENDPOINT_TESTS ?= $(addprefix tests/,test_endpoint.py test_handles.py test_dump.py test_shm_rooms.py test_security.py \
	test_small_rooms.py test_driver.py test_window.py mover faults security)
SOAK = --seeds 1000000 --minutes $(MINUTES) --jobs $(WORKERS)

BIN := .venv/bin
PINS := tests/constraints.txt
PIP := $(BIN)/python -m pip -q --disable-pip-version-check --no-input install -c $(PINS)
TEST_EXTRAS := test,dev,torch,redis,etcd,metrics

# pyright: the node that was installed with it, and no word about newer releases.
export PYRIGHT_PYTHON_GLOBAL_NODE := 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# Installs must not run at the same time; `test` says what may.
ifndef APART
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:
.PHONY: help demo test isolated check coverage explore soak fuzz chaos bench mooncake faults-mooncake clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 17

demo: .venv/.stamp-demo ## run the demo; other sizes with: make demo ARGS="--tokens 500 ..."
	$(BIN)/kvpoll demo $(ARGS)

test: .venv/.stamp-test ## all static checks, the quick exploration, all tests, the coverage gates
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target APART=yes check explore
	$(MAKE) --no-print-directory coverage

# Of the others, those that look inside a driver are left out or skipped, and say so.
isolated: .venv/.stamp-test ## the tests of whole endpoints once more, each driver in a process of its own
	$(BIN)/pytest -n $(WORKERS) --isolation process $(ENDPOINT_TESTS)

check: .venv/.stamp-test ## static checks: style, types, imports, wheel contents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	@rm -rf build/wheel
	$(BIN)/python -m build -q -w -n -o build/wheel .
	$(BIN)/check-wheel-contents build/wheel

explore: .venv/.stamp-test ## every interleaving of the quick scenes; all scenes with: make explore SCENES=
	$(BIN)/kvpoll explore $(SCENES)

# The pure modules, as kvpoll_fsm/poll.py,...: the import contract in pyproject.toml lists them.
PURE = $$($(BIN)/python -c "from importlinter.api import read_configuration as conf; \
	pure = next(c for c in conf()['contracts_options'] if c['id'] == 'pure'); \
	print(','.join(m.replace('.', '/') + '.py' for m in pure['source_modules']))")

# What performs the pure code for minutes, or starts many processes, takes twice as long when it is measured, and adds
# little to the measure.
UNMEASURED := $(addprefix tests/,chaos faults fences fuzz mover property explore/test_mutants.py \
	simulate/test_simulate_mutants.py test_cli.py test_cli_local.py test_docs.py test_mooncake_rooms.py test_world.py \
	test_world_faults.py $(addprefix transports/test_,can_fail.py costly.py mooncake.py mooncake_faults.py tcp_tls.py \
	write_a_transport.py))

coverage: .venv/.stamp-test ## all tests, then the coverage gates: 95% for pure modules, 90% for all
	$(BIN)/coverage erase
	$(BIN)/pytest -n $(MORE_WORKERS) $(UNMEASURED)
	$(BIN)/coverage run -m pytest -n $(WORKERS) $(UNMEASURED:%=--ignore=%)
	$(BIN)/coverage combine -q
	@echo 'pure modules, at least 95%:'
	@$(BIN)/coverage report --include="$(PURE)" --fail-under=95
	@echo 'everything, at least 90%:'
	@$(BIN)/coverage report --fail-under=90

soak: .venv/.stamp-demo ## simulated rooms and faults, 10 minutes; longer with: make soak MINUTES=30 (for each of two modes)
	$(BIN)/kvpoll simulate --mode safety --seed $$(date +%s) $(SOAK)
	$(BIN)/kvpoll simulate --mode liveness --seed $$(date +%s) $(SOAK)

fuzz: .venv/.stamp-fuzz ## every decoder under atheris, some minutes; longer with: make fuzz FUZZ_SECONDS=600
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

chaos: .venv/.stamp-demo ## 1,000 rooms under random faults, about 4 minutes, as root; one again with: make chaos SEED=7
	$(BIN)/python -m tests.chaos.run $(if $(SEED),--seed $(SEED))

mooncake: .venv/.stamp-mooncake ## install what the transport mooncake needs, and run the demo over it
	$(BIN)/kvpoll demo --transport require:mooncake $(ARGS)

faults-mooncake: .venv/.stamp-test ## what goes wrong with Mooncake, in its own time: about 3 minutes
	$(BIN)/pytest -n $(WORKERS) --slow -m slow tests/transports/test_mooncake_slow.py

bench: .venv/.stamp-bench ## the library beside its peers, in under 15 minutes; figures and plots go to docs/
	$(BIN)/kvpoll bench --out docs

clean: ## remove everything that make and the tools made, .venv included
	rm -rf .venv build dist htmlcov .coverage .coverage.* .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 comes without ensurepip: install what is missing where that is possible, else say so.
# hatchling, pinned like the rest, is what the installs below build with (--no-build-isolation).
.venv/.stamp-venv:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'installing python3-venv' \
	     && apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install python3-venv >/dev/null; } \
	|| { echo 'Python cannot make virtual environments: as root, apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) hatchling
	@touch $@

# Debian packages $(1), if this is Debian and we are root; else $(2) is said.
DEBS = dpkg -s $(1) >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'installing $(1)' && apt-get -qq update \
	     && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install $(1) >/dev/null; } \
	|| echo '$(2): as root, apt-get install $(1)' >&2
MOONCAKE_DEBS := libibverbs1 librdmacm1 libnuma1 libcurl4

.venv/.stamp-demo: pyproject.toml $(PINS) | .venv/.stamp-venv
	$(PIP) --no-build-isolation -e '.[cli]'
	@touch $@

# What the tests install contains what the demo needs: both stamps.
.venv/.stamp-test: pyproject.toml $(PINS) | .venv/.stamp-venv
	$(PIP) --no-build-isolation -e '.[$(TEST_EXTRAS)]'
	@$(call DEBS,$(MOONCAKE_DEBS),Mooncake cannot be tested)
	@touch .venv/.stamp-demo $@

.venv/.stamp-mooncake: pyproject.toml $(PINS) | .venv/.stamp-venv
	$(PIP) --no-build-isolation -e '.[cli,mooncake]'
	@$(call DEBS,$(MOONCAKE_DEBS),Mooncake will not work)
	@touch .venv/.stamp-demo $@

# atheris is an extra of its own: 35 MB, and only for Python 3.11 to 3.13 on x86-64.
.venv/.stamp-fuzz: .venv/.stamp-test
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	|| { echo 'atheris has no wheel for this Python: make clean, then make fuzz PYTHON=python3.11 (to 3.13)' >&2; exit 1; }
	$(PIP) --no-build-isolation -e '.[fuzz]'
	@touch $@

# Peers that only the benchmarks need. What cannot be installed is named as missing in the results.
.venv/.stamp-bench: pyproject.toml $(PINS) | .venv/.stamp-venv
	$(PIP) --no-build-isolation -e '.[bench]'
	@$(call DEBS,iperf3 $(MOONCAKE_DEBS),iperf3 or Mooncake may be missing)
	@touch .venv/.stamp-demo $@
