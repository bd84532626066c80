//! Sequences of events, fitting or not, in any order.

use std::collections::BTreeSet;

use consilium_protocol::artefact::Kind;
use consilium_protocol::event::{Event, Phase, Reason};
use consilium_protocol::manifest::Mode;
use consilium_protocol::round::{Round, RoundTask, Work};
use consilium_protocol::{RejectCode, UnixMillis};
use proptest::prelude::*;

use super::{
    NAMES, accepted, closed, digest, fused, id, joined, manifest_of, merged, opened, rejected,
    released,
};

#[derive(Debug, Clone)]
enum Move {
    /// Any event, mostly one that does not fit.
    Any(Event),
    /// What the shell would log next.
    Due,
    /// The answer to the outstanding work.
    Answer,
    /// What the member's task asks for, first piece.
    Obey(usize),
    Wait(u64),
    /// A member connects with this capacity.
    Join(usize, u32),
}

fn any_event() -> impl Strategy<Value = Event> {
    let name = prop::sample::select(vec!["alpha", "beta", "gamma", "stranger"]);
    let kind = prop::sample::select(vec![Kind::Records, Kind::Adapter, Kind::Evaluation]);
    let phase = prop::sample::select(vec![
        Phase::Contribute,
        Phase::Distil { inner: 0 },
        Phase::Distil { inner: 1 },
        Phase::Evaluate,
    ]);
    let reason = prop::sample::select(vec![Reason::Quorum, Reason::Gate, Reason::NoGain]);
    let members = prop::collection::vec(name.clone(), 0..4);
    prop_oneof![
        Just(opened()),
        Just(fused()),
        Just(released()),
        (0u32..3).prop_map(merged),
        reason.prop_map(rejected),
        (name.clone(), 0u32..3).prop_map(|(name, capacity)| joined(name, capacity)),
        (phase, members).prop_map(|(phase, members)| closed(phase, &members)),
        (name.clone(), kind.clone(), 0u32..3)
            .prop_map(|(name, kind, sequence)| accepted(name, kind, sequence)),
        (name, kind, 0u32..3).prop_map(|(name, kind, sequence)| Event::Refused {
            institution: id(name),
            kind,
            sequence,
            artefact: digest("refused"),
            code: RejectCode::Content,
        }),
    ]
}

fn any_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        3 => any_event().prop_map(Move::Any),
        4 => Just(Move::Due),
        4 => Just(Move::Answer),
        12 => (0usize..3).prop_map(Move::Obey),
        1 => (0u64..60).prop_map(Move::Wait),
        1 => (0usize..3, 0u32..3).prop_map(|(who, capacity)| Move::Join(who, capacity)),
    ]
}

fn event_of(chosen: Move, round: &Round, now: &mut UnixMillis) -> Option<Event> {
    match chosen {
        Move::Any(event) => Some(event),
        Move::Due => round.due(*now),
        Move::Answer => round.work().map(|work| match work {
            Work::Fuse { .. } => fused(),
            Work::Merge { inner, .. } => merged(inner),
            Work::Judge { .. } => released(),
        }),
        Move::Obey(member) => match round.task(&id(NAMES[member])) {
            RoundTask::Score { shards } => Some(accepted(NAMES[member], Kind::Records, shards[0])),
            RoundTask::Distil { inner, .. } | RoundTask::Train { inner, .. } => {
                Some(accepted(NAMES[member], Kind::Adapter, inner))
            }
            RoundTask::Evaluate { .. } => Some(accepted(NAMES[member], Kind::Evaluation, 0)),
            RoundTask::Wait | RoundTask::Finished => None,
        },
        Move::Join(member, capacity) => {
            (!round.phase().is_finished()).then(|| joined(NAMES[member], capacity))
        }
        Move::Wait(seconds) => {
            now.0 += seconds * 1000;
            None
        }
    }
}

proptest! {
    #[test]
    fn any_sequence_leaves_a_state_that_replays_and_counts_no_slot_twice(
        mode in prop::sample::select(vec![Mode::Unified, Mode::Pairwise, Mode::Adapters]),
        moves in prop::collection::vec(any_move(), 0..120),
    ) {
        let mut round = Round::open(manifest_of(mode), digest("manifest"));
        let mut replayed = round.clone();
        let mut now = UnixMillis(1_000);
        round.step(now, &opened()).unwrap();
        replayed.step(now, &opened()).unwrap();
        let mut counted = BTreeSet::new();
        for chosen in moves {
            let must_fit = !matches!(chosen, Move::Any(_));
            let Some(event) = event_of(chosen, &round, &mut now) else { continue };
            let before = round.clone();
            match round.step(now, &event) {
                Ok(_) => {
                    replayed.step(now, &event).unwrap();
                    if let Event::Accepted { institution, kind, sequence, .. } = &event {
                        prop_assert!(counted.insert((institution.clone(), *kind, *sequence)));
                    }
                }
                Err(error) => {
                    prop_assert!(!must_fit, "{event:?}: {error}");
                    prop_assert_eq!(&round, &before);
                }
            }
            prop_assert_eq!(&round, &replayed);
            let kinds = [Kind::Records, Kind::Adapter, Kind::Evaluation];
            if !mode.shares_records() {
                prop_assert!(round.contributions(Kind::Records).is_empty());
                let fuses = matches!(round.work(), Some(Work::Fuse { .. }));
                prop_assert!(!fuses);
            }
            let held: usize = kinds.iter().map(|kind| round.contributions(*kind).len()).sum();
            prop_assert_eq!(held, counted.len());
            if let Some(Work::Merge { adapters, .. }) = round.work() {
                prop_assert!(!adapters.is_empty());
                let most = match mode {
                    Mode::Unified => 10,
                    Mode::Pairwise => 1,
                    Mode::Adapters => 3,
                };
                prop_assert!(adapters.iter().all(|(_, _, weight)| (1..=most).contains(weight)));
            }
            prop_assert!(round.work().is_none() || round.next_deadline().is_none());
        }
    }
}
