//! The messages: what the meta of each kind of frame holds.
//!
//! A published message is frozen: postcard is positional, so a field that is added, removed or
//! retyped makes another message, under a new protocol version. `tests/wire_pins.rs` holds the
//! bytes of every one.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::{Digest, HashKind, Seed};
use crate::frame::{Frame, FrameKind, MAX_META};
use crate::units::BlockRun;

/// A message that is the meta of one kind of frame.
pub trait Message: Serialize + DeserializeOwned {
    /// The kind of its frames.
    const KIND: FrameKind;

    /// The frame without payload.
    ///
    /// # Errors
    /// [`MessageError::TooLong`] when it does not fit a frame: a path or a list that is too long.
    fn frame(&self) -> Result<Frame, MessageError> {
        let meta = postcard::to_stdvec(self).expect("plain structures in memory always serialise");
        if meta.len() > MAX_META {
            return Err(MessageError::TooLong {
                kind: Self::KIND,
                len: meta.len(),
            });
        }
        Ok(Frame {
            kind: Self::KIND,
            meta: meta.into(),
            payload: Bytes::new(),
        })
    }
}

/// A frame that does not hold the message that its kind promises.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MessageError {
    /// The meta is not the message.
    #[error("a {kind:?} frame whose meta cannot be read")]
    Malformed {
        /// The frame's kind.
        kind: FrameKind,
    },
    /// A kind that has no business on this connection.
    #[error("a {kind:?} frame on a connection that carries none")]
    Misplaced {
        /// The frame's kind.
        kind: FrameKind,
    },
    /// The message does not fit a frame.
    #[error("a {kind:?} message of {len} bytes does not fit a frame of {MAX_META}")]
    TooLong {
        /// The message's kind.
        kind: FrameKind,
        /// Its length in bytes.
        len: usize,
    },
}

/// Reads the meta of `frame` as `M`; bytes left over are an error too.
fn read<M: Message>(frame: &Frame) -> Result<M, MessageError> {
    match postcard::take_from_bytes(&frame.meta) {
        Ok((message, [])) => Ok(message),
        _ => Err(MessageError::Malformed { kind: frame.kind }),
    }
}

/// Ties messages to their kinds, and gathers those of one sort of connection in an enum.
macro_rules! messages {
    ($(#[$doc:meta])* $family:ident { $($name:ident),* $(,)? }) => {
        $(impl Message for $name {
            const KIND: FrameKind = FrameKind::$name;
        })*

        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[expect(missing_docs, reason = "each variant is the message of the same name")]
        pub enum $family {
            $($name($name)),*
        }

        impl $family {
            /// The kind of its frame: what errors name, since a message itself may be long.
            pub fn kind(&self) -> FrameKind {
                match self {
                    $(Self::$name(_) => FrameKind::$name,)*
                }
            }

            /// Reads the message of a frame.
            ///
            /// # Errors
            /// [`MessageError`] when the frame's kind does not belong here, or its meta is not
            /// what the kind promises.
            pub fn read(frame: &Frame) -> Result<Self, MessageError> {
                match frame.kind {
                    $(FrameKind::$name => read(frame).map(Self::$name),)*
                    kind => Err(MessageError::Misplaced { kind }),
                }
            }

            /// The frame of the message, without payload.
            ///
            /// # Errors
            /// As [`Message::frame`].
            pub fn frame(&self) -> Result<Frame, MessageError> {
                match self {
                    $(Self::$name(message) => message.frame(),)*
                }
            }
        }
    };
}

messages! {
    /// What travels on a control connection, in either direction.
    Control {
        Hello, Welcome, Open, Opened, Listen, Listening, Dial, Dialed, Start, Started, Progress,
        Ended, Prepare, Prepared, Commit, Committed, Abort, Failed, Alive, Warning, Recover,
        Leftover, Recovered, Preserve, Preserved, Summarize, Summary,
    }
}

messages! {
    /// What travels on a data connection, in either direction. The raw bytes of `Digests` and
    /// `Data` stay in the frame's payload.
    Stream { Digests, Holes, Data, Zeros, Settled, Credit, End, Agreed, Beat, Place }
}

/// Controller to agent, first: who calls, and the version chosen from both preambles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The controller's release, such as `0.1.0`.
    pub release: String,
    /// The newest version that both preambles allow.
    pub version: u16,
}

