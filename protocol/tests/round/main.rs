//! The rules of a round, driven through its public interface only.

#![cfg(test)]

mod modes;
mod sequences;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::event::{Event, Phase, Reason};
use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, Manifest, MergeRule, Mode, Screening,
    SymbolSpace, TargetForm, Training,
};
use consilium_protocol::round::{
    Admission, Effect, Round, RoundError, RoundPhase, RoundTask, Work,
};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RejectCode, RoundId, UnixMillis};

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
const SHARDS: u32 = 2;

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn ids(names: &[&str]) -> Vec<InstitutionId> {
    names.iter().map(|name| id(name)).collect()
}

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn manifest() -> Manifest {
    let manifest = Manifest {
        consortium: ConsortiumId::new("demo").unwrap(),
        round: RoundId(1),
        mode: Mode::Unified,
        charter: digest("charter"),
        pivot: digest("pivot"),
        reference: digest("reference"),
        items: 10,
        symbol_space: SymbolSpace::Bytes,
        symbols: 8,
        fill_permille: 995,
        shard_items: 6,
        fusion: FusionRule::Softmax { sharpness: 20 },
        targets: TargetForm::default(),
        screening: Screening::default(),
        training: Training {
            inner_rounds: 2,
            local_steps: 10,
            rows: 4,
            row_tokens: 64,
            learning_rate_micros: 300,
            warmup_permille: 100,
            final_permille: 100,
            cross_entropy_permille: 100,
            rank: 8,
            alpha: 16,
            target_modules: vec!["q_proj".to_owned()],
            modules_to_save: Vec::new(),
            outer_rate_permille: 700,
            outer_momentum_permille: 900,
            distillation: Distillation::Trie,
            merge: MergeRule::Product,
            defence: Defence::None,
        },
        members: ids(&NAMES),
        quorum: 2,
        deadlines: Deadlines {
            contribute_seconds: 100,
            distil_seconds: 50,
            evaluate_seconds: 20,
        },
        max_weight: None,
        seed: 1,
        previous_release: None,
    };
    manifest.to_text().unwrap();
    manifest
}

/// The same round in another mode; adapters may count three times as much as another.
fn manifest_of(mode: Mode) -> Manifest {
    let is_private = mode == Mode::Adapters;
    let distillation = if is_private {
        Distillation::Labels
    } else {
        Distillation::Trie
    };
    let manifest = Manifest {
        mode,
        max_weight: is_private.then_some(3),
        training: Training {
            distillation,
            ..manifest().training
        },
        ..manifest()
    };
    manifest.to_text().unwrap();
    manifest
}

fn opened() -> Event {
    Event::Opened {
        manifest: digest("manifest"),
        start: digest("start"),
    }
}

fn joined(name: &str, capacity: u32) -> Event {
    Event::Joined {
        institution: id(name),
        capacity,
    }
}

fn accepted(name: &str, kind: Kind, sequence: u32) -> Event {
    Event::Accepted {
        institution: id(name),
        kind,
        sequence,
        artefact: digest(&format!("{name} {kind:?} {sequence}")),
        signature: String::new(),
        ledger: digest("ledger"),
    }
}

fn closed(phase: Phase, names: &[&str]) -> Event {
    Event::Closed {
        phase,
        members: ids(names),
    }
}

fn fused() -> Event {
    Event::Fused {
        targets: digest("targets"),
        routing: digest("routing"),
        report: None,
    }
}

fn merged(inner: u32) -> Event {
    Event::Merged {
        inner,
        adapter: digest(&format!("adapter {inner}")),
        momentum: digest(&format!("momentum {inner}")),
        truncation_ppm: 5,
    }
}

fn released() -> Event {
    Event::Released {
        release: digest("release"),
        report: digest("report"),
    }
}

fn rejected(reason: Reason) -> Event {
    Event::Rejected {
        reason,
        blamed: Vec::new(),
        report: None,
    }
}

/// The shell in miniature: logs what it applies.
struct Shell {
    round: Round,
    log: Vec<(UnixMillis, Event)>,
    now: UnixMillis,
}

impl Shell {
    fn new() -> Self {
        Self::of(manifest())
    }

    fn of(manifest: Manifest) -> Self {
        let mut shell = Self {
            round: Round::open(manifest, digest("manifest")),
            log: Vec::new(),
            now: UnixMillis(1_000),
        };
        shell.apply(opened());
        shell
    }

