//! Reading policies: one TOML file holds all of them; all of its mistakes are told at once, each with
//! its line.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;

use jiff::SignedDuration;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use serde::Deserialize;
use toml::{Spanned, Table};

use super::{Hooks, Limits, Notify, Policies, Policy, REPEAT, Window};
use crate::cli::options::{Rate, Space};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::replicate::keep::Keep;
use crate::replicate::schedule::Schedule;
use crate::vm::LiveChoice;
use crate::vm::order::Order;

/// Where replicas lie on a destination that is not told otherwise.
const DIRECTORY: &str = "/var/lib/libvirt/images/kvm-clone";

/// What stays where nothing else is said.
const KEEP: Keep = Keep {
    last: 4,
    hourly: 24,
    daily: 7,
    weekly: 4,
    monthly: 6,
};

/// Bytes that stay free where nothing else is said.
const MIN_FREE: u64 = 1 << 30;

/// Which share of a disk's data may change at once, where nothing else is said.
const MAX_CHANGE: f64 = 0.5;

/// How long a hook may take, where nothing else is said.
const HOOK_LIMIT: SignedDuration = SignedDuration::from_mins(1);

/// The longest name of a policy: it is a part of file names.
const NAME_LEN: usize = 64;

/// Something in the file that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// From 1 on.
    pub line: usize,
    /// What is wrong.
    pub what: String,
    /// What would be right.
    pub remedy: String,
}

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    policy: BTreeMap<Spanned<String>, Written>,
    #[serde(default)]
    limits: WrittenLimits,
    #[serde(default)]
    notify: WrittenNotify,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenLimits {
    per_host: Option<Spanned<i64>>,
    per_link: Option<Spanned<i64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenNotify {
    command: Option<Spanned<String>>,
    mail: Option<Spanned<String>>,
    webhook: Option<Spanned<String>>,
    heartbeat: Option<Spanned<String>>,
    repeat: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    source: Spanned<String>,
    destination: Spanned<String>,
    directory: Option<Spanned<String>>,
    vms: Spanned<Vec<Spanned<String>>>,
    #[serde(default)]
    exclude: Vec<Spanned<String>>,
    every: Option<Spanned<String>>,
    schedule: Option<Spanned<String>>,
    timezone: Option<Spanned<String>>,
    rpo: Spanned<String>,
    keep: Option<Spanned<WrittenKeep>>,
    #[serde(default)]
    not_between: Vec<Spanned<WrittenWindow>>,
    parallel: Option<Spanned<i64>>,
    live: Option<Spanned<String>>,
    quiesce: Option<Spanned<String>>,
    full_scan: Option<Spanned<String>>,
    max_change: Option<Spanned<String>>,
    bandwidth_limit: Option<Spanned<String>>,
    #[serde(default)]
    bandwidth_between: Vec<Spanned<WrittenWindow>>,
    min_free: Option<Spanned<String>>,
    #[serde(default)]
    networks: BTreeMap<String, String>,
    test_network: Option<String>,
    sign_of_life: Option<String>,
    #[serde(default)]
    order: Vec<String>,
    delay: Option<Spanned<String>>,
    fence: Option<String>,
    before: Option<String>,
    after: Option<String>,
    hook_limit: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenKeep {
    last: usize,
    hourly: usize,
    daily: usize,
    weekly: usize,
    monthly: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenWindow {
    from: Spanned<String>,
    to: Spanned<String>,
    days: Option<Spanned<String>>,
    /// Of `bandwidth-between` alone.
    limit: Option<Spanned<String>>,
}

/// Reads all policies of a file.
///
/// # Errors
/// All [`Mistake`]s; of what is no TOML, or no policy at all, the first.
pub fn parse(text: &str) -> Result<Policies, Vec<Mistake>> {
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        vec![Mistake {
            line: line(text, at),
            what: error.message().to_owned(),
            remedy: "\"kvm-clone-ctl replicate init\" writes a file with every key".to_owned(),
        }]
    })?;
    let mut reader = Reader {
        text,
        tables: text.parse().unwrap_or_default(),
        mistakes: Vec::new(),
    };
    let limits = reader.limits(&file.limits);
    let notify = reader.notify(&file.notify);
    let all: Vec<_> = file
        .policy
        .iter()
        .filter_map(|(name, written)| reader.policy(name, written))
        .collect();
    if all.is_empty() && reader.mistakes.is_empty() {
        reader.mistakes.push(Mistake {
            line: 1,
            what: "there is no policy in this file".to_owned(),
            remedy: "begin one with [policy.NAME]".to_owned(),
        });
    }
    reader.mistakes.sort_by_key(|mistake| mistake.line);
    match reader.mistakes.is_empty() {
        true => Ok(Policies {
            all,
            limits,
            notify,
        }),
        false => Err(reader.mistakes),
    }
}

/// Reads the policies of a file.
///
/// # Errors
/// Not found, or usage with all mistakes, each with file, line and what to do.
pub fn load(path: &Path) -> Result<Policies> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let message = format!("there is no file of policies {shown}");
            Error::new(ErrorCode::NotFound, message)
                .hint("\"kvm-clone-ctl replicate init\" writes one, with every key")
        }
        _ => Error::io(format!("reading {shown}"), error),
    })?;
    parse(&text).map_err(|mistakes| {
        let each = mistakes.iter().map(|mistake| {
            let Mistake { line, what, remedy } = mistake;
            format!("{shown}:{line}: {what}\n    -> {remedy}")
        });
        let each: Vec<String> = each.collect();
        let message = match each.len() {
            1 => "the policies hold a mistake".to_owned(),
            several => format!("the policies hold {several} mistakes"),
        };
        Error::usage(message).caused_by(each.join("\n  "))
    })
}