/// Agent to controller: the answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The agent's release.
    pub release: String,
    /// The machine as `uname -m` names it.
    pub arch: String,
    /// BLAKE3 of the agent's own executable: the controller compares it with what it sent.
    pub agent_digest: [u8; 32],
    /// `/proc/sys/kernel/random/boot_id`: two agents with the same one share a kernel.
    pub boot_id: String,
    /// The processor has AES instructions.
    pub aes: bool,
    /// Effective user.
    pub uid: u32,
    /// Processors that the agent may use.
    pub processors: u16,
}

/// What a disk is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Read it; it must exist.
    Source,
    /// Make it hold what the source holds; it need not exist.
    Destination,
    /// Read it to compare; it must exist.
    Compare,
    /// Read it although it may be in use; it must exist. What is read may be torn.
    LiveSource,
}

impl Access {
    /// Whether a sender reads it.
    pub fn is_source(self) -> bool {
        matches!(self, Self::Source | Self::LiveSource)
    }
}

/// Controller to agent: open a disk under a number of the controller's choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The disk's number on this control connection.
    pub disk: u32,
    /// Where it is.
    pub location: Location,
    /// What for.
    pub access: Access,
}

/// Where on its host a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Location {
    /// Absolute path of a file or a block device, as bytes: it need not be UTF-8.
    Path(Vec<u8>),
    /// What an NBD server on the host exports.
    Export(NbdExport),
}

/// An export of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdExport {
    /// Where the server listens.
    pub server: NbdServer,
    /// What the server calls it; may be empty.
    pub name: String,
    /// By what the run before is built upon; `None`: all of it is read.
    pub history: Option<History>,
}

/// What an export shows, from run to run. Nothing about an export tells its versions apart, so the
/// controller names them: it makes what the export shows, and knows whether it was changed since.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct History {
    /// Path of the image that holds it.
    pub image: Vec<u8>,
    /// The version that the last run left; `None` where there is none that can be built upon.
    pub was: Option<String>,
    /// The version that it is once this run has ended.
    pub becomes: String,
    /// The metadata context of the export that tells what was changed since the version it was;
    /// `None`: nothing was.
    pub changed: Option<String>,
}

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NbdServer {
    /// Absolute path of a Unix socket.
    Unix(Vec<u8>),
    /// TCP port of the host's loopback.
    Loopback(u16),
}

/// What a location turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskKind {
    /// A regular file.
    File,
    /// A block device.
    Device,
    /// Nothing yet: a regular file will be made.
    Missing,
    /// An export of an NBD server.
    Export,
}

/// What tells one storage from another on one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The device of the file system, or zero for a block device.
    pub device: u64,
    /// The inode, or the number of the block device itself.
    pub inode: u64,
}

/// Agent to controller: the answer to [`Open`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The disk's number.
    pub disk: u32,
    /// File, device, nothing yet, or an export.
    pub kind: DiskKind,
    /// Size in bytes; of a destination that an interrupted run began, what that run left.
    pub size: u64,
    /// `None` for a destination that does not exist, and for an export.
    pub identity: Option<Identity>,
    /// An interrupted run left a part of this destination, which is taken up.
    pub resumed: bool,
    /// What two hosts that share this storage would both call it; empty where none can tell.
    pub storage: Vec<u8>,
    /// How the digests of a destination are made that its agent has kept from an earlier run.
    pub keeps: Option<Keeps>,
}

/// How digests are made that are kept from one run to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeps {
    /// The function.
    pub hash: HashKind,
    /// The seed of a source and a destination.
    pub seed: Seed,
}