    fn apply(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.round.step(self.now, &event);
        let effects = effects.unwrap_or_else(|error| panic!("{event:?}: {error}"));
        self.log.push((self.now, event));
        effects
    }

    fn wait(&mut self, seconds: u64) {
        self.now.0 += seconds * 1000;
    }

    fn settle(&mut self) -> Vec<Effect> {
        let due = self.round.due(self.now).expect("nothing is due");
        self.apply(due)
    }

    fn records(&mut self, names: &[&str]) {
        for name in names {
            for shard in 0..SHARDS {
                self.apply(accepted(name, Kind::Records, shard));
            }
        }
    }

    /// All three joined with these capacities, contributed and were fused.
    fn distilling(capacities: [u32; 3]) -> Self {
        let mut shell = Self::new();
        for (name, capacity) in NAMES.into_iter().zip(capacities) {
            shell.apply(joined(name, capacity));
        }
        shell.records(&NAMES);
        shell.settle();
        shell.apply(fused());
        shell
    }

    fn distils(&self) -> Vec<&'static str> {
        let is_distil =
            |name: &&str| matches!(self.round.task(&id(name)), RoundTask::Distil { .. });
        NAMES.into_iter().filter(is_distil).collect()
    }

    fn evaluating() -> Self {
        let mut shell = Self::distilling([1, 1, 1]);
        for inner in 0..2 {
            for name in NAMES {
                shell.apply(accepted(name, Kind::Adapter, inner));
            }
            shell.settle();
            shell.apply(merged(inner));
        }
        shell
    }

    fn admit(
        &self,
        name: &str,
        kind: Kind,
        sequence: u32,
        artefact: &str,
    ) -> Result<Admission, RejectCode> {
        self.round.admit(&Statement {
            consortium: ConsortiumId::new("demo").unwrap(),
            round: RoundId(1),
            manifest: digest("manifest"),
            institution: InstitutionId::new(name).unwrap(),
            kind,
            sequence,
            artefact: digest(artefact),
        })
    }
}

#[test]
fn a_round_with_everybody_ends_in_a_release_and_replays_to_every_state() {
    let mut shell = Shell::new();
    assert_eq!(shell.round.next_deadline(), Some(UnixMillis(101_000)));
    for name in NAMES {
        shell.apply(joined(name, 2));
    }
    shell.apply(accepted("beta", Kind::Records, 1));
    assert_eq!(
        shell.round.task(&id("beta")),
        RoundTask::Score { shards: vec![0] }
    );
    shell.apply(accepted("beta", Kind::Records, 0));
    assert_eq!(shell.round.task(&id("beta")), RoundTask::Wait);
    shell.records(&["alpha"]);
    assert_eq!(shell.round.due(shell.now), None);
    shell.records(&["gamma"]);
    let fuse = Work::Fuse {
        members: ids(&NAMES),
    };
    assert_eq!(shell.settle(), [Effect::Run(fuse), Effect::Publish]);
    shell.wait(5);
    assert_eq!(
        shell.apply(fused()),
        [Effect::WakeAt(UnixMillis(56_000)), Effect::Publish]
    );

    let mut start = digest("start");
    for inner in 0..2 {
        let mut adapters = Vec::new();
        for name in NAMES {
            let RoundTask::Distil {
                inner: at,
                start: from,
                targets,
                part,
            } = shell.round.task(&id(name))
            else {
                panic!("{name} has nothing to distil");
            };
            assert_eq!((at, from, targets), (inner, start, digest("targets")));
            let weight = u32::try_from(part.to - part.from).unwrap();
            adapters.push((id(name), digest(&format!("{name} Adapter {inner}")), weight));
            shell.apply(accepted(name, Kind::Adapter, inner));
        }
        assert_eq!(
            adapters.iter().map(|(_, _, weight)| weight).sum::<u32>(),
            10
        );
        let momentum = (inner > 0).then(|| digest("momentum 0"));
        let merge = Work::Merge {
            inner,
            start,
            momentum,
            adapters,
        };
        assert_eq!(shell.settle(), [Effect::Run(merge), Effect::Publish]);
        shell.apply(merged(inner));
        start = digest(&format!("adapter {inner}"));
    }

    for name in NAMES {
        assert_eq!(
            shell.round.task(&id(name)),
            RoundTask::Evaluate { candidate: start }
        );
        shell.apply(accepted(name, Kind::Evaluation, 0));
    }
    let evaluations = NAMES.map(|name| (id(name), digest(&format!("{name} Evaluation 0"))));
    let judge = Work::Judge {
        candidate: start,
        evaluations: evaluations.to_vec(),
    };
    assert_eq!(shell.settle(), [Effect::Run(judge), Effect::Publish]);
    assert_eq!(shell.apply(released()), [Effect::Publish, Effect::Finished]);
    assert_eq!(shell.round.task(&id("alpha")), RoundTask::Finished);
    assert_eq!(shell.round.contributions(Kind::Records).len(), 6);
    assert_eq!(shell.round.contributions(Kind::Adapter).len(), 6);

    let mut live = Round::open(manifest(), digest("manifest"));
    for prefix in 0..=shell.log.len() {
        let mut replayed = Round::open(manifest(), digest("manifest"));
        for (at, event) in &shell.log[..prefix] {
            replayed.step(*at, event).unwrap();
        }
        assert_eq!(replayed, live, "after {prefix} events");
        assert_eq!(replayed.work(), live.work());
        if let Some((at, event)) = shell.log.get(prefix) {
            live.step(*at, event).unwrap();
        }
    }
    assert_eq!(live, shell.round);
}