/// The number of the line that holds a byte.
fn line(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or_default();
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

struct Reader<'a> {
    text: &'a str,
    /// The same, as TOML has it.
    tables: Table,
    mistakes: Vec<Mistake>,
}

impl Reader<'_> {
    fn mistake<T>(&mut self, at: &Spanned<T>, what: impl Into<String>, remedy: impl Into<String>) {
        self.mistakes.push(Mistake {
            line: line(self.text, at.span().start),
            what: what.into(),
            remedy: remedy.into(),
        });
    }

    /// A value by its own grammar.
    fn parsed<T, E>(
        &mut self,
        key: &str,
        value: &Spanned<String>,
        remedy: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        match parse(value.get_ref()) {
            Ok(parsed) => Some(parsed),
            Err(_) => {
                let what = format!("{key} = {:?} is not understood", value.get_ref());
                self.mistake(value, what, remedy);
                None
            }
        }
    }

    fn limits(&mut self, written: &WrittenLimits) -> Limits {
        let default = Limits::default();
        let mut limit = |key: &str, written: &Option<Spanned<i64>>, default| {
            let given = written.as_ref();
            given
                .and_then(|given| self.at_once(key, given))
                .unwrap_or(default)
        };
        Limits {
            host: limit("per-host", &written.per_host, default.host),
            link: limit("per-link", &written.per_link, default.link),
        }
    }

    fn notify(&mut self, written: &WrittenNotify) -> Notify {
        let text = |text: &Option<Spanned<String>>| {
            let text = text.as_ref()?;
            Some(text.get_ref().clone())
        };
        for (key, url) in [
            ("webhook", &written.webhook),
            ("heartbeat", &written.heartbeat),
        ] {
            let Some(url) = url else { continue };
            let is_plain = !url
                .get_ref()
                .contains(|c: char| c.is_control() || "\"\\ ".contains(c));
            let is_known = ["http://", "https://"].map(|scheme| url.get_ref().starts_with(scheme));
            if !is_plain || !is_known.contains(&true) {
                // It may hold a secret.
                let what = format!("{key} is no URL of http or https");
                self.mistake(url, what, "begin it with https://");
            }
        }
        if let Some(mail) = &written.mail {
            let address = mail.get_ref();
            let is_plain = |c: char| !c.is_whitespace() && !c.is_control();
            if !address.contains('@') || !address.chars().all(is_plain) || address.starts_with('-')
            {
                let what = format!("mail = {address:?} is no address");
                self.mistake(mail, what, "take one such as root@example.org");
            }
        }
        let repeat = written.repeat.as_ref();
        Notify {
            command: text(&written.command),
            mail: text(&written.mail),
            webhook: text(&written.webhook),
            heartbeat: text(&written.heartbeat),
            repeat: repeat
                .and_then(|repeat| self.duration("repeat", repeat))
                .unwrap_or(REPEAT),
        }
    }

    /// A file of that policy alone: comments are left out.
    fn text_of(&self, name: &str) -> String {
        let policy = self.tables.get("policy").and_then(|all| all.get(name));
        let policy = policy.cloned().unwrap_or_else(|| Table::new().into());
        let policy = Table::from_iter([(name.to_owned(), policy)]);
        Table::from_iter([("policy".to_owned(), policy.into())]).to_string()
    }

    fn policy(&mut self, name: &Spanned<String>, written: &Written) -> Option<Policy> {
        let so_far = self.mistakes.len();
        self.check_names(name, written);
        let zone = self.zone(written.timezone.as_ref());
        let schedule = self.schedule(name, written, &zone);
        let rpo = self.duration("rpo", &written.rpo);
        if let (Some(Schedule::Every(interval)), Some(rpo)) = (&schedule, rpo)
            && rpo <= *interval
        {
            self.mistake(
                &written.rpo,
                format!(
                    "rpo = {:?} cannot be kept by runs that are {interval:#} apart",
                    written.rpo.get_ref()
                ),
                "let it be longer than the interval and a run together, or run more often",
            );
        }
        let keep = written.keep.as_ref().map(Spanned::get_ref);
        let keep = keep.map_or(KEEP, |keep| Keep {
            last: keep.last,
            hourly: keep.hourly,
            daily: keep.daily,
            weekly: keep.weekly,
            monthly: keep.monthly,
        });
        let windows = written.not_between.iter();
        let quiet: Vec<Window> = windows.filter_map(|window| self.quiet(window)).collect();
        let windows = written.bandwidth_between.iter();
        let limits: Vec<(Window, u64)> =
            windows.filter_map(|window| self.limited(window)).collect();
        let parallel = written.parallel.as_ref();
        let parallel = parallel
            .and_then(|parallel| self.at_once("parallel", parallel))
            .unwrap_or(NonZeroUsize::MIN);
        let order = self.order(written);
        let hooks = self.hooks(written);
        let live = self.live(written.live.as_ref());
        let quiesce = self.optional(
            "quiesce",
            written.quiesce.as_ref(),
            "take auto, require or off",
        );
        let max_change = written.max_change.as_ref();
        let max_change = max_change.and_then(|written| {
            let remedy = "take a share of a disk's data, such as 50%";
            self.parsed("max-change", written, remedy, share)
        });
        let full_scan_after = self.full_scan(written.full_scan.as_ref());
        let remedy = "take bytes a second, such as 100M";
        let limit: Option<Rate> =
            self.optional("bandwidth-limit", written.bandwidth_limit.as_ref(), remedy);
        let remedy = "take bytes, such as 10G";
        let min_free: Option<Space> = self.optional("min-free", written.min_free.as_ref(), remedy);
        let [source, destination] = [
            ("source", &written.source),
            ("destination", &written.destination),
        ]
        .map(|(key, host)| {
            let remedy = "take [USER@]NAME[:PORT], an alias of the ssh configuration, or local";
            self.parsed(key, host, remedy, HostSpec::from_str)
        });
        if self.mistakes.len() > so_far {
            return None;
        }
        let owned =
            |all: &[Spanned<String>]| all.iter().map(|text| text.get_ref().clone()).collect();
        Some(Policy {
            name: name.get_ref().clone(),
            text: self.text_of(name.get_ref()),
            source: source?,
            destination: destination?,
            directory: written
                .directory
                .as_ref()
                .map_or_else(|| DIRECTORY.to_owned(), |text| text.get_ref().clone()),
            vms: owned(written.vms.get_ref()),
            exclude: owned(&written.exclude),
            schedule: schedule?,
            zone,
            rpo: rpo?,
            keep,
            quiet,
            parallel,
            live,
            quiesce: quiesce.unwrap_or_default(),
            full_scan_after,
            max_change: max_change.unwrap_or(MAX_CHANGE),
            bandwidth_limit: limit.map(|Rate(bytes)| bytes),
            bandwidth_between: limits,
            networks: written.networks.clone(),
            test_network: written.test_network.clone(),
            sign_of_life: written.sign_of_life.clone(),
            order,
            fence: written.fence.clone(),
            hooks,
            min_free: min_free.map_or(MIN_FREE, |Space(bytes)| bytes),
        })
    }

    /// What a policy is called, where it is and what it is about.
    fn check_names(&mut self, name: &Spanned<String>, written: &Written) {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let text = name.get_ref();
        if text.is_empty() || text.len() > NAME_LEN || !text.chars().all(is_plain) {
            let what = format!("{text:?} cannot be the name of a policy");
            self.mistake(name, what, "take letters, digits, - and _, 64 at most");
        }
        if written.source.get_ref() == written.destination.get_ref() {
            self.mistake(
                &written.destination,
                format!("source and destination of {text} are the same host"),
                "a replica survives its source only on another host",
            );
        }
        let directory = written.directory.as_ref();
        if let Some(directory) = directory.filter(|directory| !directory.get_ref().starts_with('/'))
        {
            let what = format!("directory = {:?} is no absolute path", directory.get_ref());
            self.mistake(
                directory,
                what,
                format!("begin it with /, as {DIRECTORY} does"),
            );
        }
        if written.vms.get_ref().is_empty() {
            self.mistake(
                &written.vms,
                format!("{text} is about no VM"),
                "vms = [\"*\"] is about all",
            );
        }
    }

    fn zone(&mut self, written: Option<&Spanned<String>>) -> TimeZone {
        let remedy = "take a name of the IANA database, such as Europe/Zurich, or UTC";
        written
            .and_then(|name| self.parsed("timezone", name, remedy, TimeZone::get))
            .unwrap_or(TimeZone::UTC)
    }

    fn schedule(
        &mut self,
        name: &Spanned<String>,
        written: &Written,
        zone: &TimeZone,
    ) -> Option<Schedule> {
        let made = match (&written.every, &written.schedule) {
            (Some(every), None) => {
                let interval = self.duration("every", every)?;
                (every, Schedule::every(interval))
            }
            (None, Some(expression)) => (
                expression,
                Schedule::cron(expression.get_ref(), zone.clone()),
            ),
            (Some(every), Some(_)) => {
                self.mistake(
                    every,
                    "there are both every and schedule",
                    "keep one of them",
                );
                return None;
            }
            (None, None) => {
                let what = format!("{} never runs", name.get_ref());
                self.mistake(
                    name,
                    what,
                    "say every = \"15m\", or schedule = \"0 * * * *\"",
                );
                return None;
            }
        };
        match made {
            (_, Ok(schedule)) => Some(schedule),
            (at, Err(why)) => {
                let what = format!("{:?} is no time to run at: {}", at.get_ref(), why.0);
                self.mistake(at, what, "say every = \"15m\", or schedule = \"0 * * * *\"");
                None
            }
        }
    }

    fn duration(&mut self, key: &str, value: &Spanned<String>) -> Option<SignedDuration> {
        let remedy = "take a duration such as 90s, 15m or 1h 30m";
        self.parsed(key, value, remedy, |text| {
            match SignedDuration::from_str(text) {
                Ok(duration) if duration > SignedDuration::ZERO => Ok(duration),
                _ => Err(()),
            }
        })
    }

    fn window(&mut self, written: &Spanned<WrittenWindow>) -> Option<Window> {
        let window = written.get_ref();
        let time = |text: &str| Time::strptime("%H:%M", text);
        let remedy = "take hours and minutes, such as 08:30";
        let from = self.parsed("from", &window.from, remedy, time);
        let to = self.parsed("to", &window.to, remedy, time);
        let remedy = "take days such as mon, or mon-fri, or sat,sun";
        let days = match &window.days {
            Some(text) => self.parsed("days", text, remedy, days),
            None => Some([true; 7]),
        };
        let (from, to, days) = (from?, to?, days?);
        if from == to {
            let what = "a window that ends when it begins leaves nothing out";
            self.mistake(written, what, "let it end later, or remove it");
            return None;
        }
        Some(Window { days, from, to })
    }

    fn hooks(&mut self, written: &Written) -> Hooks {
        let limit = written.hook_limit.as_ref();
        let limit = limit.and_then(|limit| self.duration("hook-limit", limit));
        Hooks {
            before: written.before.clone(),
            after: written.after.clone(),
            limit: limit.unwrap_or(HOOK_LIMIT),
        }
    }

    fn order(&mut self, written: &Written) -> Order {
        let delay = written.delay.as_ref();
        let delay = delay.and_then(|delay| self.duration("delay", delay));
        Order::new(
            written.order.clone(),
            delay.unwrap_or_default().unsigned_abs(),
        )
    }

    /// A time in which nothing begins.
    fn quiet(&mut self, written: &Spanned<WrittenWindow>) -> Option<Window> {
        if let Some(limit) = &written.get_ref().limit {
            let what = "in a window of not-between nothing runs, so it has no limit";
            self.mistake(limit, what, "say bandwidth-between, or remove the limit");
        }
        self.window(written)
    }

    /// A time that has a limit of its own.
    fn limited(&mut self, written: &Spanned<WrittenWindow>) -> Option<(Window, u64)> {
        let window = self.window(written);
        let remedy = "take bytes a second, such as 100M";
        let Some(limit) = &written.get_ref().limit else {
            let what = "a window of bandwidth-between has no limit";
            self.mistake(written, what, "say limit = \"20M\"");
            return None;
        };
        let limit = self.parsed("limit", limit, remedy, Rate::from_str);
        let (window, Rate(bytes)) = window.zip(limit)?;
        Some((window, bytes))
    }

    /// A number of VMs at once.
    fn at_once(&mut self, key: &str, written: &Spanned<i64>) -> Option<NonZeroUsize> {
        let number = usize::try_from(*written.get_ref()).ok();
        let number = number.filter(|number| *number <= 64);
        let parsed = number.and_then(NonZeroUsize::new);
        if parsed.is_none() {
            let what = format!("{key} = {} cannot be", written.get_ref());
            self.mistake(written, what, "take 1 to 64 VMs at once");
        }
        parsed
    }

    /// How long what is known of changes is believed.
    fn full_scan(&mut self, written: Option<&Spanned<String>>) -> Option<SignedDuration> {
        let hours = |days: i64| Some(SignedDuration::from_hours(24 * days));
        let Some(written) = written else {
            return hours(7);
        };
        match written.get_ref().as_str() {
            "daily" => hours(1),
            "weekly" => hours(7),
            "monthly" => hours(30),
            "never" => None,
            other => {
                let what = format!("full-scan = {other:?} is not understood");
                self.mistake(written, what, "take daily, weekly, monthly or never");
                None
            }
        }
    }

    /// A VM is never read torn into a replica, nor suspended by a schedule.
    fn live(&mut self, written: Option<&Spanned<String>>) -> LiveChoice {
        let Some(written) = written else {
            return LiveChoice::Auto;
        };
        let remedy = "take auto, snapshot or refuse";
        let allowed = |text: &str| match text.parse() {
            Ok(live @ (LiveChoice::Auto | LiveChoice::Snapshot | LiveChoice::Refuse)) => Ok(live),
            _ => Err(()),
        };
        self.parsed("live", written, remedy, allowed)
            .unwrap_or_default()
    }

    /// A value that may be left out.
    fn optional<T: FromStr>(
        &mut self,
        key: &str,
        written: Option<&Spanned<String>>,
        remedy: &str,
    ) -> Option<T> {
        self.parsed(key, written?, remedy, T::from_str)
    }
}