/// Controller to agent: expect a data connection, which `kvm-clone-agent attach` will bring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// The data connection's number on this control connection.
    pub link: u32,
    /// The protocol version of the data connection, which both agents must understand.
    pub version: u16,
}

/// Agent to controller: the answer to [`Listen`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// The data connection's number.
    pub link: u32,
    /// The argument of `attach`: letters and digits only.
    pub name: String,
    /// What `attach` must be told first on its standard input. Good for one connection.
    pub token: Token,
}

/// Controller to agent: make a data connection by running a command whose standard input and
/// output are the other agent's `attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// The data connection's number on this control connection.
    pub link: u32,
    /// The protocol version of the data connection, the same as in [`Listen`].
    pub version: u16,
    /// Program and arguments. `{known_hosts}` inside an argument stands for the path of a file
    /// with the lines of `known_hosts`. Empty: `attach` runs on this very host, by this binary.
    pub command: Vec<Vec<u8>>,
    /// Host keys for the command, in the format of ssh's known_hosts.
    pub known_hosts: Vec<u8>,
    /// Goes ahead on the command's standard input.
    pub token: Token,
    /// The listening agent's [`Listening::name`], for a local `attach`.
    pub name: String,
}

/// Proves to the listening agent that a data connection comes from the controller.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token(pub [u8; 16]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Agent to controller: the command of [`Dial`] runs and the other end has answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialed {
    /// The data connection's number.
    pub link: u32,
}

/// The half of a session that an agent plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Reads the source.
    Sender,
    /// Holds the destination.
    Receiver,
}

/// Whether blocks are compressed before they are shipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// Never.
    Off,
    /// Where the wire is the slower part and the data gives way, decided while the run goes.
    Auto,
    /// Always, at this zstd level (1 to 19).
    Level(u8),
}

/// How a disk is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoChoice {
    /// Through the page cache what is in it, past it what is not.
    Auto,
    /// Always through the page cache.
    Buffered,
    /// Always past it.
    Direct,
}

/// What a session does: the same for both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionParams {
    /// Size of the source in bytes: the session covers this much of the destination.
    pub size: u64,
    /// How blocks are digested.
    pub hash: HashKind,
    /// Under which seed.
    pub seed: Seed,
    /// The receiver digests what it has; otherwise it is known to read as zeros throughout.
    pub compare: bool,
    /// Differences are shipped; otherwise they are only counted.
    pub ship: bool,
}

/// How changes are to get into a destination that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApplyChoice {
    /// [`Reflink`](Self::Reflink) where the file system can, else [`Staged`](Self::Staged).
    Auto,
    /// Written where they belong: torn while the run is unfinished.
    Inplace,
    /// They wait beside the destination until all are there.
    Staged,
    /// They go into a copy that shares its blocks with the old version, and takes its name.
    Reflink,
}

/// How changes get into a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Apply {
    /// It did not exist: a file under a temporary name.
    New,
    /// As [`ApplyChoice::Inplace`].
    Inplace,
    /// As [`ApplyChoice::Staged`].
    Staged,
    /// As [`ApplyChoice::Reflink`].
    Reflink,
}

/// Controller to agent: play a session over a data connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The disk's number.
    pub disk: u32,
    /// The data connection's number.
    pub link: u32,
    /// Data connections of the session, numbered from `link` on: 1 to
    /// [`MAX_STREAMS`](crate::sync::MAX_STREAMS). The session begins with whichever comes first.
    pub links: u16,
    /// Which half.
    pub role: Role,
    /// What both ends must agree on.
    pub params: SessionParams,
    /// The sender's choice.
    pub compression: Compression,
    /// Bytes a second that the sender may write to the data connection; zero for no limit.
    pub rate_limit: u64,
    /// How a receiver that ships changes an existing destination.
    pub apply: ApplyChoice,
    /// Directory in which the changes of a block device wait; empty for the agent's own.
    pub stage_dir: Vec<u8>,
    /// The disk is read even where kept digests say what it holds.
    pub full_scan: bool,
    /// The sender keeps a reflink copy of its disk, by which the next run knows what was written
    /// since, where its file system keeps so many bytes free whatever is written; `None`: none stays.
    pub keep_sent: Option<u64>,
    /// How this agent reads the disk.
    pub io: IoChoice,
    /// From now on this agent leaves processor and disks to others first, for all of its disks.
    pub nice: bool,
    /// Bytes a second that this agent may read from all of its disks together; zero for no limit.
    /// Of several sessions the lowest counts.
    pub read_limit: u64,
}

