# Set up, show, test. Everything happens in .venv; after `setup` nothing is downloaded.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
# One thread: tensors of `words` are small, and a second one waits more than it computes, above all on a busy machine.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

# What can be tested without a model: formulas, the format, settings, errors, text.
QUICK := tests/house tests/text/test_quotes.py tests/text/test_visible.py tests/format tests/cli/test_bad_input.py \
  tests/rollout/test_schedule.py tests/rollout/test_window.py tests/rollout/test_transitions.py \
  tests/rollout/test_cps.py tests/rollout/test_prompts.py tests/rollout/test_prompt_files.py \
  tests/train/test_objectives.py tests/train/test_order.py tests/train/test_rates.py \
  tests/score/test_advantages.py tests/score/test_text.py tests/workers/test_tally.py

.PHONY: setup demo test quick coverage first-hour fuzz mutants lint types docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch .venv/.ready

# The main job on the embedded model: at most ten minutes on two cores after the installation.
demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bench/demo.sh $(DEMO)

# Three processes for two cores: tests that kill processes, or let them wait, spend much of their time waiting.
# COVER=1 also prints the share of lines that the shorter test modules run in their own process, and fails below LIGHT_FLOOR.
LIGHT_FLOOR := 81
LIGHT := build/coverage/light
test: setup
	$(if $(filter 1,$(COVER)),rm -rf $(LIGHT) && mkdir -p $(LIGHT))
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(if $(filter 1,$(COVER)),--cover)
	$(if $(filter 1,$(COVER)),$(BIN)/python -m coverage combine --quiet --data-file $(LIGHT)/all $(LIGHT)/data.*)
	$(if $(filter 1,$(COVER)),@$(BIN)/python -m coverage report --data-file $(LIGHT)/all --fail-under $(LIGHT_FLOOR) --format=total)

# The same tests, in nearly twice the time. The last line is the share of cli.py and the packages that was run, in
# percent; below the floor of pyproject.toml it is an error. `.venv/bin/coverage html -d build/coverage/html` shows the lines.
coverage: setup
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest -n 3 --dist loadscope --no-loadscope-reorder
	$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --format=total

# Under a minute, for people at work.
quick: setup
	$(BIN)/python -m pytest $(QUICK)

# What `make test` leaves out: a user's first hour in a few minutes, from a fresh clone to an exported policy, with the
# time of each step; the first iteration of the demo from the wheel; a batch system; two machines that share a training.
first-hour: setup
	$(BIN)/python -m pytest -m long -s tests

# Every reader of files against inputs that are made up to reach all of its code: SECONDS for all of them together.
SECONDS ?= 60
fuzz: setup
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet $(PIP_FLAGS) \
		--constraint constraints.txt --only-binary atheris atheris
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --jobs 2

# Changes of sign, of sigma, of a window and the like in a copy of the source: the tests must notice each (an hour).
mutants: setup
	$(BIN)/python -m tests.mutants

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# The documentation, in build/site; a broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
