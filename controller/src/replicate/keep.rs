//! Which recovery points stay: of each kind of time the newest point of the newest times that have
//! one, so that `daily = 7` are the last points of the seven last days on which there were any.
//!
//! A point may stay for several reasons, and one reason is enough.

use std::collections::BTreeSet;

use jiff::civil::Date;
use jiff::tz::{Offset, TimeZone};
use jiff::{SignedDuration, Timestamp, Zoned};

/// By how much a clock may be wrong before it is not believed: hosts of one site that keep time are
/// closer.
pub const TRUSTED: SignedDuration = SignedDuration::from_mins(5);

/// How many points of each kind stay; zero for none of that kind. The newest always stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// The newest, whenever they are of.
    pub last: usize,
    /// Of so many hours.
    pub hourly: usize,
    /// Of so many days.
    pub daily: usize,
    /// Of so many ISO weeks, which begin with Monday.
    pub weekly: usize,
    /// Of so many months.
    pub monthly: usize,
}

/// Nothing is removed now: a point is of a time that has not come, so this clock was put back, or
/// the one that made it was ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FromTheFuture(pub Timestamp);

/// The time of a kind that an instant belongs to. An hour that comes twice is two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Bucket {
    Hour(Date, i8, Offset),
    Day(Date),
    Week(i16, i8),
    Month(i16, i8),
}

/// The newest of these instants that this clock can believe: one that has not come says nothing of
/// how old a replica is.
pub fn newest(points: impl Iterator<Item = Timestamp>, now: Timestamp) -> Option<Timestamp> {
    points.filter(|point| *point <= limit(now)).max()
}

fn limit(now: Timestamp) -> Timestamp {
    now.saturating_add(TRUSTED).unwrap_or(now)
}

impl Keep {
    /// How many stay at most, but for those that are pinned.
    pub fn most(&self) -> usize {
        let Self {
            last,
            hourly,
            daily,
            weekly,
            monthly,
        } = *self;
        let all = [last.max(1), hourly, daily, weekly, monthly];
        all.into_iter().fold(0, usize::saturating_add)
    }

    /// Which points of these instants stay, in their order, by the calendar of `zone`.
    ///
    /// # Errors
    /// [`FromTheFuture`]: then all stay.
    pub fn choose(
        &self,
        points: &[Timestamp],
        zone: &TimeZone,
        now: Timestamp,
    ) -> Result<Vec<bool>, FromTheFuture> {
        let limit = limit(now);
        if let Some(point) = points.iter().find(|point| **point > limit) {
            return Err(FromTheFuture(*point));
        }
        let mut stays = vec![false; points.len()];
        let mut newest_first: Vec<usize> = (0..points.len()).collect();
        newest_first.sort_by_key(|&index| std::cmp::Reverse(points[index]));
        for &index in newest_first.iter().take(self.last.max(1)) {
            stays[index] = true;
        }
        for (count, bucket) in [
            (self.hourly, Bucket::hour as fn(&Zoned) -> Bucket),
            (self.daily, Bucket::day),
            (self.weekly, Bucket::week),
            (self.monthly, Bucket::month),
        ] {
            let mut seen = BTreeSet::new();
            for &index in &newest_first {
                if seen.len() == count {
                    break;
                }
                let zoned = points[index].to_zoned(zone.clone());
                stays[index] |= seen.insert(bucket(&zoned));
            }
        }
        Ok(stays)
    }
}

impl Bucket {
    fn hour(at: &Zoned) -> Self {
        Self::Hour(at.date(), at.hour(), at.offset())
    }

    fn day(at: &Zoned) -> Self {
        Self::Day(at.date())
    }

    fn week(at: &Zoned) -> Self {
        let week = at.date().iso_week_date();
        Self::Week(week.year(), week.week())
    }

