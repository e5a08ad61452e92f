//! What a hypervisor does with a VM that runs while its disks are read.

use super::one_line;

/// What [`suspend`] says when it has made the copies.
pub(in crate::host) const COPIED: &[u8] = b"\nkvm-clone-copied\n";
/// What [`backup`] says when the guest's file systems were frozen at its instant.
pub(in crate::host) const FROZEN: &[u8] = b"\nkvm-clone-frozen\n";
/// What [`watch`] says when it has ended the job.
pub(in crate::host) const FULL: &[u8] = b"\nkvm-clone-full\n";

/// With which [`backup`] says that a file system has too little space.
pub(in crate::host) const NO_SPACE: i32 = 72;
/// With which [`backup`] says that the guest's file systems cannot be frozen.
pub(in crate::host) const NOT_FROZEN: i32 = 73;

/// Suspends the VM `$1` of the libvirt at `$0`. Where the files that follow, pairs of a name and
/// another, can be copied by sharing their blocks, it makes these copies and resumes the VM;
/// else there are no copies, and it stays suspended.
pub(in crate::host) fn suspend() -> String {
    one_line(
        r#"umask 077; u=$0; v=$1; shift; n=$#;
        virsh -q -c "$u" suspend "$v" || exit 70;
        i=0; copied=yes;
        while [ $i -lt $n ]; do
        if [ "$copied" ]; then rm -f -- "$2"; cp --reflink=always -- "$1" "$2" 2>/dev/null || copied=; fi;
        set -- "$@" "$2"; shift 2; i=$((i+2));
        done;
        if [ "$copied" ] && [ $n -gt 0 ]; then
        for t in 1 2 3; do virsh -q -c "$u" resume "$v" && { echo; echo kvm-clone-copied; exit 0; }; sleep 1; done;
        fi;
        rm -f -- "$@""#,
    )
}