/// Agent to controller: the session runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The disk's number.
    pub disk: u32,
    /// How changes get into the destination; `None` for a disk that is only read.
    pub apply: Option<Apply>,
    /// Changes of an interrupted run wait already, and are taken up.
    pub resumed: bool,
}

/// What a session did so far, seen from one end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes of this end's disk that are not holes, as far as it has been looked at.
    pub bytes_data: u64,
    /// Bytes read from this end's disk.
    pub bytes_read: u64,
    /// Bytes of this end's disk that were not read, because digests of them were kept.
    pub bytes_trusted: u64,
    /// Bytes received from and sent to the other end.
    pub bytes_wire: u64,
    /// Blocks that are settled: known to be equal, or shipped.
    pub blocks_settled: u64,
    /// Blocks whose data was shipped.
    pub blocks_changed: u64,
    /// Blocks that became zero at the destination.
    pub blocks_zeroed: u64,
    /// Bytes of the blocks that differed, the zeroed ones included.
    pub bytes_changed: u64,
}

/// Agent to controller, a few times a second.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The disk's number.
    pub disk: u32,
    /// So far.
    pub counters: Counters,
}

/// Agent to controller: the session is over, and all went well on this side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The disk's number.
    pub disk: u32,
    /// In all.
    pub counters: Counters,
    /// First block that differed.
    pub first_difference: Option<u64>,
    /// The root of the source's contents, on which both ends agreed; `None` when nothing was to
    /// be shipped.
    pub root: Option<Digest>,
}

/// Controller to the receiver's agent: make what was applied durable, and ready for its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The disk's number.
    pub disk: u32,
    /// Read the new contents once more, past the page cache.
    pub reread: bool,
}

/// Agent to controller: the answer to [`Prepare`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The disk's number.
    pub disk: u32,
    /// The root of what was read once more.
    pub root: Option<Digest>,
}

/// Controller to the receiver's agent: put what the commit of a prepared disk will overwrite where it
/// is not lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preserve {
    /// The disk's number.
    pub disk: u32,
    /// An image on that host, absolute: qcow2 with clusters of 64 KiB, which stands on the disk.
    pub path: Vec<u8>,
}

/// Agent to controller: the answer to [`Preserve`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preserved {
    /// The disk's number.
    pub disk: u32,
}

/// Controller to agent: read all of an open disk that is not to be changed, past the page cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summarize {
    /// The disk's number.
    pub disk: u32,
    /// How many bytes of it; what it has not reads as zeros.
    pub size: u64,
    /// How blocks are digested.
    pub hash: HashKind,
    /// Under which seed.
    pub seed: Seed,
}

/// Agent to controller: the answer to [`Summarize`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The disk's number.
    pub disk: u32,
    /// The root, as of a session over the same contents.
    pub root: Digest,
}

/// Controller to the receiver's agent: all disks are prepared; let them take their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The disks' numbers.
    pub disks: Vec<u32>,
}

/// Agent to controller: the answer to [`Commit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The disks' numbers.
    pub disks: Vec<u32>,
}

/// Controller to agent: stop; what can be resumed is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// For the agent's log.
    pub reason: String,
}

