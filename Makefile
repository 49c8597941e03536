# Entry points for people; each target is one script or one cargo command. `make help` lists them.
# One build profile (dev, which is optimised) serves demo and tests; only the benchmark builds the release profile.

SCRIPTS := benches/scripts
CARGO ?= cargo
export SIZE_MIB APPLY_MIB EXTENTS EPOCH_MIB GROW GROWTHS SIZE TARGET TARGETS RELAY KEEP SEED FILL KILLS ROLLBACKS PERCENT ROUNDS CASES LEVEL POINTS FROZEN COPIES MODE FS RATE KERNELS CUTS LOAD
# Python writes no caches beside the scripts.
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help setup build readers demo test accept kill-test failover-test tcp-test chaos delta-test points-test failback-test export-test grow-test capture-test guest-test unseen-test scrub-test ordered-test crash flips capture-stress bench-sync bench-resync bench-journal bench-capture bench-rpo sim sim-mutants model fuzz lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## installs missing system packages (root), or prints how
	@$(SCRIPTS)/setup.sh

build: setup ## the three programs, once, for demo and tests
	$(CARGO) build --workspace --bins

readers: setup ## the independent VMDK readers, in a virtual environment under target/
	@$(SCRIPTS)/readers.sh

demo: build ## a disk comes home: [SIZE=1G] [TARGET=flat|vmfs|2gb-flat|sparse|2gb-sparse|device] [RELAY=0] [KEEP=1] [SEED=n]
	@$(SCRIPTS)/demo.py

test: build readers ## every test of the workspace, with a sum at the end
	@$(SCRIPTS)/test.sh

accept: build readers ## every kind of target judged by others: [SIZE=8G] [FILL=50] [TARGETS="flat sparse"] [RELAY=0]
	@$(SCRIPTS)/accept.py

kill-test: build ## kill -9 during the initial sync: [KILLS=20] [SIZE=8G] [TARGET=flat] [SEED=n]
	@$(SCRIPTS)/kill_test.py

failover-test: build ## the process server in use is killed under load, the agent goes on with another, as root: [KILLS=20] [RATE=50] [SIZE=512M] [MODE=data|window] [SEED=n]
	@$(SCRIPTS)/failover_test.py

tcp-test: build ## everything over TCP where UDP is dropped, and back, as root: [SIZE=512M] [RATE=20] [SEED=n]
	@$(SCRIPTS)/tcp_test.py

chaos: build ## everything goes wrong around three daemons and a second process server while a file system is written to, as root: [SECONDS=1800] [SIZE=512M] [MODE=window|data] [SEED=n]
	@SECONDS=$(or $(SECONDS),1800) $(SCRIPTS)/chaos.py

delta-test: build ## an existing target, a share of its blocks changed: [SIZE=8G] [PERCENT=5] [LEVEL=adaptive] [RELAY=1] [SEED=n]
	@$(SCRIPTS)/delta_test.py

bench-sync: setup ## speed and cost of the initial sync, release build: [SIZE=8G] [FILL=50] [ROUNDS=3] [CASES="direct, -1;relayed, -1"]
	$(CARGO) build --release --bins
	@REPROTECT_BIN_DIR="$${CARGO_TARGET_DIR:-target}/release" $(SCRIPTS)/bench_sync.py

bench-resync: setup ## an existing target repaired, beside rsync and beside reading, release build, as root: [SIZE=8G] [PERCENTS="5 1"] [ROUNDS=1] [LEVEL=1] [SEED=1]
	$(CARGO) build --release --bins
	@PERCENTS="$(PERCENTS)" REPROTECT_BIN_DIR="$${CARGO_TARGET_DIR:-target}/release" $(SCRIPTS)/bench_resync.py

bench-capture: setup ## cost of live capture, release build, as root: [ROUNDS=30] [SECONDS=1] [INTERVAL=10] [LOADS=4k-1,4k-32,1m,buffered] [MODES=bitmap,window,data] [SEED=n]
	$(CARGO) build --release -p reprotect-benches --bin bench_capture
	@ROUNDS=$(ROUNDS) SEED=$(SEED) SECONDS=$(SECONDS) INTERVAL=$(INTERVAL) LOADS=$(LOADS) MODES=$(MODES) "$${CARGO_TARGET_DIR:-target}/release/bench_capture"

bench-rpo: setup ## age of the durable state under random writes, release build, as root: [SECONDS=60] [RATES="20 50"] [MODES="data window"] [RELAY=1]
	$(CARGO) build --release --bins
	@REPROTECT_BIN_DIR="$${CARGO_TARGET_DIR:-target}/release" $(SCRIPTS)/bench_rpo.py

capture-stress: setup ## equality under fire, many runs per mode, as root: [RUNS=50]
	RUNS=$(or $(RUNS),50) $(SCRIPTS)/capture_stress.sh