/// Ends what [`suspend`] began, with the names of the copies alone: where they are there the VM
/// runs already.
pub(in crate::host) fn resume() -> String {
    one_line(
        r#"u=$0; v=$1; shift;
        if [ $# -gt 0 ] && [ -e "$1" ]; then rm -f -- "$@";
        else virsh -q -c "$u" resume "$v"; fi"#,
    )
}

/// What the scripts about a backup job share. `$0` is the URI of libvirt, `$1` the VM, `$2` the
/// socket that tells the job from others, `$3` the least number of KiB that is to be left on the
/// file systems of the scratch files, which are the others.
///
/// `vir` is virsh with a limit: a guest agent may never answer. SIGTERM is ignored here, and so by
/// what is started. `room` holds where there is that space. `ours` does not hold where libvirt says that
/// there is no job, or another one: while it says nothing, as when it is started anew, ours may stand.
/// `end` ends the job, if it is still ours, and waits up to two minutes for that: libvirt 9 hears of a
/// job's end in the thread in which it hears of all that happens, and a guest agent that comes or goes
/// meanwhile stops that for 30 s, until libvirt gives up a lock that a backup job does not share. When a
/// scratch file could not grow, QEMU has paused the guest, which stays so after the job.
const BACKUP: &str = r#"
    umask 077; LC_ALL=C; export LC_ALL; u=$0; v=$1; s=$2; floor=$3; shift 3;
    vir() { timeout -s KILL 20 virsh -q -c "$u" "$@"; };
    free() { df -Pk -- "${1%/*}" 2>/dev/null | { read -r h; read -r a b c k l; echo "${k:-0}"; }; };
    room() {
        for f in "$@"; do
            k=$(free "$f"); [ "$k" -ge "$floor" ] || return 1;
        done;
    };
    ours() {
        o=$(vir backup-dumpxml "$v" 2>&1);
        case $o in
            (*"$s"*) return 0 ;;
            ("<domainbackup"*|*"no domain backup job"*|*"Domain not found"*) return 1 ;;
        esac;
    };
    end() {
        t=0; l=$(($(date +%s) + 120));
        while ours; do
            [ "$(date +%s)" -lt $l ] || { echo "$o" >&2; return 1; };
            [ $((t % 20)) -ne 0 ] || vir domjobabort "$v" >/dev/null 2>&1;
            t=$((t + 1)); if [ $t -lt 50 ]; then sleep 0.1; else sleep 1; fi;
        done;
        case $(vir domstate --reason "$v" 2>/dev/null) in
            ("paused (I/O error)") vir resume "$v" || return 1 ;;
        esac;
        rm -f -- "$s" "$@";
    };
"#;

/// Begins a backup job: after what all have come `$4`, how the guest's file systems are frozen
/// (`auto`, `require` or `off`), what asks its agent whether they are, the XML of the job, that of a
/// checkpoint or nothing, the bytes of each disk, and the scratch files. These are made ahead, where
/// `qemu-img` can, for a guest that is frozen waits for all that libvirt has to make. What somebody
/// else has frozen is left so. All that happens between freezing and thawing is one command line of
/// virsh, which goes on when a part of it fails. Where that had to be killed, libvirt may begin the job
/// all the same, as soon as it has waited 30 s for something else.
pub(in crate::host) fn backup() -> String {
    one_line(&format!(
        r#"{BACKUP} q=$1; ask=$2; b=$3; c=$4; z=$5; shift 5;
        make() {{
            for f in "$@"; do
                qemu-img create -q -f qcow2 -- "$f" "${{z%% *}}" || {{ rm -f -- "$@"; return 1; }};
                z=${{z#* }};
            done;
        }};
        thaw() {{
            for t in 1 2 3 4 5 6; do vir domfsthaw "$v" >/dev/null 2>&1 && return 0; sleep 1; done;
            echo "the file systems of the guest may still be frozen: virsh domfsthaw $v" >&2;
            return 1;
        }};
        room "$@" || {{ echo "beside $f are $k KiB free, and $floor are to be left" >&2; exit {NO_SPACE}; }};
        x=$(mktemp -d) || exit 70;
        printf "%s" "$b" >"$x/b"; [ -z "$c" ] || {{ printf "%s" "$c" >"$x/c"; c=$x/c; }};
        said() {{ grep -q "$1" "$x/o"; }};
        if [ "$q" = off ]; then :; else
            vir qemu-agent-command --timeout 5 "$v" "$ask" >"$x/o" 2>"$x/e";
            if said thawed; then :;
            elif [ "$q" = auto ]; then q=off;
            else cat "$x/o" "$x/e" >&2; rm -rf "$x"; exit {NOT_FROZEN};
            fi;
        fi;
        now="backup-begin $v $x/b $c";
        if make "$@" >/dev/null 2>&1; then now="$now --reuse-external"; fi;
        [ "$q" = off ] || now="domfsfreeze $v; $now; domfsthaw $v";
        timeout -s KILL 20 virsh -c "$u" "$now" >"$x/o" 2>"$x/e"; k=$?;
        r=0; frozen=;
        if [ "$q" = off ]; then :; else
            said "Froze " && frozen=yes;
            if [ "$frozen" ] || [ $k -ge 124 ]; then said "Thawed " || thaw || r=71; fi;
            [ "$frozen" ] || [ "$q" = auto ] || r={NOT_FROZEN};
        fi;
        said "Backup started" || [ $r -ne 0 ] || r=71;
        cat "$x/e" >&2; rm -rf "$x";
        t=0; until [ $k -lt 124 ] || [ $t -ge 40 ] || ours; do t=$((t + 1)); sleep 1; done;
        if [ $r -ne 0 ]; then end "$@"; exit $r; fi;
        [ -z "$frozen" ] || {{ echo; echo kvm-clone-frozen; }};
        exit 0"#
    ))
}

/// Ends the job, and says so, when too little space is left for what the guest overwrites. Ends
/// with the socket.
pub(in crate::host) fn watch() -> String {
    one_line(&format!(
        r#"{BACKUP}
        while [ -S "$s" ] && sleep 0.2 >/dev/null; do
            room "$@" || {{ echo; echo kvm-clone-full; end "$@" >/dev/null; exit 0; }};
        done"#
    ))
}

/// Ends the job.
pub(in crate::host) fn end_backup() -> String {
    one_line(&format!(r#"{BACKUP} end "$@""#))
}

/// Tries a backup job, which takes what [`backup`] takes, with a VM that is made for it and taken
/// away, as is its disk: `$1` is its name, `$4` and `$5` are the XML of the two, `$6` is the path of the
/// disk, and then come the scratch files. What a guest's processor would do does not matter.
pub(in crate::host) fn try_backup() -> String {
    one_line(&format!(
        r#"{BACKUP} m=$1; b=$2; i=$3; shift 3;
        x=$(mktemp -d) || exit 70;
        printf "%s" "$m" >"$x/m"; printf "%s" "$b" >"$x/b";
        qemu-img create -q -f qcow2 "$i" 1M && vir create --paused "$x/m" >/dev/null && vir backup-begin "$v" "$x/b" >/dev/null;
        r=$?;
        end "$@" || r=71; vir destroy "$v" >/dev/null 2>&1; rm -rf "$x" "$i";
        exit $r"#
    ))
}

/// Says which process of QEMU the VM of the name `$0` is: its number, when it started, and since
/// which boot of the host.
pub(in crate::host) fn process() -> String {
    one_line(
        r#"p=$(cat "/run/libvirt/qemu/$0.pid") && t=$(sed "s/.*) //" "/proc/$p/stat" | cut -d " " -f 20) &&
        [ "$t" ] && read -r b </proc/sys/kernel/random/boot_id && echo "$p started at $t in $b""#,
    )
}
