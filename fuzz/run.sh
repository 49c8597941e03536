#!/bin/sh
# Runs one libFuzzer target for a while: fuzz/run.sh TARGET SECONDS; `all` runs every target one after another.
# New inputs go to target/fuzz-corpus/TARGET, failures to fuzz/artifacts/TARGET; the committed corpus is only read.
# Uses cargo-fuzz and the nightly toolchain (with the address sanitiser) where both are there; otherwise builds with the
# coverage passes of the compiler at hand, which needs clang or another C++ compiler for libFuzzer itself.
set -eu

usage="usage: fuzz/run.sh TARGET|all SECONDS"
target=${1:?"$usage"}
seconds=${2:?"$usage"}
cd "$(dirname "$0")/.."

targets=$(ls fuzz/fuzz_targets | sed 's/\.rs$//')
if [ "$target" = all ]; then
    for each in $targets; do
        "fuzz/run.sh" "$each" "$seconds"
    done
    exit 0
fi
if [ ! -f "fuzz/fuzz_targets/$target.rs" ]; then
    echo "fuzz/run.sh: no target $target; there are:" $targets >&2
    exit 2
fi

corpus=target/fuzz-corpus/$target
artifacts=fuzz/artifacts/$target
mkdir -p "$corpus" "$artifacts" "fuzz/corpus/$target"
options="-max_total_time=$seconds -max_len=16384 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1"

if cargo fuzz --version >/dev/null 2>&1 && cargo +nightly --version >/dev/null 2>&1; then
    # shellcheck disable=SC2086
    exec cargo +nightly fuzz run --features libfuzzer "$target" "$corpus" "fuzz/corpus/$target" -- $options
fi

if ! command -v c++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "fuzz/run.sh: libFuzzer needs a C++ compiler; install clang, or cargo-fuzz with the nightly toolchain" >&2
    exit 3
fi
echo "fuzz/run.sh: no cargo-fuzz with nightly here: building with coverage, without the address sanitiser" >&2
host=$(rustc -vV | sed -n 's/^host: //p')
passes="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
passes="$passes -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
passes="$passes -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
# A target named explicitly keeps the passes away from build scripts, which are not linked with libFuzzer.
RUSTFLAGS="$passes --cfg fuzzing" cargo build -q --package reprotect-fuzz --features libfuzzer \
    --bin "$target" --target "$host" --target-dir target/fuzz
# shellcheck disable=SC2086
exec "target/fuzz/$host/debug/$target" "$corpus" "fuzz/corpus/$target" -artifact_prefix="$artifacts/" $options
