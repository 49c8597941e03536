#!/usr/bin/env bash
# Equality under fire, many times: bitmap, stream and windows, ext4 and xfs; called by `make capture-stress` as root.
# Each run prints its seed; the run that fails can be repeated by SEED=…. Fails unless RUNS runs of every test passed.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-50}
cargo="${CARGO:-cargo}"
log=target/capture-stress.log
mkdir -p target
: >"$log"
for ((run = 1; run <= runs; run++)); do
    for test in "capture_bitmap a_copy_of" "capture_bitmap overlapping" "capture_window a_replay_of" "capture_window images_of"; do
        read -r binary filter <<<"$test"
        if ! "$cargo" test -q -p reprotect-agent --test "$binary" "$filter" -- --nocapture --test-threads=1 >>"$log" 2>&1; then
            echo "capture-stress: run $run of $runs failed in $test; the seed and the rest in $log" >&2
            exit 1
        fi
    done
    if grep -q SKIPPED "$log"; then
        grep -m1 SKIPPED "$log" >&2
        exit 1
    fi
    echo "capture-stress: run $run of $runs identical"
done
# 4 copies, 3 raw disks, 2 replays, 2 sets of windows print a seed each.
seeds=$(grep -c SEED= "$log")
if [ "$seeds" -ne $((runs * 11)) ]; then
    echo "capture-stress: $seeds runs were made, $((runs * 11)) wanted" >&2
    exit 1
fi
echo "capture-stress: $seeds runs, all byte-identical"
