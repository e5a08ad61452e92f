//! `replicate report`: one page for people who do not run commands. What there is now, how promises
//! were kept in the last thirty days, how much was shipped, and what tests of failovers have shown.
//! The page loads nothing and runs nothing.

use std::collections::BTreeMap;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan as _};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::policy::Policy;
use super::scheduler::Job;
use super::status::{State, VmStatus};
use crate::error::Result;
use crate::history::{Filter, History, Record};
use crate::output;

/// How many days are shown.
const DAYS: i64 = 30;

/// Of a day in which the promise was kept for a smaller part than this, so is told.
const NEARLY: f64 = 0.99;

const STYLE: &str = include_str!("report.css");

/// A point that was made, as far as the history of this machine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Made {
    /// The instant whose contents it holds.
    instant: Timestamp,
    /// From when on there was one.
    there: Timestamp,
}

/// What the history knows of one VM.
#[derive(Debug, Default)]
struct Past {
    made: Vec<Made>,
    /// Runs that have made none, the newest last: when, and why.
    failures: Vec<(Timestamp, String)>,
    /// Bytes on the wire by day.
    shipped: BTreeMap<Date, u64>,
}

/// A test of a failover.
#[derive(Debug)]
struct Tested {
    at: String,
    vm: String,
    success: bool,
    rto_seconds: Option<f64>,
    rpo_seconds: Option<f64>,
    error: String,
}

/// What the page is made of.
#[derive(Debug)]
pub struct Report {
    now: Timestamp,
    policies: Vec<Policy>,
    vms: Vec<VmStatus>,
    past: BTreeMap<Job, Past>,
    tests: Vec<Tested>,
}

impl Report {
    /// Puts together what there is, and what the history of this user knows.
    ///
    /// # Errors
    /// When the history cannot be read.
    pub fn new(policies: Vec<Policy>, vms: Vec<VmStatus>) -> Result<Self> {
        let now = Timestamp::now();
        let since = now.checked_sub((24 * (DAYS + 1)).hours()).ok();
        let history = History::open()?;
        let of = |operation| {
            history.list(&Filter {
                limit: u32::MAX,
                operation: Some(operation),
                since,
                ..Filter::default()
            })
        };
        let mut past: BTreeMap<Job, Past> = BTreeMap::new();
        for record in of("replicate")?.iter().rev() {
            let Some((job, result)) = about(record) else {
                continue;
            };
            let policy = policies.iter().find(|policy| policy.name == job.policy);
            let zone = policy.map_or(TimeZone::UTC, |policy| policy.zone.clone());
            past.entry(job).or_default().take(record, result, &zone);
        }
        let tests = of("replicate-test")?;
        Ok(Self {
            now,
            policies,
            vms,
            past,
            tests: tests.iter().filter_map(Tested::read).collect(),
        })
    }

