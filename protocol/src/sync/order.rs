//! Several data connections that carry one session: frames go over whichever is ready, each behind
//! a [`Place`] with its number, and are put back in order where they arrive. Neither of the two
//! machines knows of it.
//!
//! A session on a single connection has no numbers: there is nothing to put in order.

use std::collections::BTreeMap;

use super::{CHANGE_COST, DATA_AHEAD, Misbehaviour, SyncError, own, small};
use crate::frame::{Frame, FrameKind};
use crate::message::{Place, Stream};

/// Data connections of one session at most.
pub const MAX_STREAMS: u16 = 16;

/// What may be held until a frame before it arrives, in the currency of credit: all that credit
/// allows to be on its way, and as much again for frames that need none.
const MAX_EARLY: u64 = 2 * DATA_AHEAD;

/// Numbers the frames of one direction.
#[derive(Debug, Default)]
pub struct Numbers {
    next: u64,
}

impl Numbers {
    /// The frame that goes ahead of the next one.
    pub fn place(&mut self) -> Frame {
        let number = self.next;
        self.next += 1;
        small(&Place { number })
    }
}

/// Puts the frames of one direction back in order.
#[derive(Debug, Default)]
pub struct Order {
    next: u64,
    /// The number that each connection has announced for its next frame.
    announced: BTreeMap<u16, u64>,
    early: BTreeMap<u64, Frame>,
    /// The cost of what is held.
    held: u64,
    /// Bytes of the frames that carried nothing but a number.
    places_wire: u64,
}

impl Order {
    /// Takes a frame that came on connection `from`.
    ///
    /// # Errors
    /// [`SyncError`] when it has no number, one that another has or had, or one so far ahead that
    /// more would have to be held than an honest peer has on its way.
    pub fn take(&mut self, from: u16, frame: &Frame) -> Result<(), SyncError> {
        match frame.kind {
            FrameKind::Beat => Ok(()),
            FrameKind::Place => self.announce(from, frame),
            kind => match self.announced.remove(&from) {
                Some(number) => self.hold(number, frame),
                None => Err(Misbehaviour::NoPlace(kind).into()),
            },
        }
    }

    /// The next frame in order, if it is here.
    pub fn next_frame(&mut self) -> Option<Frame> {
        let frame = self.early.remove(&self.next)?;
        self.next += 1;
        self.held -= cost(&frame);
        Some(frame)
    }

    /// Bytes that the numbers took on the wire.
    pub fn places_wire(&self) -> u64 {
        self.places_wire
    }

    fn announce(&mut self, from: u16, frame: &Frame) -> Result<(), SyncError> {
        self.places_wire += frame.wire_len() as u64;
        let Stream::Place(Place { number }) = Stream::read(frame)? else {
            unreachable!("the kind was looked at");
        };
        match self.announced.insert(from, number) {
            None => Ok(()),
            Some(_) => Err(Misbehaviour::NoPlace(FrameKind::Place).into()),
        }
    }

    fn hold(&mut self, number: u64, frame: &Frame) -> Result<(), SyncError> {
        let kind = frame.kind;
        self.held += cost(frame);
        if self.held > MAX_EARLY {
            return Err(Misbehaviour::TooEarly(kind).into());
        }
        let frame = Frame {
            kind,
            meta: own(&frame.meta),
            payload: own(&frame.payload),
        };
        if number < self.next || self.early.insert(number, frame).is_some() {
            return Err(Misbehaviour::SamePlace { kind, number }.into());
        }
        Ok(())
    }
}

fn cost(frame: &Frame) -> u64 {
    CHANGE_COST + frame.payload.len() as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{Beat, Credit, Message as _};

    fn frame(consumed: u64) -> Frame {
        small(&Credit { consumed })
    }

    fn place(number: u64) -> Frame {
        small(&Place { number })
    }

    fn refused(order: &mut Order, from: u16, frame: &Frame) -> Misbehaviour {
        match order.take(from, frame) {
            Err(SyncError::PeerMisbehaved(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn whatever_the_ways_and_their_speed_the_order_is_found_again(
            ways in proptest::collection::vec(0..4_u16, 1..200),
            turns in proptest::collection::vec(0..4_u16, 0..2000),
        ) {
            let mut numbers = Numbers::default();
            let mut pipes = [const { std::collections::VecDeque::new() }; 4];
            for (n, way) in (0_u64..).zip(&ways) {
                pipes[usize::from(*way)].extend([numbers.place(), frame(n)]);
            }
            let mut order = Order::default();
            let mut came = Vec::new();
            // The last turns empty all pipes.
            let rest = (0..4).cycle().take(4 * 2 * ways.len());
            for way in turns.into_iter().chain(rest) {
                if let Some(frame) = pipes[usize::from(way)].pop_front() {
                    order.take(way, &frame).unwrap();
                }
                came.extend(std::iter::from_fn(|| order.next_frame()));
            }
            let sent: Vec<_> = (0..ways.len() as u64).map(frame).collect();
            prop_assert_eq!(came, sent);
            prop_assert_eq!(order.held, 0);
        }
    }

    #[test]
    fn every_frame_but_a_beat_has_a_number_of_its_own() {
        let mut order = Order::default();
        order.take(0, &Beat {}.frame().unwrap()).unwrap();
        assert_eq!(
            refused(&mut order, 0, &frame(1)),
            Misbehaviour::NoPlace(FrameKind::Credit)
        );
        order.take(0, &place(0)).unwrap();
        assert_eq!(
            refused(&mut order, 0, &place(1)),
            Misbehaviour::NoPlace(FrameKind::Place)
        );

        let mut order = Order::default();
        for (from, number) in [(0, 0), (1, 2)] {
            order.take(from, &place(number)).unwrap();
            order.take(from, &frame(number)).unwrap();
        }
        assert_eq!(order.next_frame(), Some(frame(0)));
        assert_eq!(order.next_frame(), None);
        for number in [0, 2] {
            order.take(3, &place(number)).unwrap();
            assert_eq!(
                refused(&mut order, 3, &frame(number)),
                Misbehaviour::SamePlace {
                    kind: FrameKind::Credit,
                    number
                }
            );
        }
    }

    #[test]
    fn no_more_is_held_than_an_honest_peer_has_on_its_way() {
        let mut order = Order::default();
        let mut take = |number| {
            order.take(0, &place(number)).unwrap();
            order.take(0, &frame(number))
        };
        let most = MAX_EARLY / CHANGE_COST;
        for number in 1..=most {
            take(number).unwrap();
        }
        assert_eq!(
            take(most + 1),
            Err(Misbehaviour::TooEarly(FrameKind::Credit).into())
        );
    }
}
