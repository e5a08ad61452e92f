//! The stories that hostile agents play to the controller, and how it must end.

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::{Alive, Counters, Dialed, Prepared, Warning};

use super::frames::{credit, frame, head, message};
use super::mask::Does::{Besides, Drips, Ends, FallsSilent, Forever, Instead};
use super::mask::Side::{Both, Destination, Source};
use super::mask::When::{Asked, Attaches, Says, Starts};
use super::mask::{Does, Side, When};
use super::said::{
    absurd_counters, again, committed, ended, failed, leftover, listening, opened, preamble,
    progress, started, warning, welcome_of,
};

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    Sync,
    /// `--route relay`.
    Relay,
    /// `--verify reread`.
    Reread,
    Verify,
    Recover,
}

/// One lie, and the exit code that it must end with.
#[derive(Debug, Clone, Copy)]
pub struct Lie {
    pub name: &'static str,
    pub run: Run,
    pub side: Side,
    pub when: When,
    pub does: Does,
    pub exit: i32,
    /// What standard error says of it.
    pub says: &'static str,
}

/// Text that would clear a terminal, name its window and write over lines above, if it got there:
/// by the usual sequences, and by those of eight bits.
pub const ESCAPES: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\u{8}\u{9b}2J\u{85}\u{7f}END";

/// Protocol, on the side of both agents.
const fn both(name: &'static str, when: When, does: Does) -> Lie {
    lie(name, Both, when, does, 9, "")
}

const fn source(name: &'static str, when: When, does: Does) -> Lie {
    lie(name, Source, when, does, 9, "")
}

const fn destination(name: &'static str, when: When, does: Does) -> Lie {
    lie(name, Destination, when, does, 9, "")
}

const fn lie(
    name: &'static str,
    side: Side,
    when: When,
    does: Does,
    exit: i32,
    says: &'static str,
) -> Lie {
    Lie {
        name,
        run: Run::Sync,
        side,
        when,
        does,
        exit,
        says,
    }
}

impl Lie {
    const fn by(self, run: Run) -> Self {
        Self { run, ..self }
    }

    const fn ends(self, exit: i32, says: &'static str) -> Self {
        Self { exit, says, ..self }
    }
}

/// All stories that end at once.
#[must_use]
pub fn all() -> Vec<Lie> {
    [openings(), answers(), sessions(), floods(), relays()].concat()
}

/// Before a controller has asked for anything.
fn openings() -> Vec<Lie> {
    let welcome = Says(FrameKind::Welcome);
    vec![
        both("it ends at once", Starts, Ends("no agent\n")).ends(8, "no agent"),
        both(
            "a banner without end",
            Starts,
            Forever(|_| b"Welcome!\n".repeat(1000)),
        ),
        both(
            "versions of another time",
            Starts,
            Instead(|_| preamble(900, 901)),
        ),
        both(
            "an impossible range of versions",
            Starts,
            Instead(|_| preamble(3, 2)),
        ),
        both(
            "a welcome of 60,000 letters",
            welcome,
            Instead(|m| welcome_of(m, &"x".repeat(60_000))),
        ),
        both(
            "a welcome that clears the terminal",
            welcome,
            Instead(|m| welcome_of(m, ESCAPES)),
        ),
        both("a welcome twice", welcome, Besides(again)),
        both(
            "an open disk for a welcome",
            welcome,
            Instead(|_| message(&opened(0))),
        ),
        both("an unknown kind", welcome, Besides(|_| head(0, 0x7f, 0, 0))),
        both("flags", welcome, Besides(|_| head(0, 4, 1, 0))),
        both("4 GiB", welcome, Besides(|_| head(u32::MAX, 4, 0, 0))),
        both(
            "a payload",
            welcome,
            Besides(|_| frame(FrameKind::Opened, &[], b"x")),
        ),
        both(
            "no message",
            welcome,
            Besides(|_| frame(FrameKind::Opened, &[], &[])),
        ),
        both(
            "a frame of a data connection",
            welcome,
            Besides(|_| credit(0)),
        ),
        both(
            "a failure for a welcome",
            welcome,
            Instead(|_| failed(None, ESCAPES)),
        )
        .ends(1, "END"),
    ]
}

