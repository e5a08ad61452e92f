//! What hostile agents say, as bytes.

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::message::{
    Committed, Control, Counters, DiskKind, Ended, Failed, FailureCode, Fate, Leftover, Listening,
    Opened, Progress, Started, Warning, Welcome,
};
use kvm_clone_protocol::preamble::{Preamble, Versions};

use super::frames::message;

pub(super) fn preamble(min: u16, max: u16) -> Vec<u8> {
    let versions = Versions { min, max };
    Preamble { versions, build: 0 }.encode().to_vec()
}

/// The same once more.
pub(super) fn again(said: &Control) -> Vec<u8> {
    match said {
        Control::Welcome(welcome) => message(welcome),
        Control::Opened(opened) => message(opened),
        Control::Started(started) => message(started),
        Control::Recovered(recovered) => message(recovered),
        other => panic!("{other:?} is said again by no story"),
    }
}

pub(super) fn welcome_of(said: &Control, text: &str) -> Vec<u8> {
    let Control::Welcome(welcome) = said else {
        panic!("{said:?} is no welcome");
    };
    message(&Welcome {
        release: text.to_owned(),
        ..welcome.clone()
    })
}

pub(super) fn opened(disk: u32) -> Opened {
    Opened {
        disk,
        kind: DiskKind::File,
        size: 1 << 63,
        identity: None,
        resumed: false,
        storage: Vec::new(),
        keeps: None,
    }
}

pub(super) fn listening(said: &Control, change: fn(&mut Listening)) -> Vec<u8> {
    let Control::Listening(listening) = said else {
        panic!("{said:?} is no listener");
    };
    let mut listening = listening.clone();
    change(&mut listening);
    message(&listening)
}

pub(super) fn failed(disk: Option<u32>, text: &str) -> Vec<u8> {
    message(&Failed {
        code: FailureCode::Internal,
        disk,
        offset: None,
        message: text.to_owned(),
    })
}

pub(super) fn warning(text: &str) -> Vec<u8> {
    message(&Warning {
        disk: None,
        message: text.to_owned(),
    })
}

pub(super) fn leftover(path: &[u8], text: &str) -> Vec<u8> {
    message(&Leftover {
        path: path.to_vec(),
        fate: Fate::Stuck,
        message: text.to_owned(),
    })
}

pub(super) fn started(disk: u32) -> Vec<u8> {
    message(&Started {
        disk,
        apply: None,
        resumed: false,
    })
}

pub(super) fn progress(disk: u32, counters: Counters) -> Vec<u8> {
    message(&Progress { disk, counters })
}

pub(super) fn ended(
    disk: u32,
    counters: Counters,
    difference: Option<u64>,
    root: Option<[u8; 16]>,
) -> Vec<u8> {
    message(&Ended {
        disk,
        counters,
        first_difference: difference,
        root: root.map(Digest),
    })
}

pub(super) fn committed(disks: &[u32]) -> Vec<u8> {
    message(&Committed {
        disks: disks.to_vec(),
    })
}

pub(super) fn absurd_counters() -> Counters {
    Counters {
        bytes_data: u64::MAX,
        bytes_read: u64::MAX,
        bytes_trusted: u64::MAX,
        bytes_wire: u64::MAX,
        blocks_settled: u64::MAX,
        blocks_changed: u64::MAX,
        blocks_zeroed: u64::MAX,
        bytes_changed: u64::MAX,
    }
}
