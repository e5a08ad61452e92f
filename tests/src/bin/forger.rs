//! A source host that somebody has taken over: started by authorized_keys in the agent's place, it
//! answers the controller as an agent would, and then does on the data connection what the file
//! `plan` says. `compromised.rs` sets it up.
//!
//! ```text
//!  direct   it gets the destination's name and token, and dials as often and as it likes
//!  relay    the controller attaches to it: another process of this program, which plays, and
//!           learns what the session is about from a file
//! ```

#![forbid(unsafe_code)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kvm_clone_protocol::digest::{
    Content, Digest, Digester, HashKind, RangeHasher, Seed, disk_root,
};
use kvm_clone_protocol::frame::Frame;
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::preamble::SUPPORTED;
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};
use kvm_clone_tests::process::wait_for;
use kvm_clone_tests::wire::Wire;

/// What it says that its disk has: four blocks, the last of them short.
const SIZE: u64 = 3 * BLOCK_SIZE + 100;

/// What its disk is full of.
const BYTE: u8 = 0xee;

/// A zstd frame of 128 KiB of one byte.
const BOMB: [u8; 13] = [
    0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 2, 0, 0x03, 0, 0x10, BYTE,
];

fn main() {
    let directory = std::env::args_os().nth(1).expect("the directory of a plan");
    let forger = Forger {
        directory: directory.into(),
    };
    let asked = std::env::var("SSH_ORIGINAL_COMMAND").unwrap_or_default();
    if asked.contains(" attach ") {
        forger.attach();
    } else {
        forger.serve();
    }
}

struct Forger {
    directory: PathBuf,
}

/// A data connection that it has made.
struct Link {
    wire: Wire,
    child: Child,
}

impl Forger {
    fn plan(&self) -> String {
        self.said("plan")
    }

    /// What the test wrote for it.
    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    /// Tells the test.
    fn log(&self, line: &str) {
        let path = self.directory.join("log");
        let log = fs::OpenOptions::new().create(true).append(true).open(path);
        let written = log.and_then(|mut log| log.write_all(format!("{line}\n").as_bytes()));
        written.expect("the directory of a plan is writable");
    }

    /// Answers the controller.
    fn serve(&self) {
        let mut control = Wire::new(std::io::stdin(), std::io::stdout());
        let (mut link, mut dialed) = (None, None);
        if !control.greet() {
            return;
        }
        while let Some(frame) = control.next_frame() {
            match Control::read(&frame).expect("a controller sends messages") {
                Control::Hello(_) => control.send(&welcome()),
                Control::Open(open) => control.send(&opened(open.disk)),
                Control::Listen(listen) => control.send(&Listening {
                    link: listen.link,
                    name: "forged".to_owned(),
                    token: Token([7; 16]),
                }),
                Control::Dial(dial) => {
                    if self.plan() == "tokens" {
                        self.try_tokens(&dial);
                    }
                    link = self.dial(&dial, &token_line(&dial.token), &dial.name);
                    match &link {
                        Some(_) => control.send(&Dialed { link: dial.link }),
                        None => control.send(&lost()),
                    }
                    dialed = Some(dial);
                }
                Control::Start(start) => {
                    control.send(&Started {
                        disk: start.disk,
                        apply: None,
                        resumed: false,
                    });
                    let agreed = match link.take() {
                        Some(link) => self.play_dialed(link, &start.params),
                        // The controller relays: who plays waits for this.
                        None => self.tell(&start.params),
                    };
                    if let Some(dial) = dialed.as_ref().filter(|_| self.plan() == "tokens") {
                        let again = self.dial(dial, &token_line(&dial.token), &dial.name);
                        self.log(&outcome("used token", again.is_some()));
                    }
                    if agreed {
                        control.send(&ended(&start));
                    } else {
                        control.send(&lost());
                    }
                }
                _ => {}
            }
        }
    }

    fn play_dialed(&self, mut link: Link, params: &SessionParams) -> bool {
        let agreed = play(
            &self.plan(),
            &self.said("neighbour"),
            params,
            &mut link.wire,
        );
        drop(link.wire);
        let _ = link.child.wait();
        agreed
    }

    /// Plays on a connection that the controller has made.
    fn attach(&self) {
        let mut token = [0; 33];
        let mut input = std::io::stdin();
        input.read_exact(&mut token).expect("a token comes first");
        let mut wire = Wire::new(input, std::io::stdout());
        if wire.greet() {
            let params = self.learn();
            play(&self.plan(), &self.said("neighbour"), &params, &mut wire);
        }
    }

