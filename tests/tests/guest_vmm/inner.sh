#!/bin/sh
# The inner guest's first process: Linux's own drivers on our buses. What is told goes to the host by the virtio console, line by line.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
. /lab.sh
exec </dev/hvc0 >/dev/hvc0 2>&1
stty raw -echo
name=$(sed 's/.*lab=\([a-z]*\).*/\1/' /proc/cmdline)

give_up() {
	fail "$name: $*"
}

# Whether something becomes true; the one who started all this ends it if it does not.
await() {
	until eval "$1"; do sleep 0.1; done
}

# Says what is done next, so that it is known where this stopped.
step() {
	echo "$name: $*"
}

# An order for the VMM.
vmm() {
	step "tell the VMM: $*"
	echo "VMM $*"
	IFS= read -r answer
	[ "$answer" = done ] || give_up "the console brought \"$answer\""
}

# Bytes from the entropy device with this name.
entropy() {
	step "entropy of $1"
	echo "$1" >/sys/class/misc/hw_random/rng_current || give_up "no $1"
	bytes=$(dd if=/dev/hwrng bs=512 count=4 2>/dev/null | wc -c)
	[ "$bytes" = 2048 ] || give_up "$1 gave $bytes bytes"
}

# The names of all entropy devices, of which there are so many.
sources() {
	step "wait for $1 entropy devices" >/dev/hvc0
	await "[ \$(wc -w </sys/class/misc/hw_random/rng_available) = $(($1 + 1)) ]"
	sed 's/none//' /sys/class/misc/hw_random/rng_available
}

# Which bus a disk is on.
bus_of() {
	case $(readlink -f "/sys/block/$1/device") in
	*/pci*) echo pci ;;
	*) echo mmio ;;
	esac
}

part() {
	dd if="$1" bs=64k skip=16 count=4 iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1
}

# Read, written, and read again past the guest's cache.
disks() {
	for disk in vda vdb; do
		bus=$(bus_of $disk)
		tell disk "$bus" before "$(part /dev/$disk)"
		dd if=/dev/urandom of=/tmp/new bs=64k count=4 2>/dev/null
		dd if=/tmp/new of=/dev/$disk bs=64k seek=16 conv=fsync,notrunc 2>/dev/null || give_up "cannot write $disk"
		tell disk "$bus" written "$(md5sum </tmp/new | cut -d' ' -f1)"
		tell disk "$bus" after "$(part /dev/$disk)"
	done
}

# Each interrupt of a virtio device: controller, which, how often.
interrupts() {
	cpus=$(grep -c ^processor /proc/cpuinfo)
	awk -v cpus="$cpus" '/virtio/ { n = 0; for (i = 2; i < 2 + cpus; i++) n += $i; print "LAB-TELL irq", $(2 + cpus), $NF, n }' \
		/proc/interrupts
}

# The BARs that each PCI device has, and where.
bars() {
	for device in /sys/bus/pci/devices/*; do
		n=0
		while read -r first last flags; do
			[ $n -lt 6 ] && [ "$((last))" -ne 0 ] && tell bar "${device##*/}" $n "$((first))" "$((last - first + 1))"
			n=$((n + 1))
		done <"$device/resource"
	done
}

# Who is bound to a driver, let go and taken again.
rebind() {
	step "let go and take again: $2"
	echo "$2" >"$1/unbind" || give_up "cannot unbind $2"
	[ -e "$1/$2" ] && give_up "$2 is still bound"
	echo "$2" >"$1/bind" || give_up "cannot bind $2"
	[ -e "$1/$2" ] || give_up "$2 is not bound"
}

messages() {
	virtio_devices
	for source in $(sources 4); do entropy "$source"; done
	disks
	tell vsock "$(echo hello | vsock connect 2 1000)"
	interrupts
	vmm show
	bars

	# One that is reset by its driver: virtio's own, and the PCI function's.
	function=$(for at in /sys/bus/pci/drivers/virtio-pci/0*; do
		[ "$(cat "$at/device")" = 0x1044 ] && echo "${at##*/}"
	done | head -n 1)
	rebind /sys/bus/virtio/drivers/virtio_rng virtio0
	rebind /sys/bus/virtio/drivers/virtio_rng "$(basename /sys/bus/pci/devices/"$function"/virtio*)"
	rebind /sys/bus/pci/drivers/virtio-pci "$function"
	for source in $(sources 4); do entropy "$source"; done
	# Taken off the bus by its owner, and found again.
	step "remove $function"
	echo 1 >"/sys/bus/pci/devices/$function/remove"
	[ -e "/sys/bus/pci/devices/$function" ] && give_up "$function is still there"
	sources 3 >/dev/null
	step rescan
	echo 1 >/sys/bus/pci/rescan
	for source in $(sources 4); do entropy "$source"; done
	tell again "$function"

	hot_plug
}

# The function in the slot behind each of the first two root ports.
slot() {
	bus=$(cat "/sys/bus/pci/devices/0000:00:0$1.0/secondary_bus_number")
	printf '/sys/bus/pci/devices/0000:%02x:00.0' "$bus"
}

hot_plug() {
	first=$(slot 1) second=$(slot 2)
	[ -d /sys/bus/pci/slots/1 ] || give_up "pciehp has no slots"
	for round in 1 2; do
		# By the button: Linux turns the slot on, and takes its time to turn it off.
		vmm plug 1 rng
		for source in $(sources 5); do entropy "$source"; done
		[ "$(cat "$first/device")" = 0x1044 ] || give_up "what is in the slot is something else"
		tell plugged $round "$(cat /sys/bus/pci/slots/1/power)"
		vmm unplug 1
		await "[ ! -e $first ]"
		await '[ "$(cat /sys/bus/pci/slots/1/power)" = 0 ]'
		# What pciehp makes of a card within the next second is not what anybody wants.
		sleep 2
		tell unplugged $round "$(cat /sys/bus/pci/slots/1/adapter)"
	done
	# A disk that is used, and gone without a word; then another card. Its driver is off it by then: Linux's waits for ever for a
	# device that is gone to say that it is reset.
	vmm plug 2 block=/tmp/hot.img
	await '[ -b /dev/vdc ]'
	tell hot before "$(md5sum </dev/vdc | cut -d' ' -f1)"
	echo "${second##*/}" >/sys/bus/pci/drivers/virtio-pci/unbind
	vmm pull 2
	await "[ ! -e $second ]"
	await '[ "$(cat /sys/bus/pci/slots/2/power)" = 0 ]'
	sleep 2
	vmm plug 2 rng
	for source in $(sources 5); do entropy "$source"; done
	# And stays, longer than pciehp waits for anything.
	sleep 8
	for source in $(sources 5); do entropy "$source"; done
	tell "plugged again" "$(cat "$second/device")"
}

pins() {
	for source in $(sources 1); do entropy "$source"; done
	disks
	interrupts
	# A note on the disk tells which life this is.
	if [ "$(dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 5)" = again ]; then
		tell rebooted
	else
		printf again | dd of=/dev/vda bs=512 conv=sync,fsync,notrunc 2>/dev/null
		reboot -f
	fi
}

(
	$name
	tell "$name" done
)
sync
poweroff -f
