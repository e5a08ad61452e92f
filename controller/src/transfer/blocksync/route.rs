//! How the two agents are connected.
//!
//! ```text
//!  local    one host: the sender runs `attach` itself
//!  direct   the sender runs `ssh DESTINATION … attach`; or, where the destination is this machine,
//!           the receiver runs `ssh SOURCE … attach`
//!  relay    both listen; the controller attaches to both and moves the frames
//! ```

use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use kvm_clone_protocol::message::{Control, Dial, Listen, Listening, Token};
use kvm_clone_protocol::preamble::Versions;
use kvm_clone_protocol::sync::MAX_STREAMS;

use super::pair::{Pair, Side, answers};
use super::relay::Relay;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Attach;
use crate::transfer::request::RouteChoice;
use crate::transfer::result::Route;
use crate::transfer::unexpected;

/// How long the making of a link may take: an agent gives up after 30 s.
pub(super) const LINK_TIME: Duration = Duration::from_secs(40);

/// The numbers of the links of one disk: as many for the first try as for a second one, which only
/// the source needs.
const NUMBERS: u32 = 2 * LINKS;
const LINKS: u32 = MAX_STREAMS as u32;

/// The agents' data connections for one disk. They come into being in two steps, so that the
/// destination can be read meanwhile: its end is known first.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) route: Route,
    /// The numbers of the first link at the source and at the destination.
    firsts: [u32; 2],
    /// How many there are, numbered from that on.
    pub(super) links: u16,
    /// The protocol version on them.
    pub(super) version: u16,
    pub(super) relays: Vec<Relay>,
    next: Next,
}

/// What is still to be done.
#[derive(Debug)]
enum Next {
    Nothing,
    /// A side is about to tell whether it has reached the other. If it has not, a relay may come in
    /// its place where the destination listens.
    Dialed(Side, Vec<Listening>),
    /// The destination listens for a relay.
    Relay(Vec<Listening>),
}

/// The agents have not reached each other.
#[derive(Debug)]
pub(super) struct Unreached {
    /// Who was to make the way.
    pub(super) dialing: Side,
    pub(super) error: Error,
}

/// Begins to connect the agents by so many links: what remains is to [complete](Connection::complete)
/// it. `disk` numbers the links.
///
/// # Errors
/// When the chosen route cannot be had.
pub(super) async fn begin(
    pair: &mut Pair,
    choice: RouteChoice,
    disk: u32,
    links: u16,
) -> Result<Connection> {
    let first = disk.saturating_mul(NUMBERS);
    let is_local = |side: &crate::host::AgentConnection| side.host().is_local();
    let has_choice = !is_local(&pair.source) && !is_local(&pair.destination);
    let (route, next) = match choice {
        RouteChoice::Relay => {
            let mut listening = Vec::new();
            for link in numbers(first, links) {
                listening.push(listen(pair, Side::Destination, link).await?);
            }
            (Route::Relay, Next::Relay(listening))
        }
        _ if pair.is_one_host() => (Route::Local, local(pair, first, links).await?),
        RouteChoice::Direct | RouteChoice::Auto => {
            let (dialer, listening) = direct(pair, first, links).await?;
            let relay = (choice == RouteChoice::Auto && has_choice).then_some(listening);
            (
                Route::Direct,
                Next::Dialed(dialer, relay.unwrap_or_default()),
            )
        }
    };
    Ok(Connection {
        route,
        firsts: [first; 2],
        links,
        version: link_version(pair),
        relays: Vec::new(),
        next,
    })
}

impl Connection {
    /// The number of the first link at one side.
    pub(super) fn first(&self, side: Side) -> u32 {
        match side {
            Side::Source => self.firsts[0],
            Side::Destination => self.firsts[1],
        }
    }

    /// Whether the source's end is known already.
    pub(super) fn is_certain(&self) -> bool {
        matches!(&self.next, Next::Dialed(_, relay) if relay.is_empty())
    }

    /// Waits until the agents have reached each other, by one link at least: a session does without
    /// the others.
    ///
    /// # Errors
    /// [`Unreached`] when they have not.
    pub(super) async fn complete(&mut self, pair: &mut Pair) -> Result<(), Unreached> {
        let listening = match std::mem::replace(&mut self.next, Next::Nothing) {
            Next::Nothing => return Ok(()),
            Next::Relay(listening) => listening,
            Next::Dialed(dialing, listening) => match self.dialed(pair, dialing).await {
                Err(error) if !listening.is_empty() && is_about_the_way(&error) => {
                    tracing::info!("no direct route: {}", error.one_line());
                    self.route = Route::Relay;
                    self.firsts[0] += LINKS;
                    listening
                }
                dialed => return dialed.map_err(|error| Unreached { dialing, error }),
            },
        };
        let dialing = Side::Source;
        let relayed = self.relay(pair, &listening).await;
        relayed.map_err(|error| Unreached { dialing, error })
    }

