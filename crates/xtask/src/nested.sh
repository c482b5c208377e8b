# Runs in a machine whose processor has AMD-V, emulated: here ringer is the monitor.
export HOME=/root
now() { cut -d' ' -f1 /proc/uptime; }
since() { echo "$1 $(now)" | awk '{ printf "%.2f", $2 - $1 }'; }
say() { echo "@@ $*"; }
mkdir -p /dev/net
# A kernel that stands still ends, so that it is started again.
echo 1 >/proc/sys/kernel/panic_on_rcu_stall
say host "$(uname -r), $(grep -c svm /proc/cpuinfo) processors with AMD-V, up for $(now) s"
[ -c /dev/kvm ] || say FAILED "no /dev/kvm"

# The default guest to its shell, which says what it is and leaves.
for cpus in 1 2; do
    begin=$(now)
    printf 'echo shell-$((6 * 7)) $(nproc) processors, up for $(cut -d" " -f1 /proc/uptime) s\nexit\n' |
        timeout 200 ringer run --accel kvm --cpus $cpus >/tmp/out 2>/tmp/err
    status=$?
    head -3 /tmp/err
    if [ $status = 0 ] && grep -q "^shell-42 $cpus processors" /tmp/out; then
        say boot "$cpus vCPU: $(since $begin) s in all; $(grep ^shell-42 /tmp/out)"
    else
        say FAILED "the default guest with $cpus vCPU (status $status)"
        tail -20 /tmp/out /tmp/err
    fi
done

# What auto chooses here.
printf 'exit\n' | timeout 200 ringer run 2>&1 >/dev/null | grep -q "engine kvm" || say FAILED "auto does not take kvm"

# A disk, a network, a reset and a power-off.
mkdir -p /srv
dd if=/dev/urandom of=/srv/file bs=1M count=8 2>/dev/null
httpd -p 127.0.0.1:8080 -h /srv
truncate -s 64M /tmp/disk.raw
begin=$(now)
timeout 200 ringer run --accel kvm --cpus 2 --kernel /vmlinuz --initrd /server.cpio --append "console=ttyS0 quiet panic=-1" \
    --disk /tmp/disk.raw,format=raw </dev/null >/tmp/out 2>/tmp/err
status=$?
sum=$(md5sum </srv/file | cut -d' ' -f1)
if [ $status = 0 ] && grep -q "first start" /tmp/out && grep -q "second start, $sum" /tmp/out; then
    say server "disk, network, reset, power-off with 2 vCPUs: $(since $begin) s"
else
    say FAILED "the server (status $status)"
    cat /tmp/out /tmp/err
fi

# Firmware: SeaBIOS drives a disk and starts its first sector, which is a small one or GRUB's, who loads a kernel from a file
# system; then it starts a kernel by an option ROM.
begin=$(now)
timeout 200 ringer run --accel kvm --firmware seabios --net none --no-reboot --disk /boot.raw,format=raw \
    </dev/null >/tmp/out 2>/tmp/err
if [ $? = 0 ] && grep -q "by INT 13h" /tmp/out; then
    say firmware "a disk's first sector: $(since $begin) s"
else
    say FAILED "a disk by SeaBIOS"
    cat /tmp/out /tmp/err
fi
begin=$(now)
timeout 200 ringer run --accel kvm --firmware seabios --cpus 2 --net none --no-reboot --disk /grub.raw,format=raw \
    </dev/null >/tmp/out 2>/tmp/err
if [ $? = 0 ] && grep -q "GRUB loading" /tmp/out && grep -q "^installed-42 2" /tmp/out; then
    say firmware "GRUB on a disk, its kernel and RAM disk to the shell with 2 vCPUs: $(since $begin) s"
else
    say FAILED "GRUB on a disk"
    cat /tmp/out /tmp/err
fi
begin=$(now)
timeout 300 ringer run --accel kvm --firmware seabios --net none --no-reboot --kernel /vmlinuz --initrd /firmware.cpio \
    --append "console=ttyS0 quiet panic=-1" </dev/null >/tmp/out 2>/tmp/err
if [ $? = 0 ] && grep -q kernel-42 /tmp/out; then
    say firmware "a kernel: $(since $begin) s"
else
    say FAILED "a kernel by SeaBIOS"
    cat /tmp/out /tmp/err
fi

# What goes wrong is said in one line, with exit 1; auto goes on translated.
refuses() {
    words=$1
    shift
    timeout 100 "$@" </dev/null >/tmp/out 2>/tmp/err
    status=$?
    if [ $status = 1 ] && grep -q "$words" /tmp/err && [ $(grep -vc "^ringer: engine" /tmp/err) = 1 ]; then
        say refused "$(tail -1 /tmp/err)"
    else
        say FAILED "$words (status $status)"
        cat /tmp/out /tmp/err
    fi
}
kernel="--net none --kernel /astray.elf"
refuses "can't emulate the guest's instruction at .*:0xd0000000" ringer run --accel kvm $kernel
# The host takes away memory that the guest uses.
(
    until process=$(pidof ringer); do sleep 1; done
    sleep 3
    for file in /proc/$process/fd/*; do
        case $(readlink $file) in /memfd:guest-ram*) truncate -s 0 $file 2>&1 ;; esac
    done
) &
refuses "KVM can't get the guest's memory" ringer run --accel kvm --net none --kernel /reader.elf
wait
chmod 660 /dev/kvm
chgrp 104 /dev/kvm
echo "kvm:x:104:" >>/etc/group
echo "somebody:x:1000:1000::/:/bin/sh" >>/etc/passwd
refuses "join the group kvm (sudo usermod -aG kvm somebody" su somebody -c "ringer run --accel kvm $kernel"
mv /dev/kvm /kvm
refuses "there is no /dev/kvm" ringer run --accel kvm $kernel
: >/dev/kvm
refuses "/dev/kvm is there but is not KVM's device" ringer run --accel kvm $kernel
timeout 200 ringer run --firmware seabios --net none --no-reboot --disk /boot.raw,format=raw </dev/null >/tmp/out 2>/tmp/err
if [ $? = 0 ] && grep -q "by INT 13h" /tmp/out && grep -q "engine translate (not KVM: /dev/kvm is there but" /tmp/err; then
    say auto "$(head -1 /tmp/err)"
else
    say FAILED "auto without KVM"
    cat /tmp/out /tmp/err
fi
rm /dev/kvm
mv /kvm /dev/kvm

# What it costs, compared with another monitor on the same KVM.
timeout 300 xtask figures >/tmp/out 2>&1 || say FAILED "figures: $(tail -1 /tmp/out)"
sed 's/^/@@ figure /' /tmp/out

# The bare-metal guests, one at a time: where two virtual machines run at once, QEMU's AMD-V delivers interrupts twice and
# page faults of one to the other or to the host, whose kernel then panics (QEMU 10.0).
for test in /tests/*; do
    say suite "${test#/tests/}"
    begin=$(now)
    RINGER_ENGINE=kvm RINGER_PATIENCE=10 RUST_BACKTRACE=0 timeout 200 $test --test-threads=1 2>&1
    say took "${test#/tests/}: $(since $begin) s"
done
say end here