#[test]
fn a_late_node_counts_until_the_deadline_and_one_that_never_comes_does_not_block() {
    let mut shell = Shell::new();
    shell.records(&["alpha"]);
    shell.wait(99);
    shell.records(&["gamma"]);
    shell.apply(accepted("beta", Kind::Records, 0));
    assert_eq!(shell.round.due(shell.now), None);
    let early = closed(Phase::Contribute, &["alpha", "gamma"]);
    assert!(matches!(
        shell.round.step(shell.now, &early),
        Err(RoundError::Early { .. })
    ));
    shell.wait(1);
    assert_eq!(shell.round.due(shell.now), Some(early));
    let incomplete = closed(Phase::Contribute, &["alpha", "beta"]);
    assert_eq!(
        shell.round.step(shell.now, &incomplete),
        Err(RoundError::Members {
            phase: Phase::Contribute
        })
    );
    shell.settle();
    assert_eq!(shell.round.phase(), RoundPhase::Fusing);
    assert_eq!(
        shell.admit("beta", Kind::Records, 1, "late"),
        Err(RejectCode::WrongPhase)
    );
}

#[test]
fn a_deadline_without_quorum_ends_the_round_and_quorum_cannot_be_denied() {
    let mut shell = Shell::new();
    shell.records(&["alpha"]);
    shell.wait(100);
    let mut other = shell.round.clone();
    assert_eq!(shell.round.due(shell.now), Some(rejected(Reason::Quorum)));
    assert_eq!(shell.settle(), [Effect::Publish, Effect::Finished]);
    assert_eq!(
        shell.round.phase(),
        RoundPhase::Rejected {
            reason: Reason::Quorum
        }
    );
    assert!(shell.round.step(shell.now, &joined("beta", 1)).is_err());

    for shard in 0..SHARDS {
        other
            .step(shell.now, &accepted("beta", Kind::Records, shard))
            .unwrap();
    }
    assert!(matches!(
        other.step(shell.now, &rejected(Reason::Quorum)),
        Err(RoundError::Quorum {
            got: 2,
            quorum: 2,
            ..
        })
    ));

    let mut shell = Shell::distilling([1, 1, 1]);
    shell.apply(accepted("beta", Kind::Adapter, 0));
    shell.wait(50);
    assert_eq!(shell.round.due(shell.now), Some(rejected(Reason::Quorum)));
}

#[test]
fn a_node_that_joins_in_the_middle_takes_part_from_the_next_inner_round() {
    let mut shell = Shell::new();
    shell.apply(joined("alpha", 1));
    shell.apply(joined("beta", 0));
    shell.records(&["alpha", "beta"]);
    shell.wait(100);
    shell.settle();
    shell.apply(fused());
    assert_eq!(shell.distils(), ["alpha"]);
    // Gamma never handed records over.
    shell.apply(joined("gamma", 4));
    assert_eq!(shell.distils(), ["alpha"]);
    assert_eq!(
        shell.admit("gamma", Kind::Adapter, 0, "x"),
        Err(RejectCode::WrongPhase)
    );
    shell.apply(accepted("alpha", Kind::Adapter, 0));
    shell.settle();
    shell.apply(merged(0));
    assert_eq!(shell.distils(), ["alpha", "gamma"]);
    let RoundTask::Distil { part, .. } = shell.round.task(&id("gamma")) else {
        panic!("gamma has nothing to distil");
    };
    assert_eq!(part.range(), 2..10);
}