    fn month(at: &Zoned) -> Self {
        Self::Month(at.year(), at.month())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::{ToSpan as _, civil};

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn kept(keep: Keep, points: &[&str], zone_name: &str) -> Vec<String> {
        let all: Vec<Timestamp> = points.iter().map(|text| at(text)).collect();
        let now = *all.iter().max().unwrap();
        let stays = keep.choose(&all, &zone(zone_name), now).unwrap();
        let kept = points.iter().zip(stays).filter(|(_, stays)| *stays);
        kept.map(|(text, _)| (*text).to_owned()).collect()
    }

    #[test]
    fn days_are_those_of_the_zone() {
        let keep = Keep {
            daily: 2,
            ..Keep::default()
        };
        // In Zurich the second is of the next day.
        let points = [
            "2026-07-01T21:00Z",
            "2026-07-01T22:30Z",
            "2026-07-02T10:00Z",
        ]
        .map(|text| text.replace("Z", ":00Z"));
        let points: Vec<&str> = points.iter().map(String::as_str).collect();
        assert_eq!(kept(keep, &points, "UTC"), [points[1], points[2]]);
        assert_eq!(kept(keep, &points, "Europe/Zurich"), [points[0], points[2]]);
    }

    #[test]
    fn an_hour_that_comes_twice_is_two_and_one_that_is_left_out_is_none() {
        let keep = Keep {
            hourly: 3,
            ..Keep::default()
        };
        // 02:30 twice, then 03:30.
        let autumn = [
            "2026-10-25T00:30:00Z",
            "2026-10-25T01:30:00Z",
            "2026-10-25T02:30:00Z",
        ];
        assert_eq!(kept(keep, &autumn, "Europe/Zurich"), autumn);
        // 01:30, then 03:30.
        let spring = ["2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z"];
        assert_eq!(kept(keep, &spring, "Europe/Zurich"), spring);
    }

    #[test]
    fn the_newest_stays_whatever_was_asked_for() {
        let points = [
            "2026-01-01T00:00:00Z",
            "2026-01-03T00:00:00Z",
            "2026-01-02T00:00:00Z",
        ];
        let points = points.map(at);
        let stays = Keep::default().choose(&points, &TimeZone::UTC, points[1]);
        assert_eq!(stays, Ok(vec![false, true, false]));
        assert_eq!(
            Keep::default().choose(&[], &TimeZone::UTC, points[0]),
            Ok(vec![])
        );
    }

    #[test]
    fn a_clock_that_is_not_believed_removes_nothing() {
        let points = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"].map(at);
        let found = Keep::default().choose(&points, &TimeZone::UTC, points[0]);
        assert_eq!(found, Err(FromTheFuture(points[1])));
        assert_eq!(newest(points.into_iter(), points[0]), Some(points[0]));
        assert_eq!(newest(points.into_iter(), points[1]), Some(points[1]));
    }

    /// Four hundred days of a point every twenty minutes, pruned after each: what stays is what the
    /// whole history would have given.
    #[test]
    fn pruning_again_and_again_leaves_what_pruning_once_would() {
        let keep = Keep {
            last: 4,
            hourly: 24,
            daily: 7,
            weekly: 5,
            monthly: 12,
        };
        let zone = zone("Europe/Zurich");
        let begin = civil::date(2026, 1, 1).to_zoned(zone.clone()).unwrap();
        let end = begin.checked_add(400.days()).unwrap().timestamp();
        let mut all = Vec::new();
        let mut left: Vec<Timestamp> = Vec::new();
        let mut now = begin.timestamp();
        while now < end {
            all.push(now);
            left.push(now);
            let stays = keep.choose(&left, &zone, now).unwrap();
            let mut stays = stays.into_iter();
            left.retain(|_| stays.next().unwrap());
            now = now.checked_add(20.minutes()).unwrap();
        }
        let stays = keep.choose(&all, &zone, now).unwrap();
        let once = all.iter().zip(stays).filter(|(_, stays)| *stays);
        let once: Vec<Timestamp> = once.map(|(point, _)| *point).collect();
        assert_eq!(left, once);
        let months: BTreeSet<_> = left
            .iter()
            .map(|point| point.to_zoned(zone.clone()).date().first_of_month())
            .collect();
        assert_eq!(months.len(), keep.monthly);
        assert!(left.len() <= 4 + 24 + 7 + 5 + 12, "{}", left.len());
    }
}
