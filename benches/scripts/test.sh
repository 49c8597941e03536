#!/usr/bin/env bash
# Runs the workspace's tests once and sums up: passed, failed, ignored, skipped. Called by `make test`.
# Why not cargo alone: a test that finds no loop device or judge passes and says `SKIPPED:`; such lines must be seen, and
# on a machine that has root and loop devices a skip for want of them is a failure.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin
mkdir -p target
log=target/test.log

# Capture that nobody owns: its programs run at every write of the machine until somebody takes them out. A place that is
# locked is a running agent's.
captured() {
    find /sys/fs/bpf/reprotect -mindepth 2 -path '*/agent-*' -printf '%h\n' 2>/dev/null | sort -u | while read -r place; do
        flock --nonblock "$place" echo "$place" || true
    done
}
captured_before=$(captured)

# The workspace together has every feature of every crate but libFuzzer's, so nothing is built twice.
# The log has everything; the terminal has what a person wants to see.
status=0
cargo test --workspace --no-fail-fast "$@" -- --show-output </dev/null 2>&1 | tee "$log" |
    grep --line-buffered -E '^ *(Running|Doc-tests|Compiling reprotect|error|warning: unused)|^test result|FAILED|^test .* has been running|SKIPPED:|panicked at' ||
    status=${PIPESTATUS[0]}

summary=$(awk '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
    END { printf "%d passed, %d failed, %d ignored", passed, failed, ignored }' "$log")
mapfile -t skips < <(grep -oE 'SKIPPED: .*' "$log" | sort | uniq -c | sed 's/^ *//')
echo
if [ ${#skips[@]} -gt 0 ]; then
    printf 'skipped %s\n' "${skips[@]}"
fi
echo "tests: $summary, ${#skips[@]} kinds of skips; everything in $log"
echo "$summary, ${#skips[@]} kinds of skips" >target/test.summary

left=$(comm -13 <(echo "$captured_before") <(captured))
if [ -n "$left" ]; then
    echo "tests: FAILED: capture was left in the kernel; find the test, then remove (each with rm -r):" >&2
    echo "$left" >&2
fi

if [ "$status" -ne 0 ] || grep -qE '^test result: FAILED|^error' "$log"; then
    # Last on the screen, and so last in what a machine keeps of it: which tests failed, and what each of them said.
    {
        sed -nE 's/^test (.*) \.\.\. FAILED$/\1/p' "$log" | sort -u | while read -r test; do
            echo "==== FAILED: $test"
            awk -v head="---- $test stdout ----" '
                $0 == head { seen = 1; next }
                /^---- .* ----$/ || /^(failures|successes):$/ { seen = 0 }
                seen && NF && !/RUST_BACKTRACE/' "$log" | head -n 12 || true
        done
        grep -E '^error' "$log" || true
        echo "tests: FAILED"
    } >&2
    exit 1
fi
[ -z "$left" ] || exit 1
# Root with a loop device: then nothing may be left out for want of them.
if [ "$(id -u)" -eq 0 ] && losetup --find >/dev/null 2>&1 && grep -qiE 'SKIPPED: .*(loop|mount|root)' "$log"; then
    echo "tests: FAILED: root and loop devices are here, and still tests were skipped for want of them" >&2
    exit 1
fi
