//! File systems inside images, shown on the host, and nothing written to them.

use super::one_line;

/// What both scripts share. `$0` is the directory below which they are shown. `end` takes all of it
/// away; who is still in one of them keeps that, and no more.
const SHOWN: &str = r#"
    umask 077; d=$0;
    serves() { [ "$p" ] && grep -qF -- "$d" "/proc/$p/cmdline" 2>/dev/null; };
    end() {
        for m in $(ls -A "$d" 2>/dev/null); do
            [ -d "$d/$m" ] || continue;
            umount "$d/$m" 2>/dev/null || umount -l "$d/$m" 2>/dev/null;
            rmdir "$d/$m" || return 1;
        done;
        for m in $(ls -A "$d" 2>/dev/null); do
            case $m in (*.pid) ;; (*) continue ;; esac;
            p=; read -r p <"$d/$m";
            serves && kill "$p" 2>/dev/null;
            t=0; while serves; do [ $t -lt 100 ] || return 1; t=$((t + 1)); sleep 0.1; done;
            umount -l "$d/${m%.pid}.raw" 2>/dev/null;
        done;
        rm -f -- "$d"/* && rmdir "$d";
    };
    show() {
        y=$(blkid -p -O "$2" ${3:+-S "$3"} -o value -s TYPE "$s" 2>/dev/null) && [ "$y" ] || return 0;
        case $y in (ext*) o=,noload ;; (xfs) o=,norecovery,nouuid ;; (*) o= ;; esac;
        mkdir "$d/$1" || return 1;
        o=ro,loop,nodev,nosuid,noexec,offset=$2${3:+,sizelimit=$3}$o;
        if mount -t "$y" -o "$o" "$s" "$d/$1" 2>/dev/null; then
            echo "$1 $y shown" >>"$d/list";
        else
            rmdir "$d/$1"; echo "$1 $y no" >>"$d/list";
        fi;
    };
"#;

/// Shows the file systems of each three words that follow: the name of the disk, its image as options
/// for `qemu-storage-daemon`, or nothing for a raw file, and the path of that. What is found is in
/// `list`: name, type, and whether the host could mount it. All is there until [`end_mount`].
pub(in crate::host) fn mount() -> String {
    one_line(&format!(
        r#"{SHOWN}
        mkdir -p -- "${{d%/*}}" && mkdir -- "$d" || exit 70;
        : >"$d/list";
        while [ $# -gt 0 ]; do
            s=$d/$1.raw;
            if [ "$2" ]; then
                : >"$s";
                qemu-storage-daemon --daemonize --pidfile "$d/$1.pid" --blockdev "$2,node-name=n,read-only=on"
                    --export "type=fuse,id=e,node-name=n,mountpoint=$s,writable=off" >/dev/null
                    || {{ end; exit 71; }};
            else
                ln -s -- "$3" "$s";
            fi;
            partx -g -b -o NR,START,SECTORS "$s" >"$d/$1.parts" 2>/dev/null;
            if [ -s "$d/$1.parts" ]; then
                while read -r n a c; do
                    show "$1$n" $((a * 512)) $((c * 512)) || {{ end; exit 72; }};
                done <"$d/$1.parts";
            else
                show "$1" 0 "" || {{ end; exit 72; }};
            fi;
            shift 3;
        done;
        exit 0"#
    ))
}

/// Takes them away.
pub(in crate::host) fn end_mount() -> String {
    one_line(&format!("{SHOWN} end"))
}
