# Each target makes .venv by itself (uv when present, else venv + pip) and does nothing twice.
# With pip, the index's build of torch is taken, or a CPU build where pip is told of one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
# With uv, TORCH_BACKEND names the build: cpu (default), auto, cu130, ...; empty leaves it to the index.

PYTHON ?= python3
TORCH_BACKEND ?= cpu
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
VENV := $(PYTHON) -m venv .venv
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
else
VENV := uv venv --quiet --allow-existing --python $(PYTHON) .venv
INSTALL := uv pip install --quiet --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND) )-c constraints.txt
endif

.PHONY: quickstart test test-deploy browser lint bench mutants teachers corpus experiment clean

ARMS := --arm fedavg --arm align --arm pretrain --arm pretrain-align
quickstart: .venv/quickstart.stamp  ## the three stages on real handwritten digits: a table and report.html
	@echo "== quickstart: four arms, two at a time; the same command resumes it"
	$(BIN)/mllm-fl run experiments/quickstart.toml --jobs 2 $(ARMS)
	$(BIN)/mllm-fl report runs/quickstart --out report.html --title "mllm-fl quickstart"
	@echo "== open report.html"

test: .venv/dev.stamp lint browser  ## lint, types, tests
	@echo "== tests (those marked 'data' need MLLM_FL_DATA=folder of the real data sets)"
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-deploy: .venv/dev.stamp  ## a federation of real processes, killed one after another; the annotator on a real Ray: 12 minutes on two idle cores
	@echo "== deployment tests: real SuperLinks and SuperNodes on the loopback, and Ray"
	$(BIN)/python -m pytest -q -m deploy tests/deployment tests/annotate/test_ray_data.py

browser:  ## the report is looked at in a real browser: installed where there is none and apt-get may be used
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable chrome; do \
	  if [ -n "$$name" ] && command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if ! command -v apt-get >/dev/null; then echo "== no browser and no apt-get: the report's browser tests will say what is missing"; exit 0; fi; \
	echo "== installing chromium for the report's tests"; \
	if [ "$$(id -u)" = 0 ]; then root=; else root=sudo; fi; \
	$$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -y -qq --no-install-recommends chromium >/dev/null

lint: .venv/dev.stamp
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.stamp  ## one round beside a bare loop, Flower's simulation and pfl-research (each in build/peers), then docs/engines.md
	@echo "== benchmark: about half an hour; \`mllm-fl bench --quick\` takes two minutes"
	$(BIN)/python benchmarks/run.py
	$(BIN)/mllm-fl bench --quick --profile --images 320 --out results/bench.jsonl
	$(BIN)/python scripts/bench_table.py

JOBS ?= 2
mutants: .venv/dev.stamp  ## delete or flip each method's own terms, one at a time; resumable; writes docs/mutants.md
	@echo "== mutants: only new, changed or surviving ones are run; METHOD=name for one method"
	$(BIN)/python scripts/mutants.py --jobs $(JOBS) $(foreach m,$(METHOD),--method $(m))

teachers: .venv/dev.stamp  ## train the bundled mini-CLIP and mini-LLaVA again, and measure them
	@echo "== teachers: rendered characters only, minutes on two cores"
	$(BIN)/python -m mllm_fl.models.teacher.recipe
	$(BIN)/python scripts/teacher_card.py

corpus: .venv/dev.stamp  ## 6,091 real images annotated by a small model that is trained here; resumable; writes docs/corpus-card.md
	@echo "== corpus: needs MLLM_FL_DATA; the tower takes about an hour of one core, the annotator and the rest a quarter"
	[ -e runs/cifar-clip/CARD.json ] || $(BIN)/python scripts/cifar_teacher.py --out runs/cifar-clip
	$(BIN)/python scripts/open_annotator.py --out runs/corpus/annotator
	$(BIN)/python scripts/open_corpus.py

FILE ?= experiments/quickstart.toml
SEEDS ?= 0 1 2
experiment: .venv/quickstart.stamp  ## an experiment over seeds, resumable; adds a line per run to results/
	$(BIN)/mllm-fl run $(FILE) --jobs 2 $(foreach s,$(SEEDS),--seed $(s))
	$(BIN)/mllm-fl collect runs/$(basename $(notdir $(FILE))) --out results/$(basename $(notdir $(FILE))).jsonl

clean:
	rm -rf .venv runs report.html

.venv/bin/python:
	@echo "== making .venv with $(if $(UV),uv,venv and pip)"
	@$(VENV)

.venv/quickstart.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== installing mllm-fl for the quickstart"
	@$(INSTALL) -e ".[quickstart]"
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== installing mllm-fl for development"
	@$(INSTALL) -e ".[dev]"
	@touch $@ .venv/quickstart.stamp
