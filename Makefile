# make demo   install, train on real scans of digits and draw new ones   (RETRAIN=1 trains again)
# make test   install, lint, run all tests                               (JOBS=8 processes instead of 2)
# make bench  install, measure against the reference implementation  (BENCH="sampling --model fractalmar_in64")
#             DEVICE=cuda: measure the published presets on that device  (BENCH="--models fractalmar_in64")
# make speedrun  install, train a small model of Fashion-MNIST to 3.0 bits/dim on two cores: five minutes
# make gpu    install, run the tests that need a GPU, and that measurement: at most ten minutes
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
RUN := $(VENV)/bin/python

.PHONY: demo test bench speedrun gpu lint clean

demo: $(VENV)/.installed
	$(RUN) demo/digits.py $(if $(RETRAIN),--retrain)

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed
	$(RUN) tests/bench$(if $(DEVICE),_device.py --device $(DEVICE),.py) $(BENCH)

speedrun: $(VENV)/.installed
	$(RUN) demo/speedrun.py

# The tests get five minutes, the measurement what is left of nine and a half; it is kept if tests fail.
gpu: $(VENV)/.installed
	began=$$(date +%s); timeout 300 $(RUN) -m pytest -m gpu; tests=$$?; \
	left=$$(( began + 570 - $$(date +%s) )); \
	timeout $$(( left + 20 )) $(RUN) tests/bench_device.py --device cuda --seconds $$(( left - 40 )) && exit $$tests

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): torch alone is large, this takes minutes'
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) output