    /// The page.
    pub fn html(&self) -> String {
        let zone = self.policies.first();
        let zone = zone.map_or(TimeZone::UTC, |policy| policy.zone.clone());
        let now = self.now.to_zoned(zone);
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { "Replication, " (now.strftime("%-d %B %Y")) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    header {
                        h1 { "Replication" }
                        p { (now.strftime("%A, %-d %B %Y, %H:%M %Z")) }
                    }
                    (self.tiles())
                    @for policy in &self.policies { (self.policy(policy)) }
                    (self.traffic())
                    (self.rehearsals())
                    footer {
                        "Made by kvm-clone-ctl " (env!("CARGO_PKG_VERSION"))
                        ". The days are from the history of the machine that made this page."
                    }
                }
            }
        };
        page.into_string()
    }

    /// The state in four numbers.
    fn tiles(&self) -> Markup {
        let count = |wanted: &[State]| {
            let vms = self.vms.iter();
            vms.filter(|vm| wanted.contains(&vm.state)).count()
        };
        let broken = count(&[
            State::Late,
            State::None,
            State::Gone,
            State::Paused,
            State::Doubtful,
        ]);
        html! {
            section.tiles {
                div.tile { b { (self.vms.len()) } "VMs" }
                div.tile.kept { b { (count(&[State::Kept])) } "promises kept" }
                div.tile.missed[broken > 0] { b { (broken) } "not kept" }
                div.tile.live[count(&[State::Live]) > 0] { b { (count(&[State::Live])) } "run from their replicas" }
            }
        }
    }

    fn policy(&self, policy: &Policy) -> Markup {
        let vms = self.vms.iter().filter(|vm| vm.policy == policy.name);
        html! {
            section {
                h2 { (policy.name) }
                p.of { (policy.source) " to " (policy.destination) ", no older than " (short(policy.rpo)) }
                table {
                    thead { tr {
                        th { "VM" } th { "state" } th.number { "age" } th.number { "points" }
                        th { "last " (DAYS) " days" } th.number { "kept" }
                    } }
                    tbody { @for vm in vms { (self.vm(policy, vm)) } }
                }
            }
        }
    }

    fn vm(&self, policy: &Policy, vm: &VmStatus) -> Markup {
        let job = Job {
            policy: vm.policy.clone(),
            vm: vm.vm.clone(),
        };
        let nothing = Past::default();
        let past = self.past.get(&job).unwrap_or(&nothing);
        let days = self.days(policy);
        let shares = days.windows(2).filter_map(|day| {
            let [(date, from), (_, to)] = day else {
                return None;
            };
            Some((
                *date,
                kept(&past.made, policy.rpo, *from, (*to).min(self.now)),
            ))
        });
        let shares: Vec<(Date, Option<f64>)> = shares.collect();
        let known: Vec<f64> = shares.iter().filter_map(|(_, share)| *share).collect();
        let age = vm.age_seconds.map(SignedDuration::from_secs);
        let failure = past.failures.last().filter(|_| !vm.state.is_well());
        html! {
            tr {
                td { (vm.vm) @if let Some((at, why)) = failure { div.why { (at.strftime("%F %H:%M UTC")) ": " (why) } } }
                td { span.state.(vm.state.name()) { (vm.state.name()) } }
                td.number { @if let Some(age) = age { (short(age)) } @else { "–" } }
                td.number { (vm.points.len()) }
                td.days { @for (date, share) in &shares { (day(*date, *share)) } }
                td.number { @match mean(&known) {
                    Some(mean) => { (percent(mean)) }
                    None => { "–" }
                } }
            }
        }
    }

    /// The beginnings of the days that are shown, and the end of the last.
    fn days(&self, policy: &Policy) -> Vec<(Date, Timestamp)> {
        let today = self.now.to_zoned(policy.zone.clone()).date();
        let days = (0..=DAYS).filter_map(|day| {
            let date = today.checked_add((day + 1 - DAYS).days()).ok()?;
            let begins = date.to_zoned(policy.zone.clone()).ok()?;
            Some((date, begins.timestamp()))
        });
        days.collect()
    }

    /// What was shipped on each day, as bars.
    fn traffic(&self) -> Markup {
        let Some(policy) = self.policies.first() else {
            return html! {};
        };
        let dates = self.days(policy);
        let dates = dates.iter().take(dates.len().saturating_sub(1));
        let of_day = |date: Date| -> u64 {
            let all = self.past.values();
            all.filter_map(|past| past.shipped.get(&date)).sum()
        };
        let bars: Vec<(Date, u64)> = dates.map(|(date, _)| (*date, of_day(*date))).collect();
        let total: u64 = bars.iter().map(|(_, bytes)| bytes).sum();
        let most = bars.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        html! {
            section {
                h2 { "Shipped" }
                p.of { (output::iec(total)) " in " (DAYS) " days, " (output::iec(most)) " at most on one" }
                div.bars { @for (date, bytes) in &bars {
                    div title={ (date) ": " (output::iec(*bytes)) } style={ "height:" (height(*bytes, most)) "%" } {}
                } }
            }
        }
    }

    fn rehearsals(&self) -> Markup {
        html! {
            section {
                h2 { "Tests of failovers" }
                @if self.tests.is_empty() {
                    p.of { "None in " (DAYS) " days: \"kvm-clone-ctl replicate test\" does one." }
                } @else {
                    table {
                        thead { tr {
                            th { "when" } th { "VM" } th { "result" }
                            th.number { "time to recover" } th.number { "age of the data" }
                        } }
                        tbody { @for test in &self.tests { tr {
                            td { (test.at) }
                            td { (test.vm) }
                            td { @if test.success { span.state.kept { "well" } } @else { span.state.late { "failed" } div.why { (test.error) } } }
                            td.number { (seconds(test.rto_seconds)) }
                            td.number { (seconds(test.rpo_seconds)) }
                        } } }
                    }
                }
            }
        }
    }
}

/// The VM of a run, and its result; `None` for a run that has not ended.
fn about(record: &Record) -> Option<(Job, &Value)> {
    let result = record.result.as_ref()?;
    let job = Job {
        policy: result["policy"].as_str()?.to_owned(),
        vm: result["vm"].as_str()?.to_owned(),
    };
    Some((job, result))
}

