//! The protocol, spoken by hand: a controller, or a source, that does as it likes.
//!
//! Everything else here uses the programs as a user does. This plays those who do not keep to the
//! rules, which no program of ours can be made to do.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use bytes::BytesMut;
use kvm_clone_protocol::frame::{self, Frame};
use kvm_clone_protocol::message::{Control, Hello, Message};
use kvm_clone_protocol::preamble::{self, Preamble, SUPPORTED};

/// One end of a connection.
pub struct Wire {
    input: Box<dyn Read + Send>,
    output: Box<dyn Write + Send>,
    buffer: BytesMut,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Wire {
    /// What comes is read from `input`, what goes is written to `output`.
    pub fn new(input: impl Read + Send + 'static, output: impl Write + Send + 'static) -> Self {
        Self {
            input: Box::new(input),
            output: Box::new(output),
            buffer: BytesMut::new(),
        }
    }

    /// Writes bytes. The other end may be gone, which shows in what is read.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self
            .output
            .write_all(bytes)
            .and_then(|()| self.output.flush());
    }

    /// Sends a frame, whatever it holds.
    pub fn send_frame(&mut self, frame: &Frame) {
        self.write(&frame.encode());
    }

    /// Sends a message.
    ///
    /// # Panics
    /// When it fits no frame.
    pub fn send(&mut self, message: &impl Message) {
        self.send_frame(&message.frame().expect("a message of a test is short"));
    }

    /// Exchanges preambles; false when the other end hangs up instead.
    pub fn greet(&mut self) -> bool {
        self.write(&Preamble::of_this_build(SUPPORTED).encode());
        loop {
            match preamble::find(&mut self.buffer) {
                Ok(Some(_)) => return true,
                Ok(None) if self.fill() => {}
                _ => return false,
            }
        }
    }

    /// The next frame; `None` at the end.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            match frame::decode(&mut self.buffer) {
                Ok(Some(frame)) => return Some(frame),
                Ok(None) if self.fill() => {}
                _ => return None,
            }
        }
    }

    fn fill(&mut self) -> bool {
        let mut bytes = [0; 64 * 1024];
        let n = self.input.read(&mut bytes).unwrap_or(0);
        self.buffer.extend_from_slice(&bytes[..n]);
        n > 0
    }
}

/// A controller that asks an agent for whatever it likes.
#[derive(Debug)]
pub struct Caller {
    child: Child,
    wire: Option<Wire>,
}

impl Caller {
    /// Speaks with the agent that a command starts.
    ///
    /// # Panics
    /// When none answers.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let pipes = child.stdout.take().zip(child.stdin.take());
        let (stdout, stdin) = pipes.expect("piped above");
        let mut wire = Wire::new(stdout, stdin);
        assert!(wire.greet(), "no agent answers {command:?}");
        wire.send(&Hello {
            release: "test".to_owned(),
            version: SUPPORTED.max,
        });
        let mut caller = Self {
            child,
            wire: Some(wire),
        };
        let welcome = caller.hear();
        assert!(matches!(welcome, Control::Welcome(_)), "{welcome:?}");
        caller
    }

    /// Asks, and gives the next answer.
    pub fn ask(&mut self, request: &impl Message) -> Control {
        self.say(request);
        self.hear()
    }

    /// Asks for something that is answered later.
    pub fn say(&mut self, request: &impl Message) {
        self.wire().send(request);
    }

    /// The next thing that is more than a sign of life or a warning.
    ///
    /// # Panics
    /// When the agent hangs up.
    pub fn hear(&mut self) -> Control {
        loop {
            let frame = self.wire().next_frame().expect("the agent answers");
            match Control::read(&frame).expect("an agent sends messages") {
                Control::Alive(_) | Control::Warning(_) | Control::Progress(_) => {}
                answer => return answer,
            }
        }
    }

    fn wire(&mut self) -> &mut Wire {
        self.wire.as_mut().expect("there until this is dropped")
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // The agent ends with its input.
        drop(self.wire.take());
        let _ = self.child.wait();
    }
}