/// Why something failed: who has to act. The controller's exit codes follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureCode {
    /// The path does not exist.
    NotFound,
    /// Refused for safety; nothing was changed.
    Refused,
    /// Somebody else holds the disk.
    Busy,
    /// A disk could not be read or written.
    Io,
    /// No room on the destination.
    NoSpace,
    /// The host lacks a program or a capability.
    MissingRequirement,
    /// A data connection could not be made, or broke.
    LinkLost,
    /// The other end broke the protocol.
    Protocol,
    /// Source and destination differ after all.
    Mismatch,
    /// Stopped by the controller.
    Cancelled,
    /// A bug.
    Internal,
}

/// Agent to controller: the request, or the session, failed. The agent lives on for other disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Who has to act.
    pub code: FailureCode,
    /// The disk's number, where it is about one.
    pub disk: Option<u32>,
    /// The byte of the disk, where it is about one.
    pub offset: Option<u64>,
    /// For people; names the path.
    pub message: String,
}

/// Either side of a control connection, after a while without anything else to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {}

/// Agent to controller: what the user ought to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// The disk's number, where it is about one.
    pub disk: Option<u32>,
    /// For people; names the path.
    pub message: String,
}

/// What is done about runs that broke off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recovery {
    /// Nothing: they are listed.
    List,
    /// What was committed is finished; what was not is kept, to be taken up.
    Finish,
    /// What was committed is finished; what was not is removed.
    RollBack,
}

/// Controller to agent: see to what broken runs have left on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recover {
    /// What is done.
    pub recovery: Recovery,
}

/// What becomes, or became, of a destination whose run broke off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// A run is at it now; nothing was done.
    Running,
    /// It was committed, and is not finished.
    Unfinished,
    /// It was committed, and is finished: the destination is the new version.
    Finished,
    /// It was not committed; what has arrived waits for the next run.
    Waiting,
    /// It was not committed, and what had arrived is gone: the destination is the old version.
    RolledBack,
    /// It was written in place, and is torn until a run onto it has finished.
    Torn,
    /// It could not be seen to.
    Stuck,
}

/// Agent to controller, one for each destination, ahead of [`Recovered`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// The destination's path.
    pub path: Vec<u8>,
    /// What became of it.
    pub fate: Fate,
    /// For people: why, where that is not plain; or empty.
    pub message: String,
}

/// Agent to controller: the answer to [`Recover`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {}

/// Receiver to sender: digests of consecutive blocks, 16 bytes each in the payload. All zeros
/// stands for a block that holds only zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Index of the first block.
    pub first: u64,
}

/// Receiver to sender: these blocks read as zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holes {
    /// Which blocks.
    pub run: BlockRun,
}

/// How the payload of [`Data`] holds its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// Sender to receiver: a block that differs; its bytes are the payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// Index of the block.
    pub index: u64,
    /// How the payload holds it.
    pub encoding: Encoding,
}

/// Sender to receiver: these blocks become zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zeros {
    /// Which blocks.
    pub run: BlockRun,
}

/// Sender to receiver: all blocks below `next` were equal, or have been shipped. It lets the
/// receiver forget their digests and send more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// The first block that is not settled.
    pub next: u64,
}

/// Receiver to sender: so many bytes of `Data` payload have left the receiver's memory since the
/// session began, and [`CHANGE_COST`](crate::sync::CHANGE_COST) more for each `Data` and `Zeros`
/// that was applied. A total, not a difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Payload bytes and costs consumed.
    pub consumed: u64,
}

/// Sender to receiver: everything has been sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The root of the source's contents.
    pub root: Digest,
}

/// Receiver to sender: everything has been applied, and gives the same root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The root of the destination's contents.
    pub root: Digest,
}

/// Either side of a data connection, after a while without anything else to say. It is no part of
/// the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {}

/// Ahead of every frame but `Beat`, where a session has several data connections: the number of
/// the frame that comes next on this one. Each direction counts from zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The frame's number among all of its direction.
    pub number: u64,
}
