#!/bin/busybox sh
# First process of the guest. Puts a tmpfs over the host's root, which it sees read-only through
# virtiofs, mounts what every Linux has, cgroup v2 as systemd would, and goes on with /vm/run.sh.
B=/bin/busybox
fail() { $B echo "init: $1"; $B poweroff -f; }

$B mkdir -p /proc /sys /dev /lower /rw /root
$B mount -t proc proc /proc && $B mount -t sysfs sys /sys && $B mount -t devtmpfs dev /dev || fail mounts
for module in /modules/*.ko; do $B insmod "$module" || fail "$module"; done
$B mount -t virtiofs -o ro hostfs /lower || fail "the host's root over virtiofs"
$B mount -t tmpfs -o size=60%,mode=755 rw /rw && $B mkdir /rw/up /rw/work || fail tmpfs
$B mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work root /root || fail overlay

cd /root || fail root
$B mkdir -p vm
for name in proc sys dev; do $B mount -o move /$name $name || fail "/$name"; done
$B mount -t tmpfs -o mode=755,nosuid,nodev run run
$B cp $B run/busybox
$B mkdir -p dev/pts dev/shm
$B mount -t devpts -o mode=620,ptmxmode=666 pts dev/pts
$B mount -t tmpfs -o mode=1777,nosuid,nodev shm dev/shm
$B mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup sys/fs/cgroup || fail cgroup2
$B mount -t virtiofs vm vm || fail "the directory for results"
$B mkdir -p disk && $B mount -t ext4 -o ro dev/vda disk || fail "the disk"
$B ln -sf /proc/self/fd dev/fd
$B hostname outrider-guest
$B ifconfig lo 127.0.0.1 up
exec $B switch_root . /bin/sh /vm/run.sh