/// To one request after the other.
#[expect(
    clippy::too_many_lines,
    reason = "a table, with a line or two for each lie"
)]
fn answers() -> Vec<Lie> {
    use FrameKind::{Commit, Committed as Done, Dialed as Dial, Listening as Listen};
    use FrameKind::{Opened as Open, Prepared as Prepare};
    vec![
        source(
            "another disk opened",
            Says(Open),
            Instead(|_| message(&opened(7))),
        ),
        source("a disk opened twice", Says(Open), Besides(again)),
        source(
            "a disk of 2^63 bytes",
            Says(Open),
            Instead(|_| message(&opened(0))),
        )
        .ends(5, "larger"),
        destination(
            "a listener for the source",
            Says(Listen),
            Instead(|m| listening(m, |l| l.link = 77)),
        ),
        destination(
            "a name that is an option",
            Says(Listen),
            Instead(|m| listening(m, |l| "--version".clone_into(&mut l.name))),
        ),
        destination(
            "a name that is a command",
            Says(Listen),
            Instead(|m| listening(m, |l| "x; touch /tmp/owned".clone_into(&mut l.name))),
        )
        .by(Run::Relay),
        destination(
            "a name of 60,000 letters",
            Says(Listen),
            Instead(|m| listening(m, |l| l.name = "x".repeat(60_000))),
        ),
        destination(
            "no name",
            Says(Listen),
            Instead(|m| listening(m, |l| l.name.clear())),
        )
        .by(Run::Relay),
        source(
            "another link dialed",
            Says(Dial),
            Instead(|_| message(&Dialed { link: 77 })),
        ),
        destination(
            "a failure that clears the terminal",
            Says(Open),
            Instead(|_| failed(Some(0), ESCAPES)),
        )
        .ends(1, "END"),
        destination(
            "a failure of 60,000 letters",
            Says(Open),
            Instead(|_| failed(Some(0), &"\u{1b}[2J".repeat(15_000))),
        )
        .ends(1, "…"),
        destination(
            "prepared another disk",
            Says(Prepare),
            Instead(|_| {
                message(&Prepared {
                    disk: 7,
                    root: None,
                })
            }),
        ),
        destination(
            "committed what was to be prepared",
            Asked(FrameKind::Prepare),
            Instead(|_| committed(&[0])),
        ),
        destination(
            "committed another disk",
            Says(Done),
            Instead(|_| committed(&[7])),
        ),
        destination(
            "committed more disks",
            Says(Done),
            Instead(|_| committed(&[0, 1])),
        ),
        destination(
            "committed nothing",
            Asked(Commit),
            Instead(|_| committed(&[])),
        ),
        destination(
            "a made-up root, read again",
            Says(Prepare),
            Instead(|_| {
                message(&Prepared {
                    disk: 0,
                    root: Some(Digest([7; 16])),
                })
            }),
        )
        .by(Run::Reread)
        .ends(7, "differ"),
        destination(
            "no root, read again",
            Says(Prepare),
            Instead(|_| {
                message(&Prepared {
                    disk: 0,
                    root: None,
                })
            }),
        )
        .by(Run::Reread)
        .ends(7, "differ"),
    ]
}

/// While a session runs, and at its end.
#[expect(
    clippy::too_many_lines,
    reason = "a table, with a line or two for each lie"
)]
fn sessions() -> Vec<Lie> {
    use FrameKind::{Ended as End, Started as Start};
    vec![
        source(
            "a session on another disk",
            Says(Start),
            Instead(|_| started(7)),
        ),
        source("a session twice", Says(Start), Besides(again)),
        source(
            "the end for a beginning",
            Says(Start),
            Instead(|_| ended(0, Counters::default(), None, Some([7; 16]))),
        ),
        source(
            "progress of another disk",
            Says(Start),
            Besides(|_| progress(7, Counters::default())),
        ),
        source(
            "progress without bounds",
            Says(Start),
            Besides(|_| progress(0, absurd_counters())),
        ),
        destination(
            "progress at the destination without bounds",
            Says(Start),
            Besides(|_| progress(0, absurd_counters())),
        ),
        source(
            "more blocks than are settled",
            Says(Start),
            Besides(|_| {
                progress(
                    0,
                    Counters {
                        blocks_changed: 2,
                        ..Counters::default()
                    },
                )
            }),
        ),
        source(
            "the end of another disk",
            Says(Start),
            Besides(|_| ended(7, Counters::default(), None, None)),
        ),
        source(
            "the end without bounds",
            Says(End),
            Instead(|_| ended(0, absurd_counters(), None, Some([7; 16]))),
        ),
        source(
            "the end twice",
            Says(Start),
            Besides(|_| {
                [
                    ended(0, Counters::default(), None, None),
                    ended(0, Counters::default(), None, None),
                ]
                .concat()
            }),
        ),
        source(
            "a made-up root",
            Says(End),
            Instead(|_| ended(0, Counters::default(), None, Some([7; 16]))),
        )
        .ends(7, "differ"),
        destination(
            "a made-up root at the destination",
            Says(End),
            Instead(|_| ended(0, Counters::default(), None, Some([7; 16]))),
        )
        .ends(7, "differ"),
        destination(
            "no root",
            Says(End),
            Instead(|_| ended(0, Counters::default(), None, None)),
        )
        .ends(7, "differ"),
        source(
            "a difference beyond the disk",
            Says(End),
            Instead(|_| ended(0, Counters::default(), Some(u64::MAX), None)),
        )
        .by(Run::Verify),
        source(
            "a difference behind the last block",
            Says(End),
            Instead(|_| ended(0, Counters::default(), Some(1 << 40), None)),
        )
        .by(Run::Verify),
        source(
            "a failure of a disk that nobody has",
            Says(Start),
            Besides(|_| failed(Some(u32::MAX), "owned")),
        ),
        source(
            "a failure of the next disk",
            Says(Start),
            Besides(|_| failed(Some(1), "owned")),
        ),
        source(
            "a commit out of nowhere",
            Says(Start),
            Besides(|_| committed(&[0])),
        ),
        destination("it dies", Says(Start), Ends(ESCAPES)).ends(6, "END"),
        source(
            "it dies with much to say",
            Says(Start),
            Ends(include_str!("lies.rs")),
        )
        .ends(6, "lost"),
    ]
}

