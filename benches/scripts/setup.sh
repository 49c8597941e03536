#!/usr/bin/env bash
# Installs the system packages that demo and tests use, only what is missing; Rust itself is assumed.
# As root by apt; otherwise prints the one line to run and stops. Called by `make setup`, safe to run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin

# A program each package is known by, and the package.
declare -A packages=(
    [mke2fs]=e2fsprogs [mkfs.xfs]=xfsprogs [mkfs.btrfs]=btrfs-progs [mkfs.vfat]=dosfstools [qemu-img]=qemu-utils [losetup]=mount [mount]=mount [sfdisk]=fdisk
    [blockdev]=util-linux [swapon]=mount [python3]=python3 [cc]=gcc [make]=make [cmp]=diffutils [debugfs]=e2fsprogs
    [pkg-config]=pkg-config [nbdinfo]=libnbd-bin [nbdcopy]=libnbd-bin [nbdfuse]=libnbd-bin [mkfs.ext4]=e2fsprogs [qemu-io]=qemu-utils [fio]=fio
    [rsync]=rsync [clang]=clang [nbdkit]=nbdkit [partx]=util-linux [blkdiscard]=util-linux [busybox]=busybox-static [lvm]=lvm2 [strip]=binutils
)
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
# The interpreter may be there without what makes virtual environments.
if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    missing+=(python3-venv)
fi
# The NBD shell is a module of the system's own interpreter.
if ! /usr/bin/python3 -c 'import nbd' 2>/dev/null; then
    missing+=(python3-libnbd)
fi
# The C library's headers: the compiler alone does not bring them.
if command -v cc >/dev/null && ! echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1; then
    missing+=(libc6-dev)
elif ! command -v cc >/dev/null; then
    missing+=(libc6-dev)
fi
# What the capture programs are compiled with: helpers, and the kernel's own headers.
[ -e /usr/include/bpf/bpf_helpers.h ] || missing+=(libbpf-dev)
[ -e /usr/include/linux/bpf.h ] || missing+=(linux-libc-dev)
if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing; install Rust from https://rustup.rs" >&2
    exit 1
fi

# The emulator for guests. What cannot be had is told and is no failure: tests in a guest then say SKIPPED.
emulator() {
    local package=qemu-system-x86 own=target/guest/qemu mirror codename options
    command -v qemu-system-x86_64 >/dev/null && return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "setup: tests in a guest want an emulator; run as root: apt-get install -y --no-install-recommends $package" >&2
        return 0
    fi
    echo "setup: installing $package"
    apt-get install -y -q --no-install-recommends --no-remove $package </dev/null && return 0
    # Where qemu-img came from backports the rest of QEMU must, too. Lists of our own: the host's sources stay as they are.
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk '/^Debian Debian / { print $3; exit }')
    mkdir -p "$own/lists/partial"
    printf "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror %s main\n" \
        "$codename" "$codename-backports" >"$own/sources.list"
    options=(-o "Dir::Etc::sourcelist=$PWD/$own/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$PWD/$own/lists"
        -o APT::Sandbox::User= -o Acquire::Languages=none)
    apt-get "${options[@]}" update -q </dev/null &&
        apt-get "${options[@]}" install -y -q --no-install-recommends --no-remove -t "$codename-backports" $package </dev/null ||
        echo "setup: $package cannot be installed; tests in a guest will say SKIPPED" >&2
}

if [ ${#missing[@]} -eq 0 ]; then
    emulator
    exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
install=(apt-get install -y --no-install-recommends --no-remove "${missing[@]}")
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: missing system packages; run as root: ${install[*]}" >&2
    exit 1
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q </dev/null
"${install[@]}" </dev/null
emulator
