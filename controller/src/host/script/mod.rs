//! The shell text that runs on a host, all of it.
//!
//! A login shell may be anything, so every script goes to `sh -c` as one word. It is written for
//! dash and busybox, needs only `cat chmod mv mkdir uname ls rm id wc`, and holds no newline,
//! single quote, backslash, `!` or `^`, which csh would read in its own way even between quotes.
//! Values get in through `quote`, or are numbers and names of our own making.
//!
//! A script speaks in lines that start with `kvm-clone-`; whatever a login shell printed before
//! them is noise. Ahead of the first such line goes an empty one, because noise need not end with
//! a newline.

use crate::error::Result;
use crate::host::quote;

pub(super) mod live;
pub(super) mod mount;
pub(super) mod nbd;

/// Ahead of a line that names the agent that is started next.
pub(super) const AT: &[u8] = b"\nkvm-clone-at ";
/// Ahead of the machine's name, when there is no agent yet.
pub(super) const NEED: &[u8] = b"\nkvm-clone-need ";
/// Ahead of the reason why an agent is not run.
pub(super) const REFUSED: &[u8] = b"\nkvm-clone-refused ";
/// Ahead of a candidate directory and why it does not do.
pub(super) const TRIED: &[u8] = b"\nkvm-clone-tried ";
/// Ahead of the number of the candidate and the path that is being written.
pub(super) const TEMPORARY: &[u8] = b"\nkvm-clone-tmp ";
/// After it come the bytes that were written.
pub(super) const BACK: &[u8] = b"\nkvm-clone-back\n";
/// All went well.
pub(super) const DONE: &[u8] = b"\nkvm-clone-done";
/// Ahead of a key and a value for `doctor`.
pub(super) const FACT: &[u8] = b"\nkvm-clone-fact ";
/// Ahead of a file that was removed.
pub(super) const REMOVED: &[u8] = b"\nkvm-clone-removed ";
/// Ahead of a file that could not be removed.
pub(super) const KEPT: &[u8] = b"\nkvm-clone-kept ";

/// Says that the login works, and stays until its standard input ends.
pub(super) const STAY: &str = "echo; echo kvm-clone-done; exec cat >/dev/null";

/// Candidates for the cache directory, in the order in which they are tried.
pub(super) const CANDIDATES: usize = 4;