/// On and on.
fn floods() -> Vec<Lie> {
    use FrameKind::{Opened as Open, Started as Start};
    vec![
        source(
            "warnings",
            Says(Open),
            Forever(|_| warning("owned").repeat(100)),
        ),
        source(
            "warnings in a session",
            Says(Start),
            Forever(|_| warning(&"x".repeat(60_000))),
        ),
        source(
            "progress that answers nothing",
            Asked(FrameKind::Start),
            Forever(|_| progress(0, Counters::default()).repeat(100)),
        ),
        source(
            "failures of other disks",
            Asked(FrameKind::Start),
            Forever(|_| failed(Some(9), "owned").repeat(100)),
        ),
        source(
            "ends of other disks",
            Asked(FrameKind::Start),
            Forever(|_| ended(9, Counters::default(), None, None).repeat(100)),
        ),
        both(
            "disks to recover",
            Asked(FrameKind::Recover),
            Forever(|_| leftover(b"/disk", "").repeat(100)),
        )
        .by(Run::Recover),
        both(
            "long names to recover",
            Asked(FrameKind::Recover),
            Forever(|_| leftover(&[b'x'; 60_000], "")),
        )
        .by(Run::Recover),
    ]
}

/// On the data connection that the controller relays.
fn relays() -> Vec<Lie> {
    vec![
        source(
            "a relayed banner without end",
            Attaches,
            Forever(|_| b"Welcome!\n".repeat(1000)),
        )
        .by(Run::Relay),
        source("a relayed link that ends", Attaches, Ends("no link\n"))
            .by(Run::Relay)
            .ends(6, "broke"),
        source(
            "versions of another time on a link",
            Attaches,
            Instead(|_| preamble(900, 901)),
        )
        .by(Run::Relay),
        source(
            "a commit through the relay",
            Attaches,
            Instead(|_| [preamble(2, 2), committed(&[0])].concat()),
        )
        .by(Run::Relay),
        source(
            "no frame through the relay",
            Attaches,
            Instead(|_| [preamble(2, 2), head(u32::MAX, 0x42, 0, 0)].concat()),
        )
        .by(Run::Relay),
        destination(
            "a commit through the relay, from the destination",
            Attaches,
            Instead(|_| [preamble(2, 2), committed(&[0])].concat()),
        )
        .by(Run::Relay),
    ]
}

/// What the user sees of these is harmless, and the run goes on.
#[must_use]
pub fn harmless() -> Vec<Lie> {
    use FrameKind::{Opened as Open, Recovered, Started as Start};
    vec![
        source(
            "warnings that clear the terminal",
            Says(Open),
            Besides(|_| warning(ESCAPES)),
        )
        .ends(0, "END"),
        destination(
            "a warning of a disk that nobody has",
            Says(Start),
            Besides(|_| {
                message(&Warning {
                    disk: Some(u32::MAX),
                    message: ESCAPES.to_owned(),
                })
            }),
        )
        .ends(9, "disk 4294967295"),
        both(
            "many signs of life",
            Says(Start),
            Besides(|_| message(&Alive {}).repeat(100_000)),
        )
        .ends(0, ""),
        both(
            "recovery that clears the terminal",
            Says(Recovered),
            Instead(|m| [leftover(ESCAPES.as_bytes(), ESCAPES), again(m)].concat()),
        )
        .by(Run::Recover)
        .ends(1, "END"),
    ]
}

/// Stories that end only when silence is noticed.
#[must_use]
pub fn silences() -> Vec<Lie> {
    use FrameKind::{Opened as Open, Started as Start};
    let lost = |lie: Lie| lie.ends(6, "lost");
    vec![
        both("it says nothing at all", Starts, FallsSilent),
        lost(both(
            "it says no more than a preamble",
            Starts,
            Instead(|_| preamble(2, 2)),
        )),
        lost(source("it falls silent", Says(Open), FallsSilent)),
        lost(destination(
            "it falls silent in a session",
            Says(Start),
            FallsSilent,
        )),
        // Each of these but the first is swallowed by the first.
        lost(source(
            "frames inside of a frame",
            Says(Open),
            Drips(|_| head(60_000, 4, 0, 60_000)),
        )),
        both("a relayed link that says nothing", Attaches, FallsSilent)
            .by(Run::Relay)
            .ends(6, "data connection"),
    ]
}
