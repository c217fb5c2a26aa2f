# The machine around: starts the VMM, is the other end of the inner guest's console, and has its disks. Sourced by the guest's first
# process. VMM is set.

# The inner guest's root: busybox, and a script that does everything.
mkdir -p /inner/bin /inner/proc /inner/sys /inner/dev /inner/tmp
cp /bin/busybox /bin/vsock /inner/bin
ln -s busybox /inner/bin/sh
cp /lab.sh /inner
cp /inner.sh /inner/init
(cd /inner && find . | cpio -o -H newc) >/tmp/initramfs 2>/dev/null || fail "no initramfs"

# What comes from the inner guest's console: an order for the VMM, or something to be told.
cat >/answer.sh <<'EOF'
#!/bin/sh
while IFS= read -r line; do
	case "$line" in
	"VMM "*) echo "${line#VMM }" >/tmp/commands; echo done ;;
	*) echo "$line" >/dev/console ;;
	esac
done
EOF
chmod +x /answer.sh

# run NAME KERNEL-ARGUMENTS DEVICES...: one life of the inner machine.
run() {
	name=$1 arguments=$2
	shift 2
	started=$(uptime_s)
	rm -f /tmp/console /tmp/commands
	mkfifo /tmp/commands
	$VMM --kernel /vmlinux --initramfs /tmp/initramfs --memory-mib 128 --commands /tmp/commands \
		--append "console=ttyS0 quiet loglevel=4 panic=-1 pci=noearly random.trust_cpu=on lab=$name $arguments" \
		--pci console=/tmp/console "$@" &
	vmm=$!
	until [ -S /tmp/console ]; do
		kill -0 $vmm || fail "$name: the VMM did not start"
		sleep 0.1
	done
	socat UNIX-CONNECT:/tmp/console EXEC:/answer.sh &
	wait $vmm || fail "$name: the VMM ended with $?"
	tell "$name took" "$started" "$(uptime_s)"
}

# Bytes of a disk: 256 KiB from 1 MiB on.
part() {
	dd if="$1" bs=64k skip=16 count=4 2>/dev/null | md5sum | cut -d' ' -f1
}

for disk in mmio pci; do
	dd if=/dev/urandom of=/tmp/$disk.img bs=1M count=2 2>/dev/null
	tell image $disk before "$(part /tmp/$disk.img)"
done
dd if=/dev/urandom of=/tmp/hot.img bs=1M count=1 2>/dev/null
tell image hot before "$(md5sum </tmp/hot.img | cut -d' ' -f1)"
mkdir /tmp/host
socat UNIX-LISTEN:/tmp/host/vm_1000,fork EXEC:'tr a-z A-Z' &

# The lab's kernel has no ASPM, without which it does not ask ACPI for native hot plug, whatever it would be given.
run messages "pcie_ports=native" --slots 2 --no-reboot \
	--mmio rng --mmio rng,without=ring_packed+in_order --mmio block=/tmp/mmio.img \
	--pci rng --pci rng,without=ring_packed+in_order+notification_data --pci block=/tmp/pci.img --pci vsock=3:/tmp/host/vm
for disk in mmio pci; do
	tell image $disk after "$(part /tmp/$disk.img)"
done
run pins "pci=noearly,nomsi" --mmio block=/tmp/mmio.img --pci rng --pci block=/tmp/pci.img
