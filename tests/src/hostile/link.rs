//! A data connection to an agent, with the test as the other peer.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kvm_clone_protocol::frame::{Frame, FrameKind};
use kvm_clone_protocol::message::{Holes, Listening, Stream, Token};
use kvm_clone_protocol::preamble::{Preamble, SUPPORTED, Versions};

use super::agent::binary;
use super::connection::{self, Incoming};

/// `kvm-clone-agent attach`, and its pipes.
#[derive(Debug)]
pub struct Link {
    child: Option<Child>,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    incoming: Option<Incoming>,
}

/// The pipes of an `attach`, which goes on by itself.
#[derive(Debug)]
pub struct Streams {
    pub input: ChildStdin,
    pub output: ChildStdout,
}

/// The token as `attach` reads it.
#[must_use]
pub fn token_line(token: &Token) -> String {
    let hex: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
    hex + "\n"
}

impl Link {
    /// Attaches to an agent with its token, and says nothing else.
    #[must_use]
    pub fn attach(listening: &Listening) -> Self {
        Self::attach_with(&listening.name, &token_line(&listening.token))
    }

    /// Attaches with any token.
    ///
    /// # Panics
    /// When the agent's binary cannot be started.
    #[must_use]
    pub fn attach_with(name: &str, token: &str) -> Self {
        let mut child = Command::new(binary())
            .args(["attach", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the agent can be executed");
        let mut stdin = child.stdin.take().expect("piped");
        // One that is not admitted may be gone already.
        let _ = stdin.write_all(token.as_bytes());
        Self {
            stdin: Some(stdin),
            stdout: child.stdout.take(),
            incoming: None,
            child: Some(child),
        }
    }

    /// Says the preamble, and reads whatever comes from here on.
    #[must_use]
    pub fn greeted(listening: &Listening) -> Self {
        let mut link = Self::deaf(listening);
        link.listen();
        link
    }

    /// Says the preamble, and reads nothing.
    #[must_use]
    pub fn deaf(listening: &Listening) -> Self {
        let mut link = Self::attach(listening);
        let ours = Versions::only(SUPPORTED.max);
        link.write(&Preamble::of_this_build(ours).encode());
        link
    }

    /// The pipes, for somebody else to use. `attach` ends with its agent's end of the link.
    ///
    /// # Panics
    /// When they are in use.
    #[must_use]
    pub fn into_streams(mut self) -> Streams {
        let mut child = self.child.take().expect("it lives as long as this");
        std::thread::spawn(move || child.wait());
        Streams {
            input: self.stdin.take().expect("nothing has ended yet"),
            output: self.stdout.take().expect("nothing was read yet"),
        }
    }

    /// Reads whatever comes from here on.
    pub fn listen(&mut self) {
        self.incoming = self.stdout.take().map(Incoming::start);
        if let Some(incoming) = &self.incoming {
            let _ = incoming.preamble();
        }
    }

    /// Writes any bytes; false when the agent has closed the link.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        match &mut self.stdin {
            Some(stdin) => connection::write(stdin, bytes),
            None => false,
        }
    }

    /// Sends nothing more, as a peer that died.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// The next frame, signs of life apart; `None` when the agent has closed the link.
    ///
    /// # Panics
    /// When nothing comes for too long, or this end is deaf.
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "it waits for a peer, which is no iteration"
    )]
    pub fn next(&mut self) -> Option<Frame> {
        let incoming = self.incoming.as_ref().expect("this end listens");
        loop {
            let frame = incoming.next()?;
            if frame.kind != FrameKind::Beat {
                return Some(frame);
            }
        }
    }

    /// Reads until the receiver has told of all blocks below `count`.
    ///
    /// # Panics
    /// When it ends before.
    pub fn hear_all(&mut self, count: u64) {
        let mut told = 0;
        while told < count {
            let frame = self.next().expect("a receiver that tells of its blocks");
            match Stream::read(&frame) {
                Ok(Stream::Digests(_)) => told += frame.payload.len() as u64 / 16,
                Ok(Stream::Holes(Holes { run })) => told += run.count,
                other => panic!("a receiver tells of its blocks, and says {other:?}"),
            }
        }
    }

    /// Claims that the agent closes the link before it says anything.
    ///
    /// # Panics
    /// When it does not.
    pub fn expect_closed_at_once(mut self) {
        let mut said = Vec::new();
        let mut stdout = self.stdout.take().expect("nothing was read yet");
        let _ = stdout.read_to_end(&mut said);
        assert_eq!(said, b"", "the agent speaks");
    }

    /// Claims that the agent closes the link; what it still sends does not matter.
    ///
    /// # Panics
    /// When it does not.
    pub fn expect_closed(&mut self) {
        match (&self.incoming, self.stdout.take()) {
            (Some(_), _) => while self.next().is_some() {},
            (None, Some(mut stdout)) => {
                let _ = stdout.read_to_end(&mut Vec::new());
            }
            (None, None) => {}
        }
        self.stdin = None;
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
