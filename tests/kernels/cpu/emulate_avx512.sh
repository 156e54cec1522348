#!/bin/bash
# Runs the C++ tests on an emulated processor with AVX-512, for machines without AVX-512: boots Linux in Bochs with the test binary as
# its only program. Every capability is tested.
#
#   tests/kernels/cpu/emulate_avx512.sh SOURCE [ARGUMENT...]
#
# SOURCE is a directory with the sources, a git tree-ish of the repository around the current directory, or a test binary that an
# earlier run built (tests/tests/kernels/cpu/peer_tests in $BUILD). The arguments go to the test binary, for example '[expert_mlp]', or
# 'sums are*,every half*' to select tests by the beginning of their names. As each test ends, its name is printed with the seconds since
# Bochs was started.
#
# Debian and Ubuntu: apt-get install bochs bochsbios busybox-static catch2 cmake cpio g++ isolinux syslinux-common xorriso
# Root is not needed. The build takes two minutes, all tests about fifteen, or five with a Bochs that is built without its debugger.
#
#   BOCHS    the emulator, version 2.7 or newer, with rfb: bochs
#   BUILD    the folder of the build and the logs: build/emulated of this checkout
#   CPU      the processor to emulate, one that `bochs --help cpu` lists: corei7_skylake_x
#   JOBS     the number of compilers that run at a time: 1
#   KERNEL   Linux kernel to boot (vmlinuz): Debian's for virtual machines, downloaded once
#   LIMIT    seconds until the emulator is stopped: 3600
#
# Exit status: 0 if all tests passed, 1 if one failed, 124 if the time was up, 125 if no test ran or Linux ended too soon.
set -euo pipefail

(($# > 0)) || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
source=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
build=$(realpath -m "${BUILD:-$here/../../build/emulated}")
mkdir -p "$build"
bochs=${BOCHS:-bochs}
help=$("$bochs" --help 2>&1 || true)

# Before version 2.8 (https://github.com/bochs-emu/Bochs/commit/e14b12619) the conversion to half precision rounded ties away from
# zero, with AVX2 and AVX-512 alike.
if (($# == 0)) && grep -q 'Emulator 2\.[0-7]\b' <<< "$help"; then
  echo "Skipped, because Bochs gets it wrong: sums are rounded to the nearest 16-bit value, ties to even - Half" >&2
  set -- '~*ties to even - Half'
fi

# The test binary is linked statically, because the emulated machine has no libraries. It is built anew each time, because the files of
# an archive have the time of the commit, so that objects of an older commit may look up to date.
if [[ -f $source ]]; then
  binary=$source
else
  rm -rf "$build/tests" "$build/source"
  if [[ ! -d $source ]]; then
    mkdir "$build/source"
    git log -1 --format='Commit %h of %ci, %s' "$source"
    git archive "$source" | tar -x -C "$build/source"
    source=$build/source
  fi
  cmake -S "$source" -B "$build/tests" -DPEER_BUILD_LIBRARY=OFF -DPEER_BUILD_TESTS=ON -DCMAKE_EXE_LINKER_FLAGS=-static \
    > "$build/cmake.log"
  cmake --build "$build/tests" --target peer_tests -j "${JOBS:-1}"
  binary=$build/tests/tests/kernels/cpu/peer_tests
fi

kernel=${KERNEL:-$build/vmlinuz}
if [[ ! -f $kernel ]]; then
  rm -rf "$build/kernel"
  mkdir "$build/kernel"
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
  (cd "$build/kernel" && apt-get -q download "$package" && dpkg-deb -x ./*.deb .)
  cp "$build"/kernel/boot/vmlinuz-* "$kernel"
  rm -rf "$build/kernel"
fi

# The initial RAM disk is the whole system.
image=$build/image
root=$build/root
rm -rf "$image" "$root"
mkdir -p "$image" "$root/bin" "$root/proc"
cp "$(command -v busybox)" "$root/bin/busybox"
strip -o "$root/peer_tests" "$binary"
(($# == 0)) || printf '%s\n' "$@" > "$root/arguments"
cat > "$root/init" << 'EOF'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
echo "=== $(grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2)"
status=0
for flag in avx2 fma f16c avx512f avx512bw avx512dq avx512vl; do
  grep -qw $flag /proc/cpuinfo || { echo "=== no $flag"; status=125; }
done
if [ $status = 0 ]; then
  set --
  [ ! -e /arguments ] || while IFS= read -r argument; do set -- "$@" "$argument"; done < /arguments
  /peer_tests --durations yes "$@" || status=1
fi
echo "=== status $status"
sleep 1  # for the serial port to send what it was given
poweroff -f
EOF
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) > "$image/initrd"

# clearcpuid: Bochs 2.7 reports the wrong size for the compacted form of XSAVE, and Linux would then disable AVX.
# panic, reboot: a kernel that panics triple faults at once, and the triple fault ends Bochs.
cp "$kernel" "$image/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$image"
cat > "$image/isolinux.cfg" << 'EOF'
DEFAULT linux
LABEL linux
  KERNEL /vmlinuz
  APPEND initrd=/initrd console=ttyS0,115200 loglevel=4 mitigations=off nokaslr clearcpuid=xsavec,xsaves panic=-1 reboot=t
EOF
xorriso -as mkisofs -quiet -o "$build/image.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
  "$image" 2> "$build/xorriso.log"

# The screen is not used; rfb would show it to a VNC client. ips is the number of instructions per second of the emulated clock. A
# number that is larger than the real one saves interrupts.
cat > "$build/bochsrc" << EOF
config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model=${CPU:-corei7_skylake_x}, ips=200000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1
ata0-master: type=cdrom, path="$build/image.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="$build/serial.txt"
plugin_ctrl: speaker=0
clock: sync=none
log: "$build/bochs.log"
panic: action=fatal
error: action=report
info: action=ignore
EOF
options=(-q -f "$build/bochsrc")
if [[ $help == *" -rc "* ]]; then  # Debian's has a debugger, which waits for a command
  echo continue > "$build/debugger"
  options+=(-rc "$build/debugger")
fi
: > "$build/serial.txt"
SECONDS=0
timeout -k 10 "${LIMIT:-3600}" "$bochs" "${options[@]}" < /dev/null > "$build/bochs.out" 2>&1 &
process=$!
trap 'kill $process 2> /dev/null || true' EXIT
# Removes the serial line's carriage returns, Catch2's colours, and durations by the emulated clock.
tail -n +1 -f --pid=$process "$build/serial.txt" | sed -u -E 's/\r$//; s/\x1b\[[0-9;]*m//g; s/^[0-9.]+ s: //' |
  while IFS= read -r line; do printf '%5d %s\n' $SECONDS "$line"; done
emulator=0
wait $process || emulator=$?
trap - EXIT

status=$(sed -n 's/^=== status \([0-9]*\)\r*$/\1/p' "$build/serial.txt")
if [[ -z $status ]]; then
  ((emulator == 124)) && echo "The time was up after $SECONDS s" >&2 && exit 124
  echo "Linux ended before the tests did; see serial.txt, bochs.log and bochs.out in $build" >&2
  exit 125
fi
if grep -q 'No tests ran' "$build/serial.txt"; then  # Catch2 2 reports success
  exit 125
fi
exit "$status"
