# make install | check | test | demo   (see README.md)
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help
help: ## show the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.PHONY: install
install: .venv/installed ## make .venv with exactly the versions of requirements.lock

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: lock
lock: .venv/installed ## resolve requirements.lock anew from pyproject.toml
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > build-constraints.txt
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --python-version 3.11 --no-annotate --no-header \
		--constraint build-constraints.txt --output-file requirements.lock pyproject.toml
	rm build-constraints.txt

.PHONY: protos
protos: .venv/installed ## generate the gRPC stubs from protos/teacher.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher.proto
