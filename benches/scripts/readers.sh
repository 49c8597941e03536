#!/usr/bin/env bash
# Makes the virtual environment of the independent VMDK readers under target/; says SKIPPED where PyPI is out of reach.
# Called by `make readers`, safe to run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
if sh engine/tests/readers/setup.sh target/readers-venv </dev/null; then
    exit 0
fi
rm -rf target/readers-venv
echo "SKIPPED: the independent VMDK readers cannot be installed from PyPI; qemu-img alone judges" >&2
