# Runs in a machine whose processor has AMD-V, emulated: here ringer is the monitor.
export HOME=/root
now() { cut -d' ' -f1 /proc/uptime; }
since() { echo "$1 $(now)" | awk '{ printf "%.2f", $2 - $1 }'; }
say() { echo "@@ $*"; }
mkdir -p /dev/net
say host "$(uname -r), $(grep -c svm /proc/cpuinfo) processors with AMD-V, up for $(now) s"
[ -c /dev/kvm ] || say FAILED "no /dev/kvm"

# The default guest to its shell, which says what it is and leaves.
for cpus in 1 2; do
    begin=$(now)
    printf 'echo shell-$((6 * 7)) $(nproc) processors, up for $(cut -d" " -f1 /proc/uptime) s\nexit\n' |
        timeout 500 ringer run --accel kvm --cpus $cpus >/tmp/out 2>/tmp/err
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
printf 'exit\n' | timeout 500 ringer run 2>&1 >/dev/null | grep -q "engine kvm" || say FAILED "auto does not take kvm"

# A disk, a network, a reset and a power-off.
mkdir -p /srv
dd if=/dev/urandom of=/srv/file bs=1M count=8 2>/dev/null
httpd -p 127.0.0.1:8080 -h /srv
truncate -s 64M /tmp/disk.raw
begin=$(now)
timeout 500 ringer run --accel kvm --cpus 2 --kernel /vmlinuz --initrd /server.cpio --append "console=ttyS0 quiet panic=-1" \
    --disk /tmp/disk.raw,format=raw </dev/null >/tmp/out 2>/tmp/err
status=$?
sum=$(md5sum </srv/file | cut -d' ' -f1)
if [ $status = 0 ] && grep -q "first start" /tmp/out && grep -q "second start, $sum" /tmp/out; then
    say server "disk, network, reset, power-off with 2 vCPUs: $(since $begin) s"
else
    say FAILED "the server (status $status)"
    cat /tmp/out /tmp/err
fi

# What it costs, compared with another monitor on the same KVM.
timeout 300 xtask figures 2>&1 | sed 's/^/@@ figure /'

# The bare-metal guests.
for test in /tests/*; do
    say suite "${test#/tests/}"
    begin=$(now)
    RINGER_ENGINE=kvm RINGER_PATIENCE=10 RUST_BACKTRACE=0 timeout 500 $test --test-threads=2 2>&1
    say took "${test#/tests/}: $(since $begin) s"
done
say end here
