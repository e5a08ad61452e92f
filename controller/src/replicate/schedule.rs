//! When a policy runs: at an interval, or by a cron expression in a time zone.
//!
//! A run that was missed is made up for once, however many were missed. Of a local time that is
//! left out when clocks are put forward, the run comes as they are; of one that comes twice, once.

use std::str::FromStr as _;

use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// The least interval: a run takes some seconds.
pub const LEAST: SignedDuration = SignedDuration::from_secs(10);

/// When something runs.
#[derive(Debug, Clone)]
pub enum Schedule {
    /// At this interval, counted from when the last run was due.
    Every(SignedDuration),
    /// At the times of an expression, by the clocks of a zone.
    Cron(Box<Cron>, TimeZone),
}

/// Why there is no such schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSchedule(pub String);

impl Schedule {
    /// At an interval.
    ///
    /// # Errors
    /// One that is shorter than a run.
    pub fn every(interval: SignedDuration) -> Result<Self, BadSchedule> {
        if interval < LEAST {
            return Err(BadSchedule(format!("expected at least {LEAST:#}")));
        }
        Ok(Self::Every(interval))
    }

    /// By a cron expression: minute, hour, day of month, month, day of week.
    ///
    /// # Errors
    /// What is not one, or never comes.
    pub fn cron(expression: &str, zone: TimeZone) -> Result<Self, BadSchedule> {
        let fields = expression.split_whitespace().count();
        let is_named = expression.starts_with('@');
        if fields != 5 && !is_named {
            return Err(BadSchedule(format!(
                "expected five fields (minute hour day month weekday), found {fields}"
            )));
        }
        let cron = Cron::from_str(expression).map_err(|error| BadSchedule(error.to_string()))?;
        let schedule = Self::Cron(Box::new(cron), zone);
        match schedule.after(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(BadSchedule("there is no such time".to_owned())),
        }
    }

    /// The first time after `then`.
    pub fn after(&self, then: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Every(interval) => then.checked_add(*interval).ok(),
            Self::Cron(cron, zone) => {
                let then = then.to_zoned(zone.clone());
                let next = cron.find_next_occurrence(&then, false).ok()?;
                Some(next.timestamp())
            }
        }
    }

    /// The newest time that has come since `last`, if one has: what was missed before it stays
    /// missed. What has never run is due at once.
    pub fn due(&self, last: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
        let Some(last) = last else { return Some(now) };
        let first = self.after(last).filter(|first| *first <= now)?;
        match self {
            Self::Every(interval) => {
                let missed = now.duration_since(first).as_secs() / interval.as_secs().max(1);
                let missed = i32::try_from(missed).unwrap_or(i32::MAX);
                let newest = interval.checked_mul(missed);
                Some(
                    newest
                        .and_then(|span| first.checked_add(span).ok())
                        .unwrap_or(first),
                )
            }
            Self::Cron(cron, zone) => {
                let now = now.to_zoned(zone.clone());
                let newest = cron.find_previous_occurrence(&now, true);
                Some(newest.map_or(first, |newest| newest.timestamp().max(first)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan as _;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn zurich(expression: &str) -> Schedule {
        Schedule::cron(expression, TimeZone::get("Europe/Zurich").unwrap()).unwrap()
    }

    fn between(schedule: &Schedule, from: &str, to: &str) -> Vec<String> {
        let (mut then, to) = (at(from), at(to));
        let mut times = Vec::new();
        while let Some(next) = schedule.after(then).filter(|next| *next < to) {
            times.push(next.to_string());
            then = next;
        }
        times
    }

    #[test]
    fn a_local_time_that_is_left_out_runs_once_and_one_that_comes_twice_once() {
        let nightly = zurich("30 2 * * *");
        // From 02:00 to 03:00 clocks are put forward: it runs at 03:00 or 03:30, and the day has one.
        let spring = between(&nightly, "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
        assert_eq!(spring.len(), 2, "{spring:?}");
        assert!(spring[0].starts_with("2026-03-29T01"), "{spring:?}");
        let autumn = between(&nightly, "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(autumn, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
    }

    #[test]
    fn what_was_missed_is_made_up_for_once() {
        let every = Schedule::every(SignedDuration::from_mins(15)).unwrap();
        let last = at("2026-01-01T00:00:00Z");
        assert_eq!(every.due(Some(last), at("2026-01-01T00:14:59Z")), None);
        let now = at("2026-01-01T02:40:00Z");
        let due = every.due(Some(last), now).unwrap();
        assert_eq!(due, at("2026-01-01T02:30:00Z"));
        assert_eq!(every.due(Some(due), now), None);
        assert_eq!(every.after(due), Some(at("2026-01-01T02:45:00Z")));

        let hourly = zurich("0 * * * *");
        let due = hourly.due(Some(last), now).unwrap();
        assert_eq!(due, at("2026-01-01T02:00:00Z"));
        assert_eq!(hourly.due(Some(due), now), None);
        assert_eq!(hourly.due(None, now), Some(now));
    }

    #[test]
    fn an_interval_does_not_drift_with_the_time_that_runs_take() {
        let every = Schedule::every(SignedDuration::from_mins(10)).unwrap();
        let (mut last, mut now) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T00:00:00Z"));
        for _ in 0..1000 {
            now = now.checked_add(7.seconds()).unwrap();
            if let Some(due) = every.due(Some(last), now) {
                last = due;
            }
        }
        assert_eq!(last, at("2026-01-01T01:50:00Z"));
    }

    #[test]
    fn what_is_no_schedule_says_what_is() {
        let utc = || TimeZone::UTC;
        for (expression, told) in [
            ("* * * *", "five fields"),
            ("* * * * * *", "five fields"),
            ("61 * * * *", ""),
            ("0 0 30 2 *", "no such time"),
        ] {
            let BadSchedule(why) = Schedule::cron(expression, utc()).unwrap_err();
            assert!(why.contains(told), "{expression}: {why}");
        }
        assert!(Schedule::every(SignedDuration::from_secs(9)).is_err());
        assert!(Schedule::cron("@daily", utc()).is_ok());
    }
}