impl Past {
    fn take(&mut self, record: &Record, result: &Value, zone: &TimeZone) {
        let Ok(began) = record.began_at.parse::<Timestamp>() else {
            return;
        };
        let took = result["duration_seconds"].as_f64().unwrap_or(0.0);
        let took = SignedDuration::try_from_secs_f64(took).unwrap_or_default();
        let date = began.to_zoned(zone.clone()).date();
        let shipped = result["bytes_wire"].as_u64().unwrap_or(0);
        *self.shipped.entry(date).or_default() += shipped;
        if record.success == Some(true) {
            let instant = result["instant"]
                .as_str()
                .and_then(|text| text.parse().ok());
            self.made.push(Made {
                instant: instant.unwrap_or(began),
                there: began.saturating_add(took).unwrap_or(began),
            });
        } else {
            let why = result["error"]["message"].as_str().unwrap_or_default();
            self.failures.push((began, why.to_owned()));
        }
    }
}

impl Tested {
    fn read(record: &Record) -> Option<Self> {
        let result = record.result.as_ref()?;
        let at: Timestamp = record.began_at.parse().ok()?;
        Some(Self {
            at: at.strftime("%F %H:%M UTC").to_string(),
            vm: record.vm.clone()?,
            success: record.success == Some(true),
            rto_seconds: result["rto_seconds"].as_f64(),
            rpo_seconds: result["rpo_seconds"].as_f64(),
            error: result["error"]["message"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        })
    }
}

/// For which part of a time the newest point was young enough; `None` where there was no point yet.
/// The points come in the order in which they were made.
fn kept(made: &[Made], rpo: SignedDuration, from: Timestamp, to: Timestamp) -> Option<f64> {
    let from = made.first()?.there.max(from);
    let whole = to.duration_since(from);
    if whole <= SignedDuration::ZERO {
        return None;
    }
    let mut kept = SignedDuration::ZERO;
    for (at, point) in made.iter().enumerate() {
        let next = made.get(at + 1).map_or(to, |next| next.there);
        let breaks = point.instant.saturating_add(rpo).unwrap_or(to);
        let begins = point.there.max(from);
        let ends = breaks.min(next).min(to);
        if ends > begins {
            kept += ends.duration_since(begins);
        }
    }
    Some(kept.as_secs_f64() / whole.as_secs_f64())
}

fn day(date: Date, share: Option<f64>) -> Markup {
    let (kind, said) = match share {
        None => ("unknown", "no point yet".to_owned()),
        Some(share) if share >= 1.0 => ("kept", "kept".to_owned()),
        Some(share) if share >= NEARLY => ("nearly", percent(share)),
        Some(share) => ("missed", percent(share)),
    };
    html! { i.day.(kind) title={ (date) ": " (said) } {} }
}

fn mean(shares: &[f64]) -> Option<f64> {
    let count = u32::try_from(shares.len())
        .ok()
        .filter(|count| *count > 0)?;
    Some(shares.iter().sum::<f64>() / f64::from(count))
}

/// What is not all is not shown as all.
fn percent(share: f64) -> String {
    let floored = (share * 1000.0).floor() / 10.0;
    format!("{floored:.1} %")
}

fn height(bytes: u64, most: u64) -> u64 {
    u64::try_from(u128::from(bytes) * 100 / u128::from(most.max(1))).unwrap_or(100)
}

fn seconds(seconds: Option<f64>) -> String {
    seconds
        .and_then(|seconds| SignedDuration::try_from_secs_f64(seconds).ok())
        .map_or_else(|| "–".to_owned(), short)
}

fn short(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::point::Point;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(minute * 60).unwrap()
    }

    #[test]
    fn a_promise_is_kept_from_when_a_point_is_there_until_it_is_too_old_or_the_next_is_there() {
        let rpo = SignedDuration::from_mins(10);
        let made = [(0, 1), (5, 7), (30, 31)].map(|(instant, there)| Made {
            instant: at(instant),
            there: at(there),
        });
        let share = |from, to| kept(&made, rpo, at(from), at(to));
        assert_eq!(share(1, 15), Some(1.0));
        // Between 15 and 31 the newest is older than ten minutes.
        assert_eq!(share(1, 33), Some(0.5));
        assert_eq!(share(16, 30), Some(0.0));
        // Nothing was promised before the first.
        assert_eq!(share(-60, 0), None);
        assert_eq!(share(-60, 11), Some(1.0));
        assert_eq!(kept(&[], rpo, at(0), at(1)), None);
        assert_eq!(percent(0.99999), "99.9 %");
    }