    /// Hands what a session is about to the process that plays it.
    fn tell(&self, params: &SessionParams) -> bool {
        let text = format!(
            "{} {} {}",
            u8::from(params.compare),
            u8::from(params.hash == HashKind::Blake3),
            hex(&params.seed.0)
        );
        let path = self.directory.join("params");
        let new = path.with_extension("new");
        let told = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
        told.is_ok()
    }

    fn learn(&self) -> SessionParams {
        let path = self.directory.join("params");
        let text = wait_for("what the session is about", Duration::from_secs(20), || {
            fs::read_to_string(&path).ok()
        });
        let words: Vec<&str> = text.split(' ').collect();
        let mut seed = [0; 32];
        for (byte, pair) in seed.iter_mut().zip(words[2].as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).expect("hexadecimal digits");
            *byte = u8::from_str_radix(pair, 16).expect("hexadecimal digits");
        }
        SessionParams {
            size: SIZE,
            hash: match words[1] {
                "1" => HashKind::Blake3,
                _ => HashKind::Xxh3,
            },
            seed: Seed(seed),
            compare: words[0] == "1",
            ship: true,
        }
    }

    /// Tries to get in without the right token, or to somebody else.
    fn try_tokens(&self, dial: &Dial) {
        let mut wrong = dial.token;
        wrong.0[15] ^= 1;
        let other = self.said("other");
        for (what, line, name) in [
            ("wrong token", token_line(&wrong), &dial.name),
            ("no token", "x".repeat(33), &dial.name),
            (
                "half a token",
                token_line(&dial.token)[..20].to_owned(),
                &dial.name,
            ),
            ("another session", token_line(&dial.token), &other),
        ] {
            let got = self.dial(dial, &line, name);
            self.log(&outcome(what, got.is_some()));
        }
    }

    /// Runs the controller's command, with any token and any name.
    fn dial(&self, dial: &Dial, line: &str, name: &str) -> Option<Link> {
        let known_hosts = self.directory.join("known_hosts");
        fs::write(&known_hosts, &dial.known_hosts).expect("the directory of a plan is writable");
        let path = known_hosts.to_str().expect("a laboratory has a plain path");
        let word = |word: &Vec<u8>| {
            String::from_utf8_lossy(word)
                .replace("{known_hosts}", path)
                .replace(&dial.name, name)
        };
        let words: Vec<String> = dial.command.iter().map(word).collect();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("ssh is installed");
        let mut stdin = child.stdin.take().expect("piped above");
        let stdout = child.stdout.take().expect("piped above");
        let _ = stdin.write_all(line.as_bytes());
        if line.len() < 33 {
            drop(stdin);
            let _ = child.wait();
            return None;
        }
        let mut wire = Wire::new(stdout, stdin);
        if wire.greet() {
            return Some(Link { wire, child });
        }
        drop(wire);
        let _ = child.wait();
        None
    }
}

/// Does what the plan says; tells whether the receiver agreed.
fn play(plan: &str, neighbour: &str, params: &SessionParams, wire: &mut Wire) -> bool {
    let blocks = geometry().block_count();
    let mut heard = if params.compare { 0 } else { blocks };
    while heard < blocks {
        let Some(frame) = wire.next_frame() else {
            return false;
        };
        heard += match Stream::read(&frame) {
            Ok(Stream::Digests(_)) => frame.payload.len() as u64 / 16,
            Ok(Stream::Holes(holes)) => holes.run.count,
            _ => 0,
        };
    }
    for frame in frames(plan, neighbour, params) {
        wire.send_frame(&frame);
    }
    if plan == "cut" {
        return false;
    }
    while let Some(frame) = wire.next_frame() {
        if let Ok(Stream::Agreed(_)) = Stream::read(&frame) {
            return true;
        }
    }
    false
}

