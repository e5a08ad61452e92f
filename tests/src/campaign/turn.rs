//! Whose turn it is, and what goes with it: so mixed that each victim meets every route, and every
//! way to go on, with every sort of moment.

use super::victim::Victim;
use crate::journey::Journey;

/// One in so many kills of a victim is aimed.
const AIMED_EVERY: u64 = 4;

/// What a story is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) victim: Victim,
    pub(super) by: Journey,
    /// `recover` is run before the next run.
    pub(super) recovers: bool,
    pub(super) aim: Aim,
}

/// What the kill is to hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aim {
    /// Any time of the victim's life.
    Life,
    /// The end of the time in which something lies beside the destination.
    Late,
    /// The time from the commit on.
    Commit,
}

impl Turn {
    /// The turn of a story.
    pub(super) fn of(story: u64) -> Self {
        let victims = Victim::ALL.len() as u64;
        let at = usize::try_from(story % victims).expect("a small number");
        // They are aimed at in turn. The first is the agent that could be applying.
        let round = story / victims + (at as u64 + 2) % AIMED_EVERY;
        let (cycle, place) = (round / AIMED_EVERY, round % AIMED_EVERY);
        let is_odd = |number: u64| !number.is_multiple_of(2);
        let (aim, relays, recovers) = if place == 0 {
            let aim = if is_odd(cycle + at as u64) {
                Aim::Late
            } else {
                Aim::Commit
            };
            let recovers = is_odd(cycle ^ (cycle >> 1) ^ (cycle >> 2));
            (aim, is_odd(cycle >> 1), !recovers)
        } else {
            let recovers = is_odd(place / 2 + cycle / 2);
            (Aim::Life, is_odd(place + cycle), recovers)
        };
        let victim = Victim::ALL[at];
        // Only a direct run has a connection from host to host.
        let by = if relays && victim != Victim::HostSsh {
            Journey::Relay
        } else {
            Journey::Direct
        };
        Self {
            victim,
            by,
            recovers,
            aim,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_victim_meets_everything_with_everything() {
        // Aimed kills have eight ways to be, and one in four is aimed.
        let turns: Vec<Turn> = (0..32 * 5).map(Turn::of).collect();
        for victim in Victim::ALL {
            let bys = if victim == Victim::HostSsh {
                vec![(Journey::Direct, 2)]
            } else {
                vec![(Journey::Direct, 1), (Journey::Relay, 1)]
            };
            for (by, weight) in bys {
                for recovers in [false, true] {
                    for (aim, often) in [(Aim::Life, 6), (Aim::Late, 1), (Aim::Commit, 1)] {
                        let turn = Turn {
                            victim,
                            by,
                            recovers,
                            aim,
                        };
                        let found = turns.iter().filter(|other| **other == turn).count();
                        assert_eq!(found, often * weight, "{turn:?}");
                    }
                }
            }
        }
    }
}
