//! Rounds without shared records: they begin with training, wait for everybody once, and take no records.

use consilium_protocol::artefact::Kind;
use consilium_protocol::event::{Phase, Reason};
use consilium_protocol::manifest::{
    Distillation, Manifest, Mode, TargetForm, TargetTail, Training,
};
use consilium_protocol::round::{Effect, RoundPhase, RoundTask, Work};
use consilium_protocol::{RejectCode, UnixMillis};

use super::{
    NAMES, Shell, accepted, closed, digest, fused, id, joined, manifest, manifest_of, merged,
    rejected, released,
};

const WITHOUT_RECORDS: [Mode; 2] = [Mode::Pairwise, Mode::Adapters];

impl Shell {
    fn trains(&self) -> Vec<&'static str> {
        let is_train = |name: &&str| matches!(self.round.task(&id(name)), RoundTask::Train { .. });
        NAMES.into_iter().filter(is_train).collect()
    }
}

#[test]
fn training_follows_the_opening_and_the_rest_is_as_in_every_round() {
    for mode in WITHOUT_RECORDS {
        let mut shell = Shell::of(manifest_of(mode));
        assert_eq!(shell.round.next_deadline(), Some(UnixMillis(51_000)));
        for (name, capacity) in NAMES.into_iter().zip([1, 2, 90]) {
            shell.apply(joined(name, capacity));
        }
        let mut start = digest("start");
        for inner in 0..2 {
            for name in NAMES {
                let task = RoundTask::Train { inner, start };
                assert_eq!(shell.round.task(&id(name)), task, "{mode:?}");
                assert_eq!(
                    shell.admit(name, Kind::Records, 0, "records"),
                    Err(RejectCode::Content)
                );
                shell.apply(accepted(name, Kind::Adapter, inner));
            }
            // What gamma declares counts as the manifest says, where it counts at all.
            let weights = if mode == Mode::Adapters {
                [1, 2, 3]
            } else {
                [1; 3]
            };
            let adapters = NAMES.into_iter().zip(weights).map(|(name, weight)| {
                let adapter = digest(&format!("{name} Adapter {inner}"));
                (id(name), adapter, weight)
            });
            let merge = Work::Merge {
                inner,
                start,
                momentum: (inner > 0).then(|| digest("momentum 0")),
                adapters: adapters.collect(),
            };
            assert_eq!(
                shell.settle(),
                [Effect::Run(merge.clone()), Effect::Publish]
            );
            // A capacity that changes now changes no merge.
            shell.apply(joined("gamma", 1));
            assert_eq!(shell.round.work(), Some(merge));
            shell.apply(joined("gamma", 90));
            assert!(shell.round.step(shell.now, &fused()).is_err());
            shell.apply(merged(inner));
            start = digest(&format!("adapter {inner}"));
        }
        for name in NAMES {
            let task = RoundTask::Evaluate { candidate: start };
            assert_eq!(shell.round.task(&id(name)), task);
            shell.apply(accepted(name, Kind::Evaluation, 0));
        }
        shell.settle();
        assert_eq!(shell.apply(released()), [Effect::Publish, Effect::Finished]);
        assert!(shell.round.contributions(Kind::Records).is_empty());
    }
}

#[test]
fn the_first_inner_round_waits_for_all_members_that_can_train() {
    for mode in WITHOUT_RECORDS {
        let mut shell = Shell::of(manifest_of(mode));
        shell.apply(joined("alpha", 1));
        shell.apply(accepted("alpha", Kind::Adapter, 0));
        shell.apply(joined("beta", 1));
        shell.apply(accepted("beta", Kind::Adapter, 0));
        assert_eq!(shell.round.due(shell.now), None, "gamma may still come");
        let mut without = Shell {
            round: shell.round.clone(),
            log: Vec::new(),
            now: shell.now,
        };
        // One that cannot train is not waited for.
        shell.apply(joined("gamma", 0));
        assert!(!shell.trains().contains(&"gamma"));
        let both = closed(Phase::Distil { inner: 0 }, &["alpha", "beta"]);
        assert_eq!(shell.round.due(shell.now), Some(both.clone()));
        // One that never comes is waited for until the deadline, and is not expected again.
        without.wait(50);
        assert_eq!(without.round.due(without.now), Some(both));
        without.settle();
        without.apply(merged(0));
        assert_eq!(without.trains(), ["alpha", "beta"]);
        without.apply(joined("gamma", 1));
        assert_eq!(without.trains(), ["alpha", "beta"], "from the next one");
    }
}

#[test]
fn too_few_before_the_first_deadline_end_the_round() {
    for mode in WITHOUT_RECORDS {
        let mut shell = Shell::of(manifest_of(mode));
        shell.apply(joined("alpha", 1));
        shell.apply(accepted("alpha", Kind::Adapter, 0));
        shell.wait(50);
        assert_eq!(shell.round.due(shell.now), Some(rejected(Reason::Quorum)));
        shell.settle();
        assert_eq!(
            shell.round.phase(),
            RoundPhase::Rejected {
                reason: Reason::Quorum
            }
        );
    }
}

#[test]
fn what_a_mode_cannot_do_is_refused_by_name() {
    let with = |mode, distillation| Manifest {
        training: Training {
            distillation,
            ..manifest().training
        },
        targets: TargetForm {
            tail: TargetTail::Ghost,
            ..TargetForm::default()
        },
        max_weight: None,
        ..manifest_of(mode)
    };
    let refused = |manifest: Manifest| manifest.to_text().unwrap_err().to_string();
    let infifusion = |symbols, temperature_permille| Distillation::Infifusion {
        symbols,
        temperature_permille,
    };
    let graph = |graph_permille| Distillation::Infigfusion {
        symbols: 10,
        temperature_permille: 1000,
        graph_permille,
    };
    for (mode, distillation, name) in [
        (Mode::Unified, infifusion(10, 1000), "infifusion"),
        (Mode::Unified, graph(500), "infigfusion"),
        (Mode::Unified, Distillation::Uld { symbols: 8 }, "uld"),
        (Mode::Adapters, Distillation::Trie, "trie"),
        (Mode::Pairwise, Distillation::DualTrie, "dual_trie"),
        (Mode::Pairwise, infifusion(1, 1000), "symbols"),
        (Mode::Pairwise, infifusion(10, 0), "temperature_permille"),
        (Mode::Pairwise, graph(0), "graph_permille"),
    ] {
        let error = refused(with(mode, distillation));
        assert!(error.contains(name), "{error}");
    }
    for (mode, distillation) in [
        (Mode::Unified, Distillation::Labels),
        (Mode::Unified, Distillation::TrieListed),
        (Mode::Unified, Distillation::DualTrie),
        (Mode::Pairwise, Distillation::Labels),
        (Mode::Pairwise, infifusion(10, 1000)),
        (Mode::Pairwise, graph(500)),
        (Mode::Pairwise, Distillation::Uld { symbols: 8 }),
        (Mode::Adapters, Distillation::Labels),
    ] {
        with(mode, distillation).to_text().unwrap();
    }
    let on_labels = Manifest {
        targets: TargetForm::default(),
        ..with(Mode::Unified, Distillation::DualTrie)
    };
    assert!(refused(on_labels).contains("targets.tail"));
    let heavy = Manifest {
        max_weight: Some(3),
        ..manifest_of(Mode::Pairwise)
    };
    assert!(refused(heavy).contains("max_weight"));
    let none = Manifest {
        max_weight: Some(0),
        ..manifest_of(Mode::Adapters)
    };
    assert!(refused(none).contains("max_weight"));
}
