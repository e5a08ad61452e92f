//! `doctor`: everything that a transfer needs on a host, each checked, each failure with what to
//! do about it.

use serde::Serialize;

use super::{App, combined, side_by_side};
use crate::agent_binary;
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{DEFAULT_INSTALL_PATH, Facts, Host};
use crate::libvirt::Hypervisor;
use crate::output;
use crate::transfer::{Abilities, Choice, direct};
use crate::vm;

/// Below this much free space there is hardly room for a disk.
const LITTLE_SPACE: u64 = 1 << 30;

/// Clocks that differ by more than this make logs and schedules hard to read side by side.
const CLOCK_TOLERANCE_SECONDS: u64 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Failure,
}

/// One line of the examination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    /// Who has to act, for a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<ErrorCode>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            detail: detail.into(),
            hint: None,
            code: None,
        }
    }

    fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            status: Status::Warning,
            hint: Some(hint.into()),
            ..Self::ok(name, detail)
        }
    }

    fn failure(
        name: &'static str,
        code: ErrorCode,
        detail: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Failure,
            code: Some(code),
            ..Self::warning(name, detail, hint)
        }
    }
}

#[derive(Debug, Serialize)]
struct Examination {
    host: String,
    success: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct Report {
    operation: &'static str,
    success: bool,
    hosts: Vec<Examination>,
    /// For two hosts: what a first copy from one to the other would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<Choice>,
}

pub(super) async fn run(app: &App, specs: Vec<HostSpec>) -> Result<()> {
    let libvirt = app.connect().to_owned();
    let hosts: Vec<Host> = specs.iter().map(|spec| app.host(spec)).collect();
    let n_hosts = hosts.len();
    let examine = |host: Host| {
        let libvirt = libvirt.clone();
        async move {
            Ok(match host.facts(&libvirt).await {
                Ok(facts) => {
                    let mut checks = reached(&host, &facts, &libvirt);
                    if facts.libvirt.0 {
                        checks.push(snapshot(&Hypervisor::new(host, libvirt)).await);
                    }
                    (checks, Some(facts))
                }
                Err(error) => (unreached(&error), None),
            })
        }
    };
    let (mut examinations, mut errors, mut known) = (Vec::new(), Vec::new(), Vec::new());
    for (host, checks) in side_by_side(hosts, examine).await {
        let (checks, facts) = checks?;
        known.extend(facts.map(|facts| (host.clone(), facts)));
        let failed = checks.iter().find(|check| check.status == Status::Failure);
        examinations.push(Examination {
            host: host.to_string(),
            success: failed.is_none(),
            checks: checks.clone(),
        });
        if let Some(error) = failed.and_then(to_error) {
            errors.push((host, error));
        }
    }
    let report = Report {
        operation: "doctor",
        success: errors.is_empty(),
        hosts: examinations,
        method: method(&known).await,
    };
    output::print(&report, app.format(), || text(&report))?;
    combined(errors, n_hosts)
}

/// The method that `auto` would take for a disk that the second host does not have.
async fn method(known: &[(Host, Facts)]) -> Option<Choice> {
    let [(from, source), (to, destination)] = known else {
        return None;
    };
    let cannot = |(host, facts): &(Host, Facts)| {
        let foreign = agent_binary::for_machine(&host.to_string(), &facts.machine).err();
        let reason = foreign.map(|error| error.one_line());
        reason.or_else(|| {
            facts
                .cache
                .is_none()
                .then(|| format!("{host} has no place for the agent"))
        })
    };
    let abilities = Abilities {
        direct: direct(from, to).await,
        no_agent: known.iter().find_map(cannot),
        scp: !source.scp.is_empty() && !destination.scp.is_empty(),
        rsync: !source.rsync.is_empty() && !destination.rsync.is_empty(),
    };
    abilities.first_copy()
}

fn to_error(check: &Check) -> Option<Error> {
    let error = Error::new(check.code?, format!("{}: {}", check.name, check.detail));
    Some(match &check.hint {
        Some(hint) => error.hint(hint),
        None => error,
    })
}

/// How far the way to the host leads.
fn unreached(error: &Error) -> Vec<Check> {
    let failure = |name| {
        Check::failure(
            name,
            error.code(),
            error.one_line(),
            error.hint_text().unwrap_or("see the message above"),
        )
    };
    let reach = Check::ok("reach", "answers");
    let key = Check::ok("host key", "known");
    match error.code() {
        ErrorCode::HostKey => vec![reach, failure("host key")],
        ErrorCode::Auth => vec![reach, key, failure("login")],
        ErrorCode::MissingRequirement => {
            vec![reach, key, Check::ok("login", "accepted"), failure("shell")]
        }
        _ => vec![failure("reach")],
    }
}

fn reached(host: &Host, facts: &Facts, libvirt: &str) -> Vec<Check> {
    let mut checks = vec![
        Check::ok(
            "reach",
            if host.is_local() {
                "this machine"
            } else {
                "answers"
            },
        ),
        Check::ok(
            "host key",
            if host.is_local() {
                "not needed"
            } else {
                "known"
            },
        ),
        Check::ok("login", format!("as {}", facts.user)),
    ];
    checks.extend(sudo(host, facts));
    checks.extend([shell(facts), architecture(host, facts), cache(facts)]);
    checks.push(tool("rsync", &facts.rsync));
    checks.push(tool("scp", &facts.scp));
    checks.push(virsh(facts, libvirt));
    checks.extend([space(facts), unfinished(host, facts), clock(facts)]);
    checks
}

fn sudo(host: &Host, facts: &Facts) -> Option<Check> {
    let (works, said) = facts.sudo.as_ref()?;
    if *works {
        return Some(Check::ok("sudo", format!("runs {said}")));
    }
    Some(Check::failure(
        "sudo",
        ErrorCode::MissingRequirement,
        said,
        format!(
            "put the agent there with \"kvm-clone-ctl agent install {host}\", and let sudoers allow it: \
             USER ALL=(root) NOPASSWD: {DEFAULT_INSTALL_PATH}"
        ),
    ))
}

fn shell(facts: &Facts) -> Check {
    if facts.noise.is_empty() {
        return Check::ok("shell", "prints nothing by itself");
    }
    let start: String = facts.noise.chars().take(64).collect();
    Check::warning(
        "shell",
        format!("prints something by itself: \"{}\"", start.escape_debug()),
        "blocksync copes with it, scp and rsync do not: let the login script print only to terminals",
    )
}

fn architecture(host: &Host, facts: &Facts) -> Check {
    match agent_binary::for_machine(&host.to_string(), &facts.machine) {
        Ok(_) => Check::ok("architecture", &facts.machine),
        Err(error) => Check::failure(
            "architecture",
            error.code(),
            error.to_string(),
            error.hint_text().unwrap_or_default(),
        ),
    }
}

fn cache(facts: &Facts) -> Check {
    let tried = facts.tried.join("; ");
    match &facts.cache {
        Some(directory) if tried.is_empty() => Check::ok("cache directory", directory),
        Some(directory) => Check::warning(
            "cache directory",
            format!("{directory} ({tried})"),
            "the agent goes there; nothing need be done unless that place is emptied now and then",
        ),
        None => Check::failure(
            "cache directory",
            ErrorCode::MissingRequirement,
            format!("none takes the agent: {tried}"),
            "give the user one that is not mounted noexec (XDG_CACHE_HOME), or use --agent-path",
        ),
    }
}

fn tool(name: &'static str, path: &str) -> Check {
    if path.is_empty() {
        Check::warning(
            name,
            "not there",
            format!("blocksync does not need it; other methods do: install {name}"),
        )
    } else {
        Check::ok(name, path)
    }
}

fn virsh(facts: &Facts, libvirt: &str) -> Check {
    match (&facts.libvirt, facts.virsh.as_str()) {
        (_, "") => tool("virsh", ""),
        ((true, _), path) => Check::ok("virsh", format!("{path}, reaches {libvirt}")),
        ((false, said), path) => Check::warning(
            "virsh",
            format!("{path} does not reach {libvirt}: {said}"),
            "single disks do not need it; for VMs start libvirtd, or add the user to the group libvirt",
        ),
    }
}

/// Whether a VM that runs can be copied as it is at one instant.
async fn snapshot(on: &Hypervisor) -> Check {
    const NAME: &str = "snapshot of a running VM";
    let probe = match vm::probe(on).await {
        Ok(Some(probe)) => probe,
        Ok(None) => return Check::ok(NAME, "not tried: there is no directory for images"),
        Err(error) => {
            let hint = error.hint_text().unwrap_or("see the message");
            return Check::warning(NAME, error.one_line(), hint);
        }
    };
    let under = match &probe.confined_by[..] {
        [] => "nothing confines QEMU".to_owned(),
        models => format!("under {}", models.join(" and ")),
    };
    match &probe.denied {
        None => Check::ok(NAME, format!("works, {under}")),
        Some(why) => Check::warning(NAME, format!("does not work, {under}: {why}"), probe.hint()),
    }
}

fn space(facts: &Facts) -> Check {
    match &facts.free {
        Some((bytes, directory)) if *bytes < LITTLE_SPACE => Check::warning(
            "free space",
            format!("only {} in {directory}", output::iec(*bytes)),
            "make room before this host becomes a destination",
        ),
        Some((bytes, directory)) => Check::ok(
            "free space",
            format!("{} in {directory}", output::iec(*bytes)),
        ),
        None => Check::warning(
            "free space",
            "unknown",
            "df is missing on the host, or says something else",
        ),
    }
}

fn unfinished(host: &Host, facts: &Facts) -> Check {
    let name = "unfinished runs";
    match facts.unfinished {
        0 => Check::ok(name, "none"),
        n => Check::warning(
            name,
            format!("{n} are under way, or broke off"),
            format!("\"kvm-clone-ctl recover {host}\" ends those that broke off, and no others"),
        ),
    }
}

fn clock(facts: &Facts) -> Check {
    let Some(ahead) = facts.clock_ahead else {
        return Check::warning(
            "clock",
            "unknown",
            "date is missing on the host, or knows no +%s",
        );
    };
    let (off, error) = (ahead.unsigned_abs(), facts.clock_error.as_secs());
    if off <= CLOCK_TOLERANCE_SECONDS + error {
        return Check::ok("clock", format!("agrees within {} s", off.max(error)));
    }
    let direction = if ahead > 0 { "ahead" } else { "behind" };
    Check::warning(
        "clock",
        format!("{off} s {direction} of this machine's"),
        "let both keep time with chrony or ntpd",
    )
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for examination in &report.hosts {
        text += &format!("{}\n", examination.host);
        for check in &examination.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Warning => "warning",
                Status::Failure => "FAILURE",
            };
            text += &format!(
                "  {status:<8} {:<16} {}\n",
                check.name,
                check.detail.replace('\n', "\n    ")
            );
            if let Some(hint) = &check.hint {
                text += &format!("{:28}-> {hint}\n", "");
            }
        }
    }
    if let Some(Choice { method, reason }) = &report.method {
        text += &format!("method    {}: {reason}\n", method.name());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            machine: "x86_64".into(),
            user: "root 0".into(),
            clock_ahead: Some(0),
            cache: Some("/root/.cache/kvm-clone".into()),
            free: Some((1 << 40, "/".into())),
            ..Facts::default()
        }
    }

    fn examine(facts: &Facts) -> Vec<Check> {
        reached(
            &Host::new("hv1".parse().unwrap(), std::sync::Arc::default()),
            facts,
            "qemu:///system",
        )
    }

    #[test]
    fn what_blocksync_does_not_need_is_a_warning_only() {
        let checks = examine(&facts());
        assert!(
            checks.iter().all(|check| check.status != Status::Failure),
            "{checks:?}"
        );
        for name in ["rsync", "scp", "virsh"] {
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.status, Status::Warning);
            assert!(check.hint.is_some());
        }
    }

    #[test]
    fn each_thing_that_is_wrong_is_seen() {
        let broken = [
            (
                Facts {
                    machine: "riscv64".into(),
                    ..facts()
                },
                "architecture",
                Status::Failure,
            ),
            (
                Facts {
                    cache: None,
                    tried: vec!["/a: is mounted noexec".into()],
                    ..facts()
                },
                "cache directory",
                Status::Failure,
            ),
            (
                Facts {
                    sudo: Some((false, "a password is required".into())),
                    ..facts()
                },
                "sudo",
                Status::Failure,
            ),
            (
                Facts {
                    noise: "Welcome!".into(),
                    ..facts()
                },
                "shell",
                Status::Warning,
            ),
            (
                Facts {
                    clock_ahead: Some(-3600),
                    ..facts()
                },
                "clock",
                Status::Warning,
            ),
            (
                Facts {
                    free: Some((1, "/".into())),
                    ..facts()
                },
                "free space",
                Status::Warning,
            ),
            (
                Facts {
                    unfinished: 1,
                    ..facts()
                },
                "unfinished runs",
                Status::Warning,
            ),
        ];
        for (facts, name, status) in broken {
            let checks = examine(&facts);
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.status, status, "{check:?}");
            assert_eq!(check.code.is_some(), status == Status::Failure);
            assert!(check.hint.as_ref().is_some_and(|hint| !hint.is_empty()));
        }
    }

    #[test]
    fn the_way_to_a_host_fails_at_one_step() {
        for (code, name, n_checks) in [
            (ErrorCode::HostUnreachable, "reach", 1),
            (ErrorCode::HostKey, "host key", 2),
            (ErrorCode::Auth, "login", 3),
        ] {
            let checks = unreached(&Error::new(code, "x").hint("y"));
            assert_eq!(checks.len(), n_checks);
            let last = checks.last().unwrap();
            assert_eq!((last.name, last.code), (name, Some(code)));
        }
    }
}