    fn point(vm: &str) -> Point {
        let manifest = serde_json::json!({
            "format": 1, "made_by": "", "vm": vm, "source": "hv1", "disks": [], "small_files": [],
            "uuid": uuid::Uuid::nil(), "instant": "2026-11-29T15:00:00Z", "consistency": "crash",
            "sequence": 1, "networks": {}
        });
        Point {
            name: "20261129T150000Z".to_owned(),
            path: String::new(),
            pinned: false,
            manifest: serde_json::from_value(manifest).unwrap(),
        }
    }

    /// A site of six VMs, the hosts of which were apart for a day, one of which fails since a while,
    /// and one of which has the name of an attack.
    fn site() -> Report {
        let text = "[policy.shop]\nsource = \"hv1\"\ndestination = \"hv2\"\nvms = [\"*\"]\n\
                    every = \"1h\"\nrpo = \"90m\"\n";
        let policies = super::super::policy::parse(text).unwrap().all;
        let now: Timestamp = "2026-11-29T15:20:00Z".parse().unwrap();
        let names = [
            "db-1",
            "db-2",
            "files",
            "mail",
            "web-1",
            "<script>alert(1)</script>",
        ];
        let (mut vms, mut past) = (Vec::new(), BTreeMap::new());
        for (place, name) in names.into_iter().enumerate() {
            let minutes = i64::try_from(place).unwrap() * 5;
            let mut of_vm = Past::default();
            for hour in (1..24 * 30).rev() {
                let instant = now.checked_sub((hour * 60 + minutes).minutes()).unwrap();
                let day = instant.strftime("%d").to_string();
                let was_apart = day == "12" && hour % 24 > 9;
                let fails = name == "mail" && hour < 30;
                if was_apart || fails {
                    let why = "hv2 cannot be reached".to_owned();
                    of_vm.failures.push((instant, why));
                    continue;
                }
                let there = instant.checked_add(2.minutes()).unwrap();
                of_vm.made.push(Made { instant, there });
                let busy = u64::from(day.parse::<u8>().unwrap() % 7) + 2;
                let shipped = of_vm.shipped.entry(instant.to_zoned(TimeZone::UTC).date());
                *shipped.or_default() += busy * 40_000_000;
            }
            let newest = of_vm.made.last().unwrap().instant;
            let state = match name {
                "mail" => State::Late,
                "web-1" => State::Live,
                _ => State::Kept,
            };
            vms.push(VmStatus {
                policy: "shop".to_owned(),
                vm: name.to_owned(),
                state,
                age_seconds: Some(now.duration_since(newest).as_secs()),
                rpo_seconds: 5400,
                doubt: None,
                next_run: None,
                last_run: None,
                points: vec![point(name); 41 + place],
            });
            let job = Job {
                policy: "shop".to_owned(),
                vm: name.to_owned(),
            };
            past.insert(job, of_vm);
        }
        let test = |at: &str, vm: &str, success, rto, rpo, error: &str| Tested {
            at: at.to_owned(),
            vm: vm.to_owned(),
            success,
            rto_seconds: rto,
            rpo_seconds: rpo,
            error: error.to_owned(),
        };
        let slow = "mail-test has shown no sign of life within 5m";
        let tests = vec![
            test(
                "2026-11-21 06:00 UTC",
                "db-1",
                true,
                Some(41.0),
                Some(1260.0),
                "",
            ),
            test(
                "2026-11-21 06:02 UTC",
                "mail",
                false,
                None,
                Some(1320.0),
                slow,
            ),
            test(
                "2026-11-21 06:08 UTC",
                "web-1",
                true,
                Some(28.0),
                Some(1680.0),
                "",
            ),
        ];
        Report {
            now,
            policies,
            vms,
            past,
            tests,
        }
    }

    /// With `KVM_CLONE_REPORT` the page goes to that file, to be looked at in a browser.
    #[test]
    fn a_page_shows_what_was_missed_and_takes_no_name_for_markup() {
        let page = site().html();
        if let Some(file) = std::env::var_os("KVM_CLONE_REPORT") {
            std::fs::write(file, &page).unwrap();
        }
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;"));
        let days = |kind: &str| page.matches(&format!("\"day {kind}\"")).count();
        // The day on which the hosts were apart, a part of the next, and the last two of mail.
        let seen = ["missed", "nearly", "kept"].map(days);
        assert_eq!(seen, [11, 3, 166]);
        assert!(page.contains("hv2 cannot be reached"));
        assert!(page.contains("no sign of life"));
        assert!(page.contains("<b>4</b>promises kept") && page.contains("<b>1</b>not kept"));
    }
}