/// A share in per cent, of 1 to 100.
fn share(text: &str) -> Result<f64, ()> {
    let number = text.trim().strip_suffix('%').ok_or(())?;
    let number: u8 = number.trim().parse().map_err(drop)?;
    match number {
        1..=100 => Ok(f64::from(number) / 100.0),
        _ => Err(()),
    }
}

/// Days of the week: `mon`, `mon-fri`, `sat,sun`.
fn days(text: &str) -> Result<[bool; 7], ()> {
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let mut at = first;
        loop {
            days[at] = true;
            if at == last {
                break;
            }
            at = (at + 1) % 7;
        }
    }
    Ok(days)
}

/// The place of a day in the week, from Monday on.
fn day(text: &str) -> Result<usize, ()> {
    let names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let text = text.trim();
    names
        .iter()
        .position(|name| name.eq_ignore_ascii_case(text))
        .ok_or(())
}

#[cfg(test)]
mod tests {
    use jiff::civil::Weekday;

    use super::*;
    use crate::replicate::policy::TEMPLATE;

    const PLAIN: &str = "\
[policy.shop]
source = \"hv1\"
destination = \"hv2\"
vms = [\"web*\", \"db\"]
exclude = [\"web-test\"]
every = \"15m\"
rpo = \"1h\"
keep = { last = 4, daily = 7 }
not-between = [{ from = \"22:00\", to = \"02:00\", days = \"fri\" }]
";

    /// What is right, what is wrong in its place, the line, and what is told.
    const MISTAKES: &[(&str, &str, usize, &str)] = &[
        ("source = \"hv1\"", "source = \"hv2\"", 3, "same host"),
        ("vms = [\"web*\", \"db\"]", "vms = []", 4, "no VM"),
        ("every = \"15m\"", "every = \"15 parsecs\"", 6, "15 parsecs"),
        ("every = \"15m\"", "every = \"1s\"", 6, "at least"),
        ("every = \"15m\"", "schedule = \"* * *\"", 6, "five fields"),
        (
            "every = \"15m\"",
            "every = \"15m\"\nschedule = \"0 * * * *\"",
            6,
            "both",
        ),
        ("every = \"15m\"\n", "", 1, "never runs"),
        ("rpo = \"1h\"", "rpo = \"15m\"", 7, "15m"),
        ("rpo = \"1h\"", "rpo = \"-1h\"", 7, "-1h"),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\ntimezone = \"Europe/Zürich\"",
            8,
            "Zürich",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nparallel = 0",
            8,
            "parallel = 0",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nmax-change = \"101%\"",
            8,
            "101%",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nfull-scan = \"often\"",
            8,
            "often",
        ),
        ("rpo = \"1h\"", "rpo = \"1h\"\nlive = \"torn\"", 8, "torn"),
        ("rpo = \"1h\"", "rpo = \"1h\"\nlive = \"pause\"", 8, "pause"),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nquiesce = \"perhaps\"",
            8,
            "perhaps",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nbandwidth-between = [{ from = \"08:00\", to = \"18:00\" }]",
            8,
            "has no limit",
        ),
        (
            "days = \"fri\"",
            "days = \"fri\", limit = \"1M\"",
            9,
            "not-between",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nbandwidth-limit = \"0\"",
            8,
            "bandwidth-limit",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nmin-free = \"much\"",
            8,
            "much",
        ),
        ("source = \"hv1\"", "source = \"-oProxy\"", 2, "-oProxy"),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\ndirectory = \"replicas\"",
            8,
            "absolute",
        ),
        ("rpo = \"1h\"", "rpo = \"1h\"\nrtp = \"2h\"", 8, "rtp"),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\nhook-limit = \"0s\"",
            8,
            "hook-limit",
        ),
        (
            "rpo = \"1h\"",
            "rpo = \"1h\"\ndelay = \"a bit\"",
            8,
            "a bit",
        ),
        ("to = \"02:00\"", "to = \"2 am\"", 9, "2 am"),
        ("to = \"02:00\"", "to = \"22:00\"", 9, "ends when it begins"),
        ("days = \"fri\"", "days = \"fry\"", 9, "fry"),
        ("keep = { last = 4", "keep = { last = -4", 8, ""),
        ("[policy.shop]", "[policy.\"a/b\"]", 1, "a/b"),
        ("destination = \"hv2\"\n", "", 1, "destination"),
        (
            "[policy.shop]",
            "[limits]\nper-host = 0\n[policy.shop]",
            2,
            "per-host = 0",
        ),
        (
            "[policy.shop]",
            "[notify]\nmail = \"root\"\n[policy.shop]",
            2,
            "root",
        ),
        (
            "[policy.shop]",
            "[notify]\nwebhook = \"hook\"\n[policy.shop]",
            2,
            "webhook",
        ),
        (
            "[policy.shop]",
            "[notify]\nrepeat = \"often\"\n[policy.shop]",
            2,
            "often",
        ),
    ];

    fn mistakes(text: &str) -> Vec<Mistake> {
        parse(text).expect_err(text)
    }

    #[test]
    fn a_plain_policy_is_read() {
        let all = parse(PLAIN).unwrap().all;
        let [policy] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(
            (policy.keep.last, policy.keep.daily, policy.keep.hourly),
            (4, 7, 0)
        );
        let about = ["web-1", "db", "web-test", "mail"].map(|vm| policy.is_about(vm));
        assert_eq!(about, [true, true, false, false]);
        let limited = PLAIN.replace(
            "rpo",
            "bandwidth-limit = \"9M\"\nbandwidth-between = [{ from = \"08:00\", to = \"18:00\", \
             days = \"mon-fri\", limit = \"2M\" }]\nrpo",
        );
        let limited = parse(&limited).unwrap().all.remove(0);
        // A Friday and a Saturday.
        let limits = [
            "2027-01-15T08:00:00Z",
            "2027-01-15T18:00:00Z",
            "2027-01-16T08:00:00Z",
        ];
        let limits = limits.map(|at| limited.limit_at(at.parse().unwrap()));
        assert_eq!(limits, [Some(2_000_000), Some(9_000_000), Some(9_000_000)]);
        let window = &policy.quiet[0];
        let at = |hour| Time::constant(hour, 30, 0, 0);
        assert!(window.contains(Weekday::Friday, at(22)));
        assert!(window.contains(Weekday::Saturday, at(1)));
        assert!(!window.contains(Weekday::Friday, at(1)));
        assert!(!window.contains(Weekday::Saturday, at(22)));
    }

    #[test]
    fn each_kind_of_mistake_is_told_with_its_line() {
        for (right, wrong, line, told) in MISTAKES {
            assert!(PLAIN.contains(right), "{right}");
            let found = mistakes(&PLAIN.replacen(right, wrong, 1));
            assert_eq!(found.len(), 1, "{wrong}: {found:?}");
            assert_eq!(found[0].line, *line, "{wrong}: {found:?}");
            assert!(found[0].what.contains(told), "{wrong}: {found:?}");
            assert!(!found[0].remedy.is_empty(), "{wrong}: {found:?}");
        }
    }

    #[test]
    fn the_template_has_every_key_and_what_is_wrong_twice_is_told_twice() {
        let every_key = TEMPLATE.lines().map(|line| {
            line.strip_prefix('#')
                .filter(|rest| rest.contains(" = "))
                .unwrap_or(line)
        });
        let every_key: Vec<&str> = every_key.collect();
        assert_eq!(parse(TEMPLATE).unwrap().all.len(), 1);
        let full = parse(&every_key.join("\n")).unwrap();
        assert_eq!(full.all.len(), 1);
        assert_eq!(
            (full.limits, full.notify.repeat),
            (Limits::default(), REPEAT)
        );
        assert!(full.notify.command.is_some() && full.notify.heartbeat.is_some());
        // Its text by itself says as much.
        let again = parse(&full.all[0].text).unwrap().all;
        assert_eq!(format!("{again:?}"), format!("{:?}", full.all));
        assert!(mistakes("")[0].what.contains("no policy"));
        let two = PLAIN.replace("15m", "x").replace("1h", "y");
        assert_eq!(mistakes(&two).len(), 2);
    }
}
