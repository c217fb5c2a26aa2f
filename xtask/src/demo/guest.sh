# What the demo's guest does with its four devices; sourced by its first process. Every loop in it ends by itself.
# BLOCKS, SAMPLE and MIB are set.
tell kernel $(uname -r)
tell booted $(uptime_s)

# The entropy device: rngtest ends with 1 if it found something odd, which a perfect source has now and then.
tell source $(cat /sys/class/misc/hw_random/rng_current)
tell sample $(timeout 20 head -c $SAMPLE /dev/hwrng | hexdump -v -e '1/1 "%02x "')
timeout 120 rngtest -c $BLOCKS </dev/hwrng 2>/tmp/rngtest
status=$?
cat /tmp/rngtest
[ $status -le 1 ] || fail "rngtest ended with $status"
tell bits $(sed -n 's/.*bits received from input: //p' /tmp/rngtest)
tell good $(sed -n 's/.*FIPS 140-2 successes: //p' /tmp/rngtest)
tell bad $(sed -n 's/.*FIPS 140-2 failures: //p' /tmp/rngtest)

# The disk: a file that is still the same once it has to come from the disk.
mkfs.ext4 -q /dev/vda || fail "no file system"
mkdir -p /mnt
mount /dev/vda /mnt || fail "cannot mount the disk"
dd if=/dev/urandom of=/mnt/data bs=1M count=$MIB 2>/dev/null || fail "cannot write the disk"
sum=$(md5sum </mnt/data)
umount /mnt && mount /dev/vda /mnt || fail "cannot mount the disk again"
[ "$(md5sum </mnt/data)" = "$sum" ] || fail "the disk does not give back what was written"
tell disk $(stat -c %s /mnt/data)

# The console's named port, and the socket: the host compares what came.
for port in /sys/class/virtio-ports/*; do
	[ "$(cat "$port/name")" = demo ] && break
done
timeout 60 cat /mnt/data >"/dev/${port##*/}" || fail "cannot write to the console's port"
tell console ${port##*/}
timeout 60 vsock connect 2 1000 </mnt/data || fail "no connection to the host"
tell socket $(vsock cid)
umount /mnt
tell tested $(uptime_s)
