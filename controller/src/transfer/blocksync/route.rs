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

use kvm_clone_protocol::message::{Control, Dial, Listen, Listening, Message, Token};
use kvm_clone_protocol::preamble::Versions;

use super::pair::{Pair, Side, unexpected};
use super::relay::Relay;
use crate::error::{Error, ErrorCode, Result};
use crate::transfer::request::RouteChoice;
use crate::transfer::result::Route;

/// How long the making of a link may take: an agent gives up after 30 s.
pub(super) const LINK_TIME: Duration = Duration::from_secs(40);

/// The agents' data connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) route: Route,
    /// The number of the link, the same on both sides.
    pub(super) link: u32,
    /// The protocol version on it.
    pub(super) version: u16,
    pub(super) relay: Option<Relay>,
}

/// Connects the agents.
///
/// # Errors
/// When the chosen route cannot be had.
///
/// `disk` numbers the connection, and a second one where the first try fails.
pub(super) async fn connect(pair: &mut Pair, choice: RouteChoice, disk: u32) -> Result<Connection> {
    let link = disk.saturating_mul(2);
    let is_local = |side: &crate::host::AgentConnection| side.host().is_local();
    let one_host = pair.source.host().spec() == pair.destination.host().spec();
    match choice {
        RouteChoice::Relay => relay(pair, link).await,
        _ if one_host => {
            let listening = listen(pair, Side::Destination, link).await?;
            dial(pair, Side::Source, Vec::new(), Vec::new(), &listening).await?;
            Ok(Connection {
                route: Route::Local,
                link,
                version: link_version(pair),
                relay: None,
            })
        }
        RouteChoice::Direct => direct(pair, link).await,
        RouteChoice::Auto if is_local(&pair.source) || is_local(&pair.destination) => {
            direct(pair, link).await
        }
        RouteChoice::Auto => match direct(pair, link).await {
            Err(error) if is_about_the_way(&error) => {
                tracing::info!("no direct route: {}", error.one_line());
                relay(pair, link + 1).await
            }
            result => result,
        },
    }
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

async fn direct(pair: &mut Pair, link: u32) -> Result<Connection> {
    let (listener, dialer) = if pair.destination.host().is_local() {
        (Side::Source, Side::Destination)
    } else {
        (Side::Destination, Side::Source)
    };
    let dialer_is_local = pair.side(dialer).host().is_local();
    let listening = listen(pair, listener, link).await?;
    let (host, path) = {
        let agent = pair.side(listener);
        (agent.host().clone(), agent.agent_path().clone())
    };
    let (command, known_hosts) = if dialer_is_local {
        // This machine reaches the host already: one more channel of that connection.
        let argv = host.attach_argv(&path, &listening.name).await?;
        (
            argv.into_iter().map(OsStringExt::into_vec).collect(),
            Vec::new(),
        )
    } else {
        host.dial_command(&path, &listening.name).await?
    };
    let from = pair.side(dialer).host().to_string();
    dial(pair, dialer, command, known_hosts, &listening)
        .await
        .map_err(|error| {
            if error.code() != ErrorCode::Interrupted {
                return error;
            }
            let said = error.to_string();
            let code = host.explain(&said).code();
            Error::new(code, format!("{from} does not reach {host} directly"))
                .caused_by(said)
                .hint("let it log in there (--forward-agent, or a key of its own), or use --route relay")
        })?;
    Ok(Connection {
        route: Route::Direct,
        link,
        version: link_version(pair),
        relay: None,
    })
}

async fn relay(pair: &mut Pair, link: u32) -> Result<Connection> {
    let source = listen(pair, Side::Source, link).await?;
    let destination = listen(pair, Side::Destination, link).await?;
    let versions = Versions::only(link_version(pair));
    let ends = [(&pair.source, &source), (&pair.destination, &destination)];
    let relay = Relay::start(ends, versions).await?;
    Ok(Connection {
        route: Route::Relay,
        link,
        version: link_version(pair),
        relay: Some(relay),
    })
}

/// The newest version that both agents speak: each has been negotiated with this program.
fn link_version(pair: &Pair) -> u16 {
    pair.source.version().min(pair.destination.version())
}

async fn listen(pair: &mut Pair, side: Side, link: u32) -> Result<Listening> {
    let version = link_version(pair);
    match ask_now(pair, side, &Listen { link, version }).await? {
        Control::Listening(listening) if listening.link == link => Ok(listening),
        answer => Err(unexpected("listen", &answer)),
    }
}

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
    match ask_now(pair, side, &dial).await? {
        Control::Dialed(dialed) if dialed.link == dial.link => Ok(()),
        answer => Err(unexpected("dial", &answer)),
    }
}

/// Asks for what takes an agent no longer than it waits for a link itself.
async fn ask_now<M: Message>(pair: &mut Pair, side: Side, request: &M) -> Result<Control> {
    let asked = tokio::time::timeout(LINK_TIME, pair.ask(side, None, request)).await;
    asked.unwrap_or_else(|_| {
        let host = pair.side(side).host();
        let message = format!("{host} makes no data connection");
        Err(Error::new(ErrorCode::Interrupted, message))
    })
}

/// The token as `attach` reads it.
pub(super) fn token_line(token: &Token) -> String {
    let mut line: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
    line.push('\n');
    line
}
