//! `qemu-nbd`: what a guest would see of an image that no VM has open.

use super::one_line;

/// What both scripts share. `$0` is the directory of the sockets, in which each server's process is
/// noted under its export's name. `end` ends them all: what was written is in the images then.
const SERVERS: &str = r#"
    umask 077; d=$0;
    serves() { [ "$p" ] && grep -qF -- "$d" "/proc/$p/cmdline" 2>/dev/null; };
    end() {
        for f in $(ls -A "$d" 2>/dev/null); do
            case $f in (*.pid) ;; (*) continue ;; esac;
            p=; read -r p <"$d/$f";
            serves && kill "$p" 2>/dev/null;
            t=0; while serves; do [ $t -lt 600 ] || return 1; t=$((t + 1)); sleep 0.1; done;
        done;
        rm -rf -- "$d";
    };
"#;

/// Starts a server for each three words that follow: the name of the export, `r` or `w`, and the
/// image as `qemu-nbd --image-opts` takes it. The two are there until [`end_export`].
pub(in crate::host) fn export() -> String {
    one_line(&format!(
        r#"{SERVERS}
        end && mkdir -p -- "$d" || exit 70;
        while [ $# -gt 0 ]; do
            m=; [ "$2" = w ] || m=--read-only;
            qemu-nbd --fork --persistent --shared=16 $m --discard=unmap --pid-file="$d/$1.pid"
                --socket="$d/$1.sock" --export-name="$1" --image-opts "$3" >/dev/null || {{ end; exit 71; }};
            shift 3;
        done;
        exit 0"#
    ))
}

/// Ends the servers, and removes their directory.
pub(in crate::host) fn end_export() -> String {
    one_line(&format!("{SERVERS} end"))
}
