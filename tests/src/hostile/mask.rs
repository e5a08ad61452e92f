//! A hostile agent: the real one behind a mask, which passes everything on until its story begins.
//!
//! ```text
//!   kvm-clone-ctl ◄──► hostile_agent STORY PROGRAM serve ◄──► PROGRAM serve
//! ```
//!
//! So a story is one lie in an otherwise honest run, and only the lie is written down. Both agents
//! of a run wear the mask; which of them lies is known once the controller has a disk opened.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use kvm_clone_protocol::frame::{Frame, FrameKind};
use kvm_clone_protocol::message::{Alive, Control, Listening, Open};
use kvm_clone_protocol::preamble::{Preamble, SUPPORTED};

use super::agent::private;
use super::connection::{self, Incoming};

/// Whose agent lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Both,
    Source,
    Destination,
}

/// When a story begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Instead of an agent.
    Starts,
    /// Instead of `attach`.
    Attaches,
    /// The controller asks this for the first time. The real agent does not hear of it.
    Asked(FrameKind),
    /// The real agent says this for the first time.
    Says(FrameKind),
}

/// What an agent makes of what was asked, or should be said.
pub type Words = fn(&Control) -> Vec<u8>;

/// What happens then.
#[derive(Debug, Clone, Copy)]
pub enum Does {
    /// Something else is said.
    Instead(Words),
    /// Something is said as well, behind it.
    Besides(Words),
    /// Something is said behind it on and on.
    Forever(Words),
    /// The same, slowly, and nothing else any more.
    Drips(Words),
    /// Nothing is said any more.
    FallsSilent,
    /// The agent ends, with this on its standard error.
    Ends(&'static str),
}

/// Plays a story as the program that a controller has started: `serve`, or `attach NAME`.
///
/// # Panics
/// When the real agent cannot be started.
pub fn play(side: Side, when: When, does: Does, program: &str, args: &[String]) -> ExitCode {
    let is_ours = || {
        args.get(1)
            .is_some_and(|name| std::fs::remove_file(marker(name)).is_ok())
    };
    match (args[0].as_str(), when) {
        ("attach", When::Attaches) if !is_ours() => real(program, args),
        ("serve", When::Starts) | ("attach", When::Attaches) => {
            Mask::alone().act(does, &Control::Alive(Alive {}));
            // What is written to it meanwhile does not matter.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            ExitCode::SUCCESS
        }
        ("serve", _) => serve(side, when, does, program),
        _ => real(program, args),
    }
}

/// Becomes the real agent.
fn real(program: &str, args: &[String]) -> ExitCode {
    let error = Command::new(program).args(args).exec();
    panic!("{program}: {error}");
}

/// Tells the `attach` of a data connection that its agent is the one that lies.
fn marker(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("kc-mask-{name}"))
}

fn serve(side: Side, when: When, does: Does, program: &str) -> ExitCode {
    let mut real = private(program.into(), &["serve"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the real agent can be executed");
    let (to, events) = mpsc::channel();
    let stdout = real.stdout.take().expect("piped");
    for (from, incoming) in [
        (From::Controller, Incoming::start(std::io::stdin())),
        (From::Real, Incoming::start(stdout)),
    ] {
        let to = to.clone();
        std::thread::spawn(move || forward(from, &incoming, &to));
    }
    let mut mask = Mask {
        real: real.stdin.take(),
        is_silent: false,
    };
    mask.greet();
    mask.pass_on(&events, side, when, does);
    end(real);
    ExitCode::SUCCESS
}

fn end(mut real: Child) {
    let _ = real.kill();
    let _ = real.wait();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Controller,
    Real,
}

/// `None` at the end of what comes.
type Event = (From, Option<Frame>);

fn forward(from: From, incoming: &Incoming, to: &Sender<Event>) {
    let _ = incoming.preamble();
    loop {
        // The other end may have nothing to say for as long as it likes.
        let Some(frame) = incoming.next_within(Duration::from_secs(3600)) else {
            continue;
        };
        let ended = frame.is_none();
        if to.send((from, frame)).is_err() || ended {
            return;
        }
    }
}

/// What stands between a controller and the real agent.
#[derive(Debug)]
struct Mask {
    real: Option<ChildStdin>,
    is_silent: bool,
}

impl Mask {
    /// A mask with nobody behind it.
    fn alone() -> Self {
        Self {
            real: None,
            is_silent: false,
        }
    }

    fn greet(&mut self) {
        let preamble = Preamble::of_this_build(SUPPORTED).encode();
        self.say(&preamble);
        self.ask(&preamble);
    }

    /// Until either end is gone.
    fn pass_on(&mut self, events: &Receiver<Event>, side: Side, when: When, does: Does) {
        let (mut is_ours, mut is_over) = (side == Side::Both, false);
        while let Ok((from, Some(frame))) = events.recv() {
            let message = Control::read(&frame).expect("both ends speak the protocol");
            if let Control::Open(Open { access, .. }) = &message {
                is_ours |= access.is_source() == (side == Side::Source);
            }
            if let Control::Listening(Listening { name, .. }) = &message
                && is_ours
                && when == When::Attaches
            {
                std::fs::write(marker(name), "").expect("temporary files can be made");
            }
            let now = match from {
                From::Controller => When::Asked(frame.kind),
                From::Real => When::Says(frame.kind),
            };
            if is_ours && !is_over && now == when {
                is_over = true;
                if from == From::Real && !matches!(does, Does::Instead(_)) {
                    self.say(&frame.encode());
                }
                self.act(does, &message);
            } else if from == From::Controller {
                self.ask(&frame.encode());
            } else {
                self.say(&frame.encode());
            }
        }
    }

    fn act(&mut self, does: Does, message: &Control) {
        match does {
            Does::Instead(words) | Does::Besides(words) => {
                self.say(&words(message));
            }
            Does::Forever(words) => {
                let words = words(message);
                while self.say(&words) {}
            }
            Does::Drips(words) => {
                let words = words(message);
                while self.say(&words) {
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
            Does::FallsSilent => self.is_silent = true,
            Does::Ends(words) => {
                let _ = std::io::stderr().write_all(words.as_bytes());
                std::process::exit(1);
            }
        }
    }

    /// To the controller; false when that is gone.
    fn say(&self, bytes: &[u8]) -> bool {
        self.is_silent || connection::write(&mut std::io::stdout(), bytes)
    }

    fn ask(&mut self, bytes: &[u8]) {
        if let Some(real) = &mut self.real {
            connection::write(real, bytes);
        }
    }
}
