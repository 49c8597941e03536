#!/bin/sh
# Makes the virtual environment of the two independent VMDK readers in DIR; safe to run again.
set -eu
dir=${1:?usage: setup.sh DIR}
[ -x "$dir/bin/python" ] || python3 -m venv "$dir"
"$dir/bin/python" -c 'import pyvmdk, dissect.hypervisor' 2>/dev/null ||
    "$dir/bin/pip" install --quiet --disable-pip-version-check libvmdk-python dissect.hypervisor
"$dir/bin/python" -c 'import pyvmdk, dissect.hypervisor; print("readers ready: pyvmdk", pyvmdk.get_version())'
