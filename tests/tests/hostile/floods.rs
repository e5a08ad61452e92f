//! Hostile controllers: more than an agent takes at once.

use kvm_clone_protocol::message::*;
use kvm_clone_protocol::preamble::SUPPORTED;
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::message;
use kvm_clone_tests::hostile::ground::Ground;
use kvm_clone_tests::hostile::trial::{Onto, params, start};

use super::tell;

#[test]
fn disks_and_links_are_bounded_and_what_there_is_goes_on() {
    let ground = Ground::longer();
    let path = ground.disk().into_os_string().into_encoded_bytes();
    let mut agent = Agent::greeted();
    let (mut opened, mut listening) = (0, 0);
    for number in 0..300 {
        let path = path.clone();
        agent.send(&Open {
            disk: number,
            location: Location::Path(path),
            access: Access::Compare,
        });
        match agent.next() {
            Some(Control::Opened(_)) => opened += 1,
            Some(Control::Failed(failed)) => assert_eq!(failed.code, FailureCode::Protocol),
            other => panic!("{other:?}"),
        }
    }
    for link in 0..600 {
        agent.send(&Listen {
            link,
            version: SUPPORTED.max,
        });
        match agent.next() {
            Some(Control::Listening(_)) => listening += 1,
            Some(Control::Failed(failed)) => assert_eq!(failed.code, FailureCode::Protocol),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((opened, listening), (256, 512));
    agent.leave();
    ground.assert_untouched();
}

/// Requests, each of which has to be answered, and how many.
type Flood = (&'static str, u32, fn(u32) -> Vec<u8>);

fn floods() -> [Flood; 5] {
    let open = |disk| {
        message(&Open {
            disk,
            location: Location::Path(b"/no/such/disk".to_vec()),
            access: Access::Source,
        })
    };
    [
        ("disks that do not exist", 1_000_000, open),
        ("a disk to be prepared", 1_000_000, |_| {
            message(&Prepare {
                disk: 0,
                reread: false,
            })
        }),
        ("no disk to be prepared", 1_000_000, |disk| {
            message(&Prepare {
                disk,
                reread: false,
            })
        }),
        ("recovery", 1_000_000, |_| {
            message(&Recover {
                recovery: Recovery::List,
            })
        }),
        ("listeners", 1_000_000, |link| {
            message(&Listen { link, version: 2 })
        }),
    ]
}

#[test]
fn a_controller_that_asks_and_does_not_listen_is_given_up() {
    let ground = Ground::longer();
    for (name, count, request) in floods() {
        tell(name, "flood");
        let mut agent = Agent::greeted();
        agent.open(0, &ground.disk(), Access::Destination);
        agent.deafen();
        let went_on = (0..count).all(|number| agent.write(&request(number)));
        let end = agent.end();
        assert!(!went_on, "{name}: all was taken");
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let expected = ["before an answer", "does not read"];
        assert!(
            expected.iter().any(|why| end.stderr.contains(why)),
            "{end:?}"
        );
    }
    ground.assert_untouched();
}

#[test]
fn what_a_controller_repeats_without_end_takes_no_memory() {
    let mut agent = Agent::greeted();
    let alive = message(&Alive {}).repeat(10_000);
    for _ in 0..100 {
        assert!(agent.write(&alive));
    }
    // Sessions that fail at once, one after the other.
    for number in 0..1000 {
        let _ = agent.listen(number);
        let params = params(Onto::Staged);
        agent.send(&start(0, Role::Receiver, params, ApplyChoice::Auto));
        agent.expect(FailureCode::Protocol);
        if number == 500 {
            break;
        }
    }
    agent.write(&message(&Abort {
        reason: "x".repeat(60_000),
    }));
    let end = agent.end();
    assert!(end.status.success() && end.stderr.is_empty(), "{end:?}");
}
