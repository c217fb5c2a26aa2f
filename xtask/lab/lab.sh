# What test scripts in the guest may call.

# Seconds since the kernel started.
uptime_s() {
	cut -d' ' -f1 /proc/uptime
}

# One line for each virtio device: name, device type, status, driver, features (bit 0 first).
virtio_devices() {
	for d in /sys/bus/virtio/devices/*; do
		[ -e "$d" ] || continue
		driver=$(readlink "$d/driver")
		echo "LAB-VIRTIO ${d##*/} id=$(cat "$d/device") status=$(cat "$d/status") driver=${driver##*/}" \
			"features=$(cat "$d/features")"
	done
}

# Tells the other side something.
tell() {
	echo "LAB-TELL $*"
}

# Tells the other side something and waits for one line from it, left in $answer.
ask() {
	tell "$@"
	IFS= read -r answer <&3
}

# Ends the script as failed, with a reason.
fail() {
	echo "LAB-FAIL $*"
	exit 1
}
