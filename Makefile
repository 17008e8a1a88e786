# make install | check | test | docs | demo | bench   (see README.md)
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

# The demo's data set and, for all but digits, the folder with its official archives.
DATA ?= digits
SOURCE ?=
TWO_RANKS := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 student_trainer/main.py
# The study's epochs, where the recipes' own are too many: EPOCHS=15 (warm-up needs so many) tries the whole command in half an hour.
EPOCHS ?=
STUDY := runs/study$(if $(EPOCHS),-$(EPOCHS))
DEMO := runs/demo$(if $(filter-out digits,$(DATA)),-$(DATA))

.PHONY: help
help: ## show the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.PHONY: install
install: .venv/installed ## make .venv with exactly the versions of requirements.lock

.venv/installed: requirements.lock pyproject.toml
	@echo "installing into .venv (about 6 GB, a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: check
check: .venv/installed ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

.PHONY: test
test: .venv/installed ## all tests, on the CPU, without network
	$(BIN)/pytest -n 2 --dist worksteal

.PHONY: suite
suite: .venv/installed ## the long tests: the tiny form of every recipe, long faults, 100,000 damaged messages
	$(BIN)/pytest -n 2 --dist worksteal -m suite

.PHONY: docs
docs: .venv/installed ## the site, into site/, with warnings as errors; without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: demo
demo: .venv/installed ## the main job on a small data set: prepare, train a teacher, serve it, distil it
	@echo "== 1 of 3: prepare $(DATA)"
	$(BIN)/python -m data_prep.prepare $(DATA) --out runs/data/$(DATA) $(if $(SOURCE),--source $(SOURCE))
	@echo "== 2 of 3: train a teacher from labels"
	$(TWO_RANKS) --recipe $(DATA)/demo_teacher --data runs/data/$(DATA) --run-dir $(DEMO)/teacher
	@echo "== 3 of 3: serve it, and distil it on two ranks"
	$(TWO_RANKS) --recipe $(DATA)/demo --data runs/data/$(DATA) --run-dir $(DEMO) \
		--teacher.model $(DEMO)/teacher/model.safetensors
	@echo "what happened: $(DEMO)/report.png; the numbers: $(DEMO)/summary.json"

.PHONY: study
study: .venv/installed ## the consistency study on Flowers102: all view settings, two seeds (hours on two cores)
	$(BIN)/python -m data_prep.prepare flowers102 --out runs/data/flowers102 $(if $(SOURCE),--source $(SOURCE))
	OMP_NUM_THREADS=1 $(BIN)/python student_trainer/main.py --recipe flowers102/laptop_study_teacher \
		--run-dir $(STUDY)/teacher $(if $(WEIGHTS),--student.weights $(WEIGHTS)) $(if $(EPOCHS),--optim.epochs $(EPOCHS))
	$(BIN)/python -m benchmarks.study --data runs/data/flowers102 --teacher $(STUDY)/teacher/model.safetensors \
		--out $(STUDY) $(if $(EPOCHS),-- --optim.epochs $(EPOCHS))

.PHONY: bench
bench: .venv/installed ## every figure of docs/performance.md on this machine, as a table and in runs/bench.json (half an hour)
	$(BIN)/python -m benchmarks.bench

.PHONY: lock
lock: .venv/installed ## resolve requirements.lock anew from pyproject.toml
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > build-constraints.txt
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --python-version 3.11 --no-annotate --no-header \
		--constraint build-constraints.txt --output-file requirements.lock pyproject.toml
	rm build-constraints.txt

.PHONY: protos
protos: .venv/installed ## generate the gRPC stubs from protos/teacher.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher.proto