fn frames(plan: &str, neighbour: &str, params: &SessionParams) -> Vec<Frame> {
    let honest: Vec<Frame> = (0..geometry().block_count()).map(block).collect();
    let end = vec![frame(&End { root: root(params) })];
    let run = |first, count| BlockRun { first, count };
    match plan {
        "spoil" | "tokens" => [honest, end].concat(),
        "cut" => honest[..1].to_vec(),
        "root" => [
            honest,
            vec![frame(&End {
                root: Digest([1; 16]),
            })],
        ]
        .concat(),
        "control" => [forged_control(neighbour, params), honest, end].concat(),
        "open" => [forged_control(neighbour, params)[..1].to_vec(), honest, end].concat(),
        "commit" => [honest, vec![frame(&Commit { disks: vec![0] })], end].concat(),
        "abort" => [honest, vec![frame(&abort())], end].concat(),
        "data beyond" => vec![block(4)],
        "data far beyond" => vec![block(u64::MAX)],
        "data back" => vec![block(1), block(0)],
        "zeros beyond" => vec![frame(&Zeros { run: run(3, 2) })],
        "zeros far beyond" => vec![frame(&Zeros {
            run: run(1, u64::MAX),
        })],
        "settled beyond" => vec![frame(&Settled { next: u64::MAX })],
        "long block" => vec![with_payload(0, Encoding::Raw, vec![BYTE; BLOCK_LEN + 1])],
        "bomb" => vec![with_payload(0, Encoding::Zstd, BOMB.to_vec())],
        other => panic!("there is no plan {other:?}"),
    }
}

/// Everything by which a controller changes something.
fn forged_control(neighbour: &str, params: &SessionParams) -> Vec<Frame> {
    let touched = format!("{neighbour}.touched");
    vec![
        frame(&Open {
            disk: 7,
            location: Location::Path(neighbour.as_bytes().to_vec()),
            access: Access::Destination,
        }),
        frame(&Listen {
            link: 7,
            version: SUPPORTED.max,
        }),
        frame(&Start {
            disk: 7,
            link: 7,
            links: 1,
            role: Role::Receiver,
            params: *params,
            compression: Compression::Off,
            rate_limit: 0,
            apply: ApplyChoice::Inplace,
            stage_dir: Vec::new(),
            full_scan: false,
            keep_sent: None,
            io: IoChoice::Auto,
            nice: false,
            read_limit: 0,
        }),
        frame(&Prepare {
            disk: 0,
            reread: false,
        }),
        frame(&Commit { disks: vec![0] }),
        frame(&Commit { disks: vec![7] }),
        frame(&Recover {
            recovery: Recovery::RollBack,
        }),
        frame(&Dial {
            link: 8,
            version: SUPPORTED.max,
            command: vec![b"touch".to_vec(), touched.into_bytes()],
            known_hosts: Vec::new(),
            token: Token([0; 16]),
            name: String::new(),
        }),
        frame(&abort()),
    ]
}

fn abort() -> Abort {
    Abort {
        reason: "forged".to_owned(),
    }
}

fn frame(message: &impl Message) -> Frame {
    message.frame().expect("a message of a test is short")
}

fn with_payload(index: u64, encoding: Encoding, payload: Vec<u8>) -> Frame {
    Frame {
        payload: payload.into(),
        ..frame(&Data { index, encoding })
    }
}

/// A block of its disk, or of what would lie behind its end.
fn block(index: u64) -> Frame {
    let inside = index < geometry().block_count();
    let len = if inside {
        geometry().block_len(index)
    } else {
        BLOCK_LEN
    };
    with_payload(index, Encoding::Raw, vec![BYTE; len])
}

fn geometry() -> Geometry {
    Geometry::new(SIZE).expect("a small disk")
}

fn root(params: &SessionParams) -> Digest {
    let digester = Digester::new(params.hash, params.seed);
    let mut range = RangeHasher::new(&digester, 0);
    for index in 0..geometry().block_count() {
        let content: Content = digester.content(&vec![BYTE; geometry().block_len(index)]);
        range.content(&content);
    }
    disk_root(&digester, geometry(), &[range.finish()])
}

fn welcome() -> Welcome {
    Welcome {
        release: "forged".to_owned(),
        arch: "x86_64".to_owned(),
        agent_digest: [0; 32],
        boot_id: "forged".to_owned(),
        aes: false,
        uid: 0,
        processors: 2,
    }
}

fn opened(disk: u32) -> Opened {
    Opened {
        disk,
        kind: DiskKind::File,
        size: SIZE,
        identity: None,
        resumed: false,
        storage: Vec::new(),
        keeps: None,
    }
}

fn ended(start: &Start) -> Ended {
    Ended {
        disk: start.disk,
        counters: Counters::default(),
        first_difference: None,
        root: Some(root(&start.params)),
    }
}

fn lost() -> Failed {
    Failed {
        code: FailureCode::LinkLost,
        disk: Some(0),
        offset: None,
        message: "forged \u{1b}[31mfailure".to_owned(),
    }
}

fn outcome(what: &str, got_in: bool) -> String {
    let outcome = if got_in { "got in" } else { "turned away" };
    format!("{what}: {outcome}")
}

fn token_line(token: &Token) -> String {
    hex(&token.0) + "\n"
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
