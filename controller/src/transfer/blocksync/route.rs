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

use super::pair::{Pair, Side, answers, unexpected};
use super::relay::Relay;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Attach;
use crate::transfer::request::RouteChoice;
use crate::transfer::result::Route;

/// How long the making of a link may take: an agent gives up after 30 s.
pub(super) const LINK_TIME: Duration = Duration::from_secs(40);

/// The numbers of the links of one disk: as many for the first try as for a second one.
const NUMBERS: u32 = 2 * LINKS;
const LINKS: u32 = MAX_STREAMS as u32;

/// The agents' data connections for one disk.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) route: Route,
    /// The number of the first link, the same on both sides.
    pub(super) link: u32,
    /// How many there are, numbered from that on.
    pub(super) links: u16,
    /// The protocol version on them.
    pub(super) version: u16,
    pub(super) relays: Vec<Relay>,
    /// The side that is about to tell whether it has reached the other.
    pub(super) dialing: Option<Side>,
}

/// Connects the agents by so many links. Where there is no other way than the one that is taken, they
/// may still be on it: see [`dialed`].
///
/// # Errors
/// When the chosen route cannot be had.
///
/// `disk` numbers the links, and others where the first try fails.
pub(super) async fn connect(
    pair: &mut Pair,
    choice: RouteChoice,
    disk: u32,
    links: u16,
) -> Result<Connection> {
    let first = disk.saturating_mul(NUMBERS);
    let is_local = |side: &crate::host::AgentConnection| side.host().is_local();
    let has_choice = !is_local(&pair.source) && !is_local(&pair.destination);
    match choice {
        RouteChoice::Relay => relay(pair, first, links).await,
        _ if pair.is_one_host() => local(pair, first, links).await,
        RouteChoice::Auto if has_choice => {
            let mut connection = direct(pair, first, links).await?;
            match dialed(pair, &mut connection).await {
                Err(Unreached { error, .. }) if is_about_the_way(&error) => {
                    tracing::info!("no direct route: {}", error.one_line());
                    relay(pair, first + LINKS, links).await
                }
                Err(Unreached { error, .. }) => Err(error),
                Ok(()) => Ok(connection),
            }
        }
        RouteChoice::Direct | RouteChoice::Auto => direct(pair, first, links).await,
    }
}

/// The side that was to dial has not reached the other by any link.
#[derive(Debug)]
pub(super) struct Unreached {
    pub(super) dialing: Side,
    pub(super) error: Error,
}

/// Waits until the side that dials has reached the other, by one link at least: a session does
/// without the others.
///
/// # Errors
/// [`Unreached`] when it has not.
pub(super) async fn dialed(pair: &mut Pair, connection: &mut Connection) -> Result<(), Unreached> {
    let Some(dialing) = connection.dialing.take() else {
        return Ok(());
    };
    let links = connection.link..connection.link + u32::from(connection.links);
    let (mut reached, mut missed) = (false, None);
    for _ in links.clone() {
        // The disk may be heard of already.
        let is_it = |said: &Control| answers(said, None) && !matches!(said, Control::Started(_));
        match in_time(pair.answer(dialing, is_it)).await {
            Ok(Control::Dialed(dialed)) if links.contains(&dialed.link) => reached = true,
            Ok(answer) => {
                let error = unexpected("dial", &answer);
                return Err(Unreached { dialing, error });
            }
            Err(error) => {
                tracing::info!("a data connection less: {}", error.one_line());
                missed.get_or_insert(error);
            }
        }
    }
    match missed {
        Some(error) if !reached => {
            let error = match connection.route {
                Route::Direct => unreached(pair, dialing, error),
                Route::Local | Route::Relay => error,
            };
            Err(Unreached { dialing, error })
        }
        _ => Ok(()),
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

async fn local(pair: &mut Pair, first: u32, links: u16) -> Result<Connection> {
    for link in numbers(first, links) {
        let listening = listen(pair, Side::Destination, link).await?;
        dial(pair, Side::Source, Vec::new(), Vec::new(), &listening).await?;
    }
    let dialing = Some(Side::Source);
    Ok(Connection::new(pair, Route::Local, first, links, dialing))
}

async fn direct(pair: &mut Pair, first: u32, links: u16) -> Result<Connection> {
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
    }
    let dialing = Some(dialer);
    Ok(Connection::new(pair, Route::Direct, first, links, dialing))
}

async fn relay(pair: &mut Pair, first: u32, links: u16) -> Result<Connection> {
    let mut connection = Connection::new(pair, Route::Relay, first, links, None);
    let versions = Versions::only(connection.version);
    for link in numbers(first, links) {
        let source = listen(pair, Side::Source, link).await?;
        let destination = listen(pair, Side::Destination, link).await?;
        let ends = [(&pair.source, &source), (&pair.destination, &destination)];
        let relay = Relay::start(ends, versions, way(first, link)).await?;
        connection.relays.push(relay);
    }
    Ok(connection)
}

impl Connection {
    fn new(pair: &Pair, route: Route, link: u32, links: u16, dialing: Option<Side>) -> Self {
        Self {
            route,
            link,
            links,
            version: link_version(pair),
            relays: Vec::new(),
            dialing,
        }
    }
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

/// Has a side reach the other. It has not done so yet: see [`dialed`].
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