/// What several scripts share.
///
/// `look` reads type and mode, links, owner and size of a path that is no symbolic link, and holds
/// where this user owns it. `private_dir` and `private_file` hold for what only this user can have
/// made: an appended `+` or `.` may follow the mode, and with no bits for the group, entries of an
/// access list have no effect; a file with a second name may have been made for something else.
/// `close_dir` takes from others what they may do in a directory of this user.
///
/// `alone` holds where root and this user own all that a path leads through, and nobody else can
/// put something in its place. What it says of a path holds until one of the two changes it, so
/// that nothing can slip in between a look and the act that follows. Group-writable is not good
/// enough, as it is not for sshd: who is in a group, nothing that is here for sure can tell.
///
/// `safe` asks that of the candidate `$c` and of what `$c` is behind all links, which it makes `$c`.
/// The two under shared parents must themselves be private: their names are known to everybody.
const PRELUDE: &str = r#"
    set -f; umask 077; LC_ALL=C; export LC_ALL; u=$(id -u);
    say() { printf "%s" "$1"; echo; };
    look() {
        [ -h "$1" ] && return 1;
        set -- $(ls -ldn "$1" 2>/dev/null);
        mode=$1; links=$2; size=$5;
        [ "$3" = "$u" ];
    };
    private_dir() {
        look "$1" || return 1;
        case $mode in (drwx------*) return 0 ;; esac;
        return 1;
    };
    close_dir() { private_dir "$1" || { look "$1" && chmod u=rwx,go=,g-s "$1" && private_dir "$1"; }; };
    private_file() {
        look "$1" && [ "$links" = 1 ] && [ "$size" = "$s" ] || return 1;
        case $mode in (-rwx------*) return 0 ;; esac;
        return 1;
    };
    alone() {
        p=$1; set --;
        while [ "$p" ]; do set -- "$@" "$p"; p=${p%/*}; done;
        p=$(ls -ldn / "$@" 2>/dev/null | while read -r mode links owner rest; do
            case $owner in (0|"$u") ;; (*) echo no ;; esac;
            case $mode in (l*|?????????[tT]*) ;; (?????w*|????????w*) echo no ;; esac;
        done);
        [ -z "$p" ];
    };
    candidate() {
        case $1 in
            1) c=${XDG_CACHE_HOME:-} ;;
            2) c=${HOME:+$HOME/.cache} ;;
            3) c=/var/tmp/kvm-clone-$u ;;
            4) c=/dev/shm/kvm-clone-$u ;;
        esac;
        case $c in *[[:cntrl:]]*) return 1 ;; /*) return 0 ;; esac;
        return 1;
    };
    safe() {
        case $c in (/var/tmp/kvm-clone-*|/dev/shm/kvm-clone-*) private_dir "$c" || return 1 ;; esac;
        alone "$c" || return 1;
        r=$(cd -P "$c" 2>/dev/null && pwd -P) || return 1;
        case $r in (*[[:cntrl:]]*) return 1 ;; esac;
        [ "$r" = "$c" ] || alone "$r" || return 1;
        c=$r;
    };
"#;

/// `usable`: makes the directory for the agent under `$c` and proves that a file in it can be
/// executed; else says why not. Leaves the file `$t`.
const USABLE: &str = r#"
    why() { say "kvm-clone-tried $c: $1"; return 1; };
    usable() {
        e=$c; until [ -e "$e/" ]; do e=${e%/*}; done;
        alone "$e" || why "is not safe from other users" || return 1;
        [ -d "$c" ] || mkdir -p "$c" 2>/dev/null || [ -d "$c" ] || why "cannot be made" || return 1;
        safe || why "is not safe from other users" || return 1;
        d=$c/kvm-clone; t=$d/$x;
        [ -d "$d" ] || mkdir "$d" 2>/dev/null || [ -d "$d" ] || why "cannot be written" || return 1;
        close_dir "$d" || why "has a kvm-clone in it that is not a directory of this user" || return 1;
        ( echo "exit 0" >"$t" ) 2>/dev/null || { rm -f "$t"; why "cannot be written"; return 1; };
        chmod 0700 "$t";
        ( "$t" ) </dev/null >/dev/null 2>&1 || { rm -f "$t"; why "is mounted noexec"; return 1; };
    };
"#;

/// `bad`, and `only_root`, which lets a path pass that nobody but root can have a say in.
const ROOT_PRELUDE: &str = r#"
    bad() { echo; say "kvm-clone-refused $1"; exit 77; };
    only_root() {
        p=$1;
        while :; do
            [ -h "$p" ] && bad "$p is a symbolic link";
            set -- $(ls -ldn "$p" 2>/dev/null);
            [ -n "$1" ] || bad "$p does not exist";
            [ "$3" = 0 ] || bad "$p does not belong to root";
            case $1 in ?????w*|????????w*) bad "$p can be written by others than root" ;; esac;
            [ "$p" = / ] && break;
            p=${p%/*}; [ -n "$p" ] || p=/;
        done;
    };
"#;

/// An agent that may be there.
#[derive(Debug)]
pub(super) struct Findable {
    /// What `uname -m` says where it runs: letters, digits and `_`.
    pub(super) machines: Vec<&'static str>,
    /// The name of its file.
    pub(super) name: String,
    /// Bytes.
    pub(super) size: usize,
}

/// Starts the agent for this machine where it is found; else says `NEED`, and starts what it is told on
/// its standard input. Without `search` it does not look.
pub(super) fn start(agents: &[Findable], search: bool) -> String {
    let cases: String = agents
        .iter()
        .map(|agent| {
            let machines = agent.machines.join("|");
            format!("({machines}) n={}; s={} ;; ", agent.name, agent.size)
        })
        .collect();
    let candidates = if search { "1 2 3 4" } else { "" };
    one_line(&format!(
        r#"{PRELUDE} n=; s=; m=$(uname -m);
        case $m in {cases} esac;
        for k in {candidates}; do
            [ "$n" ] && candidate $k && safe && f=$c/kvm-clone/$n || continue;
            if private_dir "$c/kvm-clone" && private_file "$f"; then
                echo; say "kvm-clone-at direct $f"; exec "$f" serve;
            fi;
        done;
        echo; echo "kvm-clone-need $m";
        IFS= read -r f && exec "$f" serve"#
    ))
}

/// Starts the agent at `path` as the user that is logged in.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn start_given(path: &[u8]) -> Result<String> {
    Ok(one_line(&format!(
        r#"{PRELUDE} {ROOT_PRELUDE} f={path};
        [ -f "$f" ] || bad "$f is not there";
        [ -x "$f" ] || bad "$f cannot be executed by this user";
        echo; say "kvm-clone-at direct $f"; exec "$f" serve"#,
        path = word(path)?
    )))
}

/// Starts the agent at `path` as root, if nobody else can have put it there.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn start_as_root(path: &[u8]) -> Result<String> {
    Ok(one_line(&format!(
        r#"{PRELUDE} {ROOT_PRELUDE} f={path};
        [ -f "$f" ] || bad "$f is not there";
        only_root "$f";
        if [ "$u" = 0 ]; then echo; say "kvm-clone-at direct $f"; exec "$f" serve; fi;
        echo; say "kvm-clone-at sudo $f"; exec sudo -n "$f" serve"#,
        path = word(path)?
    )))
}

/// Writes standard input to the temporary name `temporary` in the first candidate directory, from
/// number `from` on, in which a file can be executed, and gives it back on standard output.
pub(super) fn upload(temporary: &str, size: usize, from: usize) -> String {
    one_line(&format!(
        r#"{PRELUDE} x={temporary}; s={size}; k={from};
        {USABLE}
        echo;
        while [ $k -le {CANDIDATES} ]; do
            if candidate $k && usable; then
                say "kvm-clone-tmp $k $t";
                cat >"$t" && [ $(wc -c <"$t") -eq $s ] || {{ rm -f "$t"; why "has no room"; exit 75; }};
                echo kvm-clone-back; cat "$t" || rm -f "$t";
                exit 0;
            fi;
            k=$((k + 1));
        done;
        exit 73"#
    ))
}

/// Says what `doctor` asks for: lines of `FACT`, a key and a value. Takes nothing for granted that
/// the agent does not need.
///
/// # Errors
/// For a value that cannot be quoted.
pub(super) fn facts(temporary: &str, libvirt: &str, root_agent: Option<&[u8]>) -> Result<String> {
    let sudo = match root_agent {
        None => String::new(),
        Some(path) => format!(
            r#"f={};
            r=$( [ -f "$f" ] || bad "$f is not there"; only_root "$f" );
            if [ -n "$r" ]; then fact sudo "$r";
            else
                if [ "$u" = 0 ]; then r=$("$f" --version 2>&1); else r=$(sudo -n "$f" --version 2>&1); fi;
                fact sudo "kvm-clone-$? $(echo $r)";
            fi;"#,
            word(path)?
        ),
    };
    Ok(one_line(&format!(
        r#"{PRELUDE} {USABLE} {ROOT_PRELUDE} x={temporary};
        fact() {{ say "kvm-clone-fact $1 $2"; }};
        echo;
        fact machine "$(uname -m)"; fact time "$(date +%s 2>/dev/null)"; fact user "$(id -un) $u";
        for p in rsync scp virsh; do fact "$p" "$(command -v $p 2>/dev/null)"; done;
        r=$(command -v virsh >/dev/null 2>&1 && virsh -q -c {libvirt} version 2>&1 </dev/null);
        fact libvirt "$? $(echo $r)";
        k=1; d=;
        while [ $k -le {CANDIDATES} ]; do
            if candidate $k && usable; then rm -f "$t"; fact cache "$d"; break; fi;
            k=$((k + 1));
        done;
        p=/var/lib/libvirt/images; [ -d "$p" ] || p=/;
        r=$(df -Pk "$p" 2>/dev/null | {{ read -r h; read -r l; echo "$l"; }});
        set -- $r; fact free "${{4:-}} $p";
        case $u in (0) p=/var/lib/kvm-clone ;; (*) p=${{XDG_STATE_HOME:-$HOME/.local/state}}/kvm-clone ;; esac;
        fact unfinished "$(for d in runs clones held; do ls "$p/$d" 2>/dev/null; done |
            while read -r l; do case $l in (*.run|*.json) echo ;; esac; done | wc -l)";
        {sudo}
        fact end """#,
        libvirt = word(libvirt.as_bytes())?
    )))
}

/// `place`: gives the file `$t` the name `$f`, whatever bore it before, or removes it. A link to a
/// directory, or a directory, would have `mv` put it in there.
const PLACE: &str = r#"
    place() {
        [ -h "$f" ] && rm -f "$f";
        if [ -d "$f" ]; then echo "$f is a directory" >&2;
        elif chmod "$1" "$t" && mv -f "$t" "$f"; then echo; echo kvm-clone-done; return;
        fi;
        rm -f "$t"; return 1;
    };
"#;

/// Makes the uploaded file the agent.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn place(temporary: &[u8], path: &[u8]) -> Result<String> {
    Ok(one_line(&format!(
        "{PLACE} t={}; f={}; place 0700",
        word(temporary)?,
        word(path)?
    )))
}

/// Removes an upload that did not arrive as it was sent.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn discard(temporary: &[u8]) -> Result<String> {
    Ok(format!("rm -f {}", word(temporary)?))
}

/// What [`remove`] leaves alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spared<'a> {
    /// The names of agents.
    pub(super) agents: &'a [String],
    /// Uploads that began after this second of the Unix epoch, as their names tell.
    pub(super) uploads_after: i64,
}

/// Removes the agents of ours, and what broken uploads left; where nothing is spared, also the
/// directories that are empty then.
pub(super) fn remove(spared: Option<Spared<'_>>) -> String {
    let agents = spared.iter().flat_map(|spared| spared.agents);
    let spared_names: Vec<String> = agents.map(|name| format!("*/{name}")).collect();
    let (spare, tidy) = match spared {
        // What is no number fails the comparison, and is not spared.
        Some(spared) => (
            format!(
                r#"case $f in
                    ({}) continue ;;
                    (*/.agent.*) b=${{f##*/.agent.}}; [ "${{b%%.*}}" -gt {} ] 2>/dev/null && continue ;;
                esac;"#,
                spared_names.join("|"),
                spared.uploads_after
            ),
            "",
        ),
        None => (
            String::new(),
            r#"rmdir "$d" 2>/dev/null; case $k in 3|4) rmdir "$c" 2>/dev/null ;; esac;"#,
        ),
    };
    one_line(&format!(
        r#"{PRELUDE}
        echo;
        for k in 1 2 3 4; do
            candidate $k && d=$c/kvm-clone && [ -d "$d" ] || continue;
            safe && d=$c/kvm-clone && close_dir "$d" || {{ say "kvm-clone-kept $d"; continue; }};
            set +f;
            for f in "$d"/agent-* "$d"/.agent.*; do
                [ -f "$f" ] || [ -h "$f" ] || continue;
                {spare}
                if rm -f "$f"; then say "kvm-clone-removed $f"; else say "kvm-clone-kept $f"; fi;
            done;
            set -f;
            {tidy}
        done;
        echo kvm-clone-done"#
    ))
}

/// The status with which an errand tells that its own ssh failed: 255 would be ours.
pub(super) const NESTED_SSH_FAILED: i32 = 254;

/// Runs a quoted command that ends with standard input: when that ends, so does the command, with
/// all that it started. `known_hosts` are lines that it finds in the file `$k`, which has no name
/// by then, so that nothing is left of it.
///
/// # Errors
/// For a line that cannot be quoted.
pub(super) fn errand(command: &str, known_hosts: &[u8]) -> Result<String> {
    let mut lines = String::new();
    for line in known_hosts
        .split(|byte| *byte == b'\n')
        .filter(|line| line.len() > 1)
    {
        lines = lines + " " + &word(line)?;
    }
    Ok(one_line(&format!(
        r#"umask 077; k=$(mktemp) || exit 70;
        for l in{lines}; do printf "%s" "$l"; echo; done >"$k";
        exec 9<"$k"; rm -f "$k"; k=/proc/$$/fd/9;
        exec 8<&0;
        {command} </dev/null 8<&- & p=$!;
        ( cat <&8 >/dev/null; kill $p ) >/dev/null 2>&1 9<&- & w=$!;
        wait $p; r=$?;
        kill $w 2>/dev/null;
        [ $r -ne 255 ] || r={NESTED_SSH_FAILED};
        exit $r"#
    )))
}

/// Runs `begin`, passes on what it writes, waits for a line or the end of standard input, and runs
/// `undo`; after a line also `forget`. `watch` runs meanwhile, and ends when there is nothing to be
/// watched any more; while what cannot be undone is still watched, nobody listens. All are quoted
/// commands. A hang-up of the login does not keep it from that.
pub(super) fn guard(begin: &str, watch: &str, undo: &str, forget: &str) -> String {
    one_line(&format!(
        r#"trap "" HUP INT TERM PIPE;
        {begin} </dev/null || exit $?;
        echo; echo kvm-clone-done;
        {watch} </dev/null 2>/dev/null | cat & w=$! ;
        l=; IFS= read -r l;
        {undo} >/dev/null </dev/null || {{ kill -KILL $w; exit 71; }};
        [ -z "$l" ] || {forget} </dev/null"#
    ))
}

/// With which [`lock`] says that somebody else has it.
pub(super) const HELD: i32 = 75;

/// Locks the file `$0` until standard input ends. Whoever had it removes it, so that what was
/// locked may not be what has the name by then.
pub(super) fn lock() -> String {
    one_line(&format!(
        r#"trap "" HUP INT TERM PIPE;
        exec 9>>"$0" || exit 70;
        flock -n 9; k=$?;
        case $k in (0) ;; (1) exit {HELD} ;; (*) exit $k ;; esac;
        [ "$0" -ef /dev/fd/9 ] || exit {HELD};
        echo; echo kvm-clone-done;
        cat >/dev/null 9>&-;
        rm -f -- "$0""#
    ))
}

/// Writes standard input beside `path`, which only root may have a say in, and gives it back.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn install_upload(path: &[u8], temporary: &[u8], size: usize) -> Result<String> {
    as_root(&one_line(&format!(
        r#"{PRELUDE} {ROOT_PRELUDE} f={path}; t={temporary}; s={size};
        d=${{f%/*}}; umask 022;
        e=$d; until [ -e "${{e:-/}}" ]; do e=${{e%/*}}; done; only_root "${{e:-/}}";
        [ -z "$d" ] || mkdir -p "$d" || bad "$d cannot be made";
        only_root "${{d:-/}}";
        cat >"$t" && [ $(wc -c <"$t") -eq $s ] || {{ rm -f "$t"; bad "$d cannot be written, or has no room"; }};
        echo; echo kvm-clone-back; cat "$t" || rm -f "$t""#,
        path = word(path)?,
        temporary = word(temporary)?
    )))
}

/// Removes what did not arrive as it was sent.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn install_discard(temporary: &[u8]) -> Result<String> {
    as_root(&discard(temporary)?)
}

/// Gives the installed agent its name.
///
/// # Errors
/// For a path that cannot be quoted.
pub(super) fn install_place(path: &[u8], temporary: &[u8]) -> Result<String> {
    as_root(&one_line(&format!(
        "{PLACE} t={}; f={}; place 0755",
        word(temporary)?,
        word(path)?
    )))
}

/// Runs a script as root: as it is where the login is root, else through `sudo -n`.
fn as_root(script: &str) -> Result<String> {
    let script = word(script.as_bytes())?;
    Ok(format!(
        r#"if [ "$(id -u)" = 0 ]; then exec sh -c {script}; else exec sudo -n sh -c {script}; fi"#
    ))
}

/// A quoted word as text. A path that is not UTF-8 has no place in a script of ours: it would
/// have to survive every login shell on the way.
fn word(bytes: &[u8]) -> Result<String> {
    String::from_utf8(quote::word(bytes)?).map_err(|_| {
        crate::error::Error::usage(format!(
            "the path \"{}\" of the agent is not UTF-8",
            bytes.escape_ascii()
        ))
    })
}

/// Scripts are written over several lines and sent in one.
fn one_line(script: &str) -> String {
    script
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_script_holds_what_csh_would_read_in_its_own_way() {
        let scripts = [
            start(
                &[Findable {
                    machines: vec!["x86_64", "amd64"],
                    name: "agent-1".to_owned(),
                    size: 1,
                }],
                true,
            ),
            start_given(b"/opt/agent").unwrap(),
            start_as_root(b"/opt/agent").unwrap(),
            upload(".agent.1", 1, 1),
            place(b"/a/.agent.1", b"/a/agent-1").unwrap(),
            remove(None),
            remove(Some(Spared {
                agents: &["agent-1".to_owned()],
                uploads_after: 1,
            })),
            facts(".agent.1", "qemu:///system", Some(b"/opt/agent")).unwrap(),
            guard("suspend", "watch", "resume", "rm"),
            lock(),
            live::suspend(),
            live::resume(),
            live::backup(),
            live::watch(),
            live::end_backup(),
            live::try_backup(),
            live::process(),
            nbd::export(),
            nbd::end_export(),
            mount::mount(),
            mount::end_mount(),
        ];
        for script in scripts {
            // An exclamation mark before a space is one for csh as well.
            let script = script.replace("! ", " ");
            assert!(!script.contains(['\'', '\n', '\\', '!', '^']), "{script}");
        }
    }
}