    async fn dialed(&self, pair: &mut Pair, dialing: Side) -> Result<()> {
        let links = self.first(dialing)..self.first(dialing) + u32::from(self.links);
        let (mut reached, mut missed) = (false, None);
        for _ in links.clone() {
            // The disk may be heard of already.
            let is_it =
                |said: &Control| answers(said, None) && !matches!(said, Control::Started(_));
            match in_time(pair.answer(dialing, is_it)).await {
                Ok(Control::Dialed(dialed)) if links.contains(&dialed.link) => reached = true,
                Ok(answer) => return Err(unexpected("dial", &answer)),
                Err(error) => {
                    tracing::info!("a data connection less: {}", error.one_line());
                    missed.get_or_insert(error);
                }
            }
        }
        match (missed, self.route) {
            (Some(error), Route::Direct) if !reached => Err(unreached(pair, dialing, error)),
            (Some(error), Route::Local | Route::Relay) if !reached => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts this program between the two.
    async fn relay(&mut self, pair: &mut Pair, listening: &[Listening]) -> Result<()> {
        let versions = Versions::only(self.version);
        let first = self.first(Side::Source);
        for (link, destination) in numbers(first, self.links).zip(listening) {
            let source = listen(pair, Side::Source, link).await?;
            let ends = [(&pair.source, &source), (&pair.destination, destination)];
            let relay = Relay::start(ends, versions, way(first, link)).await?;
            self.relays.push(relay);
        }
        Ok(())
    }
}

/// What it means that the side that dials has not reached the other.
fn unreached(pair: &mut Pair, dialing: Side, error: Error) -> Error {
    if error.code() != ErrorCode::Interrupted {
        return error;
    }
    let from = pair.side(dialing).host().to_string();
    let host = pair.side(dialing.other()).host();
    let said = error.to_string();
    let code = host.explain(&said).code();
    Error::new(code, format!("{from} does not reach {host} directly"))
        .caused_by(said)
        .hint("let it log in there (--forward-agent, or a key of its own), or use --route relay")
}

/// Whether another route may help.
fn is_about_the_way(error: &Error) -> bool {
    use ErrorCode::{Auth, HostKey, HostUnreachable, Interrupted, MissingRequirement, Refused};

    // An agent that authorized_keys confines refuses to reach another host.
    matches!(
        error.code(),
        Auth | HostKey | HostUnreachable | Interrupted | MissingRequirement | Refused
    )
}

async fn local(pair: &mut Pair, first: u32, links: u16) -> Result<Next> {
    for link in numbers(first, links) {
        let listening = listen(pair, Side::Destination, link).await?;
        dial(pair, Side::Source, Vec::new(), Vec::new(), &listening).await?;
    }
    Ok(Next::Dialed(Side::Source, Vec::new()))
}

/// Has one side reach the other: gives back which, and what the other listens on.
async fn direct(pair: &mut Pair, first: u32, links: u16) -> Result<(Side, Vec<Listening>)> {
    let (listener, dialer) = if pair.destination.host().is_local() {
        (Side::Source, Side::Destination)
    } else {
        (Side::Destination, Side::Source)
    };
    let dialer_is_local = pair.side(dialer).host().is_local();
    let (host, path) = {
        let agent = pair.side(listener);
        (agent.host().clone(), agent.agent_path().clone())
    };
    let mut all = Vec::new();
    for link in numbers(first, links) {
        let listening = listen(pair, listener, link).await?;
        let (command, known_hosts) = if dialer_is_local {
            let argv = host.attach_argv(&path, &listening.name, way(first, link));
            let argv = argv.await?.into_iter().map(OsStringExt::into_vec);
            (argv.collect(), Vec::new())
        } else {
            host.dial_command(&path, &listening.name).await?
        };
        dial(pair, dialer, command, known_hosts, &listening).await?;
        all.push(listening);
    }
    Ok((dialer, all))
}

fn numbers(first: u32, links: u16) -> impl Iterator<Item = u32> {
    first..first + u32::from(links)
}

/// One ssh connection is one processor's worth of cipher: the first link is a channel of the
/// connection that is there, which costs no login, and each further one a connection of its own.
fn way(first: u32, link: u32) -> Attach {
    if link == first {
        Attach::Channel
    } else {
        Attach::Alone
    }
}

/// The newest version that both agents speak: each has been negotiated with this program.
fn link_version(pair: &Pair) -> u16 {
    pair.source.version().min(pair.destination.version())
}

async fn listen(pair: &mut Pair, side: Side, link: u32) -> Result<Listening> {
    let version = link_version(pair);
    match in_time(pair.ask(side, None, &Listen { link, version })).await? {
        Control::Listening(listening) if listening.link == link => Ok(listening),
        answer => Err(unexpected("listen", &answer)),
    }
}

/// Has a side reach the other. It has not done so yet: see [`Connection::complete`].
async fn dial(
    pair: &mut Pair,
    side: Side,
    command: Vec<Vec<u8>>,
    known_hosts: Vec<u8>,
    listening: &Listening,
) -> Result<()> {
    let dial = Dial {
        link: listening.link,
        version: link_version(pair),
        command,
        known_hosts,
        token: listening.token,
        name: listening.name.clone(),
    };
    pair.tell(side, &dial).await
}

/// Waits for what takes an agent no longer than it waits for a link itself.
async fn in_time(answer: impl Future<Output = Result<Control>>) -> Result<Control> {
    let answered = tokio::time::timeout(LINK_TIME, answer).await;
    answered.unwrap_or_else(|_| {
        let message = "an agent makes no data connection";
        Err(Error::new(ErrorCode::Interrupted, message))
    })
}

/// The token as `attach` reads it.
pub(super) fn token_line(token: &Token) -> String {
    let mut line: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
    line.push('\n');
    line
}