bench-journal: setup ## speed and cost of the retention journal, release build: [DIR=target/bench-journal] [PARTS="commit apply"] [SIZE_MIB=2048] [APPLY_MIB=192] [EXTENTS=10000000] [EPOCH_MIB=6000] [GROW=300000]
	$(CARGO) build --release -p reprotect-benches --bin bench_journal
	@"$${CARGO_TARGET_DIR:-target}/release/bench_journal" "$(or $(DIR),target/bench-journal)" $(PARTS)

points-test: build ## recovery points mounted, compared, gone back to: [SIZE=1G] [POINTS=6] [ROLLBACKS=10] [TARGET=flat] [SEED=n]
	@$(SCRIPTS)/points_test.py

failback-test: build ## a disk goes home and is taken back, with kills between the steps: [SIZE=1G] [KILLS=8] [TARGET=flat] [RELAY=1] [SEED=n]
	@$(SCRIPTS)/failback_test.py

export-test: build ## points exported, and extracted from the folder alone after kills: [SIZE=1G] [POINTS=3] [KILLS=3] [SEED=n]
	@$(SCRIPTS)/export_test.py

grow-test: build ## a disk that grows under load, with kills of the master target: [SIZE=256M] [GROWTHS=3] [TARGET=flat] [MODE=window|data] [RELAY=1] [SEED=n]
	@$(SCRIPTS)/grow_test.py

capture-test: build ## a live file system with a database, its crash-consistent points judged: [SIZE=1G] [POINTS=50] [FROZEN=5] [COPIES=3] [MODE=window|data] [FS=ext4|xfs] [RELAY=1] [SEED=n]
	@$(SCRIPTS)/capture_test.py

guest-test: build ## a guest with LVM loses its power while it writes; needs no root: [KERNELS="6.1 6.12"] [CUTS=2] [SIZE=512M] [LOAD=8] [RELAY=1] [SEED=n]
	@$(SCRIPTS)/guest_test.py

unseen-test: build ## commands that write past the block layer, noticed in a guest with SCSI, NVMe and zoned disks: [KERNELS="6.1 6.12"]
	@$(SCRIPTS)/unseen_test.py

scrub-test: build ## the scrub under load, after kills, with rot and outside writes: [SIZE=1G] [SEED=n]
	@$(SCRIPTS)/scrub_test.py

ordered-test: setup ## ext4 and SQLite under load, points mounted and judged: [POINTS=50] [BETWEEN=25 by sequence and by time, too]
	ORDERED_POINTS=$(or $(POINTS),50) ORDERED_BETWEEN=$(or $(BETWEEN),25) ORDERED_MEBIBYTES=256 ORDERED_MILLISECONDS=2000 \
		$(CARGO) test -p reprotect-master-target --all-features --test ordered -- --nocapture

crash: ## the journal against power loss at every write of many workloads: [CASES=2000]
	CRASH_CASES=$(or $(CASES),2000) $(CARGO) test -p reprotect-engine --all-features --test journal_crash --test journal_store --test redo_log --test journal_model -- --nocapture

flips: ## every bit of a journal of more than 1 MiB flipped, every truncation; ten thousand damaged ones opened
	FLIPS=all $(CARGO) test -p reprotect-engine --all-features --test journal_flips -- --nocapture --test-threads 1

sim: ## the simulator: [SEED=n [MUTANT=name]] replays one seed with its events, [SEEDS=2000 or a..b] plays many
	$(if $(SEED),SIM_SEED=$(SEED)) $(if $(MUTANT),SIM_MUTANT=$(MUTANT)) $(if $(SEEDS),SIM_SEEDS=$(SEEDS)) \
		$(CARGO) test --workspace --test sim -- --nocapture

sim-mutants: ## deliberate bugs in the real cores and the store, a table of who sees each: [SEEDS=200] seeds played of each
	SIM_MUTANTS=$(or $(SEEDS),200) RUST_BACKTRACE=0 $(CARGO) test -p reprotect-engine --all-features --test sim --test journal_model \
		-- --nocapture --test-threads 1 mutants_of 2>&1 | \
		awk '/ within +[0-9]|is not seen|^without|^test result|^error/ { print } /FAILED|^error/ { failed = 1 } END { exit failed }'

model: ## the journal's executable model: [SEEDS=20000] plays that many, [SEED=n [RULE=name or CONTROL=name]] replays one, without a rule, or as without it
	$(if $(SEED),MODEL_SEED=$(SEED) $(if $(RULE),MODEL_RULE=$(RULE)) $(if $(CONTROL),MODEL_CONTROL=$(CONTROL)),MODEL_SEEDS=$(or $(SEEDS),20000)) \
		$(CARGO) test -p reprotect-engine --all-features --test journal_model -- --nocapture

fuzz: ## libFuzzer: [TIME=60] seconds for [TARGET=all] or one target
	@fuzz/run.sh $(or $(TARGET),all) $(or $(TIME),60)

lint: ## format, clippy, documentation, dependency policy, featureless builds
	@.ci/run lint

clean: ## everything built or left by a killed run
	$(CARGO) clean