#[test]
fn a_dropped_member_returns_after_joining_again() {
    let mut shell = Shell::distilling([1, 1, 1]);
    shell.apply(accepted("alpha", Kind::Adapter, 0));
    shell.apply(accepted("gamma", Kind::Adapter, 0));
    shell.wait(50);
    shell.settle();
    let mut without = Shell {
        round: shell.round.clone(),
        log: Vec::new(),
        now: shell.now,
    };
    without.apply(merged(0));
    assert_eq!(without.distils(), ["alpha", "gamma"]);

    // Whoever asks whether an arrival is news compares with this.
    assert_eq!(shell.round.capacity(&id("beta")), None);
    assert_eq!(shell.round.capacity(&id("alpha")), Some(1));
    shell.apply(joined("beta", 3));
    assert_eq!(shell.round.capacity(&id("beta")), Some(3));
    shell.apply(merged(0));
    assert_eq!(shell.distils(), NAMES);
}

#[test]
fn the_first_to_join_an_empty_inner_round_starts_at_once() {
    let mut shell = Shell::distilling([0, 0, 0]);
    assert!(shell.distils().is_empty());
    assert_eq!(shell.round.due(shell.now), None);
    shell.apply(joined("beta", 0));
    assert!(shell.distils().is_empty());
    shell.apply(joined("beta", 2));
    shell.apply(joined("gamma", 2));
    assert_eq!(shell.distils(), ["beta"]);
    shell.apply(accepted("beta", Kind::Adapter, 0));
    shell.settle();
    let Some(Work::Merge { adapters, .. }) = shell.round.work() else {
        panic!("nothing to merge");
    };
    assert_eq!(adapters, [(id("beta"), digest("beta Adapter 0"), 10)]);
}

#[test]
fn evaluations_close_at_quorum_after_the_deadline_and_only_the_judge_rejects_by_gate() {
    let mut shell = Shell::evaluating();
    shell.apply(accepted("beta", Kind::Evaluation, 0));
    shell.apply(accepted("gamma", Kind::Evaluation, 0));
    assert_eq!(shell.round.due(shell.now), None);
    assert!(
        shell
            .round
            .step(shell.now, &rejected(Reason::Gate))
            .is_err()
    );
    shell.wait(20);
    shell.settle();
    shell.apply(rejected(Reason::Gate));
    assert!(shell.round.phase().is_finished());
}

#[test]
fn only_the_fusion_rejects_by_screening_or_the_public_gate() {
    for reason in [Reason::Screening, Reason::PublicGate] {
        let mut shell = Shell::evaluating();
        assert!(shell.round.step(shell.now, &rejected(reason)).is_err());
        let mut round = Round::open(manifest(), digest("manifest"));
        for (at, event) in shell.log.drain(..) {
            if matches!(event, Event::Fused { .. }) {
                round.step(at, &rejected(reason)).unwrap();
                break;
            }
            assert!(round.step(at, &rejected(reason)).is_err());
            round.step(at, &event).unwrap();
        }
        assert!(round.phase().is_finished());
    }
}

#[test]
fn a_slot_takes_one_artefact_and_its_repeats_in_any_later_phase() {
    let shell = Shell::distilling([1, 1, 1]);
    let admit = |name, kind, sequence, artefact| shell.admit(name, kind, sequence, artefact);
    let repeat = admit("beta", Kind::Records, 1, "beta Records 1");
    assert_eq!(repeat, Ok(Admission::Repeat));
    let other = admit("beta", Kind::Records, 1, "other");
    assert_eq!(other, Err(RejectCode::Equivocation));
    assert_eq!(admit("beta", Kind::Adapter, 0, "x"), Ok(Admission::New));
    for (name, kind, sequence, code) in [
        ("beta", Kind::Adapter, 1, RejectCode::WrongPhase),
        ("beta", Kind::Evaluation, 0, RejectCode::WrongPhase),
        ("beta", Kind::Records, SHARDS, RejectCode::Content),
        ("beta", Kind::Adapter, 2, RejectCode::Content),
        ("beta", Kind::Evaluation, 1, RejectCode::Content),
        ("stranger", Kind::Adapter, 0, RejectCode::NotMember),
    ] {
        assert_eq!(
            admit(name, kind, sequence, "x"),
            Err(code),
            "{name} {kind:?} {sequence}"
        );
    }
}
