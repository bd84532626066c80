//! The agent against a scripted aggregator over loopback, with real certificates, log, and transfers.

mod hub;
mod world;

use std::sync::Arc;
use std::time::Duration;

use consilium_protocol::artefact::Kind;
use consilium_protocol::manifest::{Distillation, Manifest, Mode, Training};
use consilium_protocol::quic::Tasks;
use consilium_protocol::time::SystemClock;
use consilium_protocol::transcript::Tree;
use consilium_protocol::transcript::tree::leaf_hash;
use consilium_protocol::{Digest, InstitutionId, RoundId};

use super::AgentError;
use super::ledger;
use super::trust::TrustError;
use crate::config::Policy;
use world::{PATIENCE, World, wait_until};

async fn run(world: &World, tasks: &Tasks) -> Result<(), AgentError> {
    super::run(&world.config, Arc::new(SystemClock), tasks).await
}

/// A round from opening to release, with a receipt that gets lost on the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_is_worked_through_and_everything_that_left_stands_in_the_ledger() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    {
        let mut hub = world.hub.lock().unwrap();
        hub.drop_next_receipt = true;
        hub.open(world.manifest.clone());
    }
    let (agent, node) = (run(&world, &tasks), async {
        world.until_finished().await;
        // While the agent runs no second one may.
        let second = run(&world, &Tasks::new()).await;
        assert!(matches!(second, Err(AgentError::Locked(_))));
        tasks.shutdown(Duration::from_secs(10)).await
    });
    let (ended, report) = tokio::join!(agent, node);
    ended.unwrap();
    assert!(report.panicked.is_empty(), "{report:?}");

    let uploads = world.hub.lock().unwrap().uploads.clone();
    let mut slots: Vec<_> = uploads.iter().map(|s| (s.kind, s.sequence)).collect();
    slots.sort();
    slots.dedup();
    let expected = [
        (Kind::Records, 0),
        (Kind::Records, 1),
        (Kind::Adapter, 0),
        (Kind::Adapter, 1),
        (Kind::Evaluation, 0),
    ];
    assert_eq!(slots, expected);
    let events = world.ledger();
    for (kind, sequence) in expected {
        let released: Vec<Digest> = events
            .iter()
            .filter_map(|event| match event {
                ledger::Event::Released { slot, artefact, .. }
                    if (slot.kind, slot.sequence) == (kind, sequence) =>
                {
                    Some(*artefact)
                }
                _ => None,
            })
            .collect();
        let sent = uploads
            .iter()
            .find(|s| (s.kind, s.sequence) == (kind, sequence))
            .map(|s| s.artefact);
        assert_eq!(released, Vec::from_iter(sent), "{kind:?} {sequence}");
    }
    let acknowledged = events
        .iter()
        .filter(|event| matches!(event, ledger::Event::Acknowledged { .. }))
        .count();
    // That of the lost receipt too: the same bytes were sent once more for it.
    assert_eq!(acknowledged, expected.len());
    assert_eq!(uploads.len(), expected.len() + 1);
    let recipients = events.iter().filter_map(|event| match event {
        ledger::Event::Released { recipient, .. } => Some(recipient.as_str()),
        _ => None,
    });
    assert!(
        recipients
            .into_iter()
            .all(|to| to == "consilium://demo/aggregator/hub")
    );
    assert!(
        world
            .spool()
            .read_state(super::LAST_OUTCOME, 1 << 16)
            .unwrap()
            .is_some()
    );
}

/// Records that are made in a round without shared ones stay in the spool; the hub asks for none and gets none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_modes_without_records_adapters_and_the_evaluation_leave_and_nothing_else() {
    for (mode, distillation) in [
        (Mode::Pairwise, Distillation::Trie),
        (Mode::Pairwise, Distillation::Labels),
        (Mode::Adapters, Distillation::Labels),
    ] {
        let (mut world, tasks) = (World::new(), Tasks::new());
        world.config.policy.modes = vec![mode];
        world.config.train_data = vec!["private.jsonl".into()];
        world.start(&tasks);
        let manifest = Manifest {
            mode,
            training: Training {
                distillation,
                ..world.manifest.training.clone()
            },
            ..world.manifest.clone()
        };
        world.hub.lock().unwrap().open(manifest);
        let (ended, ()) = tokio::join!(run(&world, &tasks), async {
            world.until_finished().await;
            tasks.shutdown(Duration::from_secs(10)).await;
        });
        ended.unwrap();
        let expected = [
            (Kind::Adapter, 0),
            (Kind::Adapter, 1),
            (Kind::Evaluation, 0),
        ];
        let uploads = world.hub.lock().unwrap().uploads.clone();
        let sent: Vec<_> = uploads.iter().map(|s| (s.kind, s.sequence)).collect();
        assert_eq!(sent, expected, "{mode:?}");
        let released = world.ledger().into_iter().filter_map(|event| match event {
            ledger::Event::Released { slot, mode, .. } => Some((slot.kind, slot.sequence, mode)),
            _ => None,
        });
        let expected: Vec<_> = expected.iter().map(|&(kind, n)| (kind, n, mode)).collect();
        assert_eq!(released.collect::<Vec<_>>(), expected);
    }
}

/// A site without private text is no part of a round that trains on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_is_not_set_up_for_a_mode_makes_no_job() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.config.policy.modes = vec![Mode::Adapters];
    world.start(&tasks);
    let manifest = Manifest {
        mode: Mode::Adapters,
        training: Training {
            distillation: Distillation::Labels,
            ..world.manifest.training.clone()
        },
        ..world.manifest.clone()
    };
    let refused = super::round::check_setup(&manifest, &world.config).unwrap_err();
    assert!(refused.to_string().contains("[train]"), "{refused}");
    let digest = world.hub.lock().unwrap().open(manifest);
    let script = async {
        wait_until(|| world.hub.lock().unwrap().served.contains(&digest)).await;
        // Long enough for a job to appear, if one would.
        tokio::time::sleep(Duration::from_millis(500)).await;
        tasks.shutdown(Duration::from_secs(10)).await;
    };
    let (ended, ()) = tokio::join!(run(&world, &tasks), script);
    ended.unwrap();
    assert!(world.spool().jobs_in_order().unwrap().is_empty());
    assert!(world.hub.lock().unwrap().uploads.is_empty());
}

/// One manifest after the other that must not be worked on, then a good one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stays_idle_in_rounds_that_it_refuses() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    let good = world.manifest.clone();
    let stranger: InstitutionId = "bank".parse().unwrap();
    let refused = [
        Manifest {
            pivot: Digest::of(b"another"),
            ..good.clone()
        },
        Manifest {
            charter: Digest::of(b"another"),
            ..good.clone()
        },
        Manifest {
            symbols: 17,
            ..good.clone()
        },
        Manifest {
            items: 4,
            ..good.clone()
        },
        Manifest {
            members: vec![stranger],
            ..good.clone()
        },
    ];
    let agent = run(&world, &tasks);
    let script = async {
        let mut round = 0;
        for manifest in refused {
            round += 1;
            let manifest = Manifest {
                round: RoundId(round),
                ..manifest
            };
            let digest = world.hub.lock().unwrap().open(manifest);
            wait_until(|| world.hub.lock().unwrap().served.contains(&digest)).await;
        }
        let last = Manifest {
            round: RoundId(round + 1),
            ..good
        };
        world.hub.lock().unwrap().open(last);
        world.until_finished().await;
        tasks.shutdown(Duration::from_secs(10)).await;
        round + 1
    };
    let (ended, last) = tokio::join!(agent, script);
    ended.unwrap();
    let uploads = world.hub.lock().unwrap().uploads.clone();
    assert!(uploads.len() >= 5);
    for upload in uploads {
        assert_eq!(upload.round, RoundId(last), "{upload:?}");
    }
}

/// A round that the site's policy refuses costs no work and sends nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policy_is_asked_before_any_job_is_made() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    world.config.policy = Policy {
        max_symbols: 8,
        ..world.config.policy
    };
    let digest = world.hub.lock().unwrap().open(world.manifest.clone());
    let script = async {
        wait_until(|| world.hub.lock().unwrap().served.contains(&digest)).await;
        // Long enough for a job to appear, if one would.
        tokio::time::sleep(Duration::from_millis(500)).await;
        tasks.shutdown(Duration::from_secs(10)).await;
    };
    let (ended, ()) = tokio::join!(run(&world, &tasks), script);
    ended.unwrap();
    assert!(world.spool().jobs_in_order().unwrap().is_empty());
    assert!(world.hub.lock().unwrap().uploads.is_empty());
    assert_eq!(world.ledger().len(), 1);
}

/// The hub forgets what it logged and begins anew, as after a restored backup or with two faces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_no_continuation_ends_the_agent() {
    let (mut world, tasks) = (World::new(), Tasks::new());
    world.start(&tasks);
    world.hub.lock().unwrap().open(world.manifest.clone());
    let first = Tasks::new();
    let script = async {
        world.until_finished().await;
        first.shutdown(Duration::from_secs(10)).await;
    };
    let (ended, ()) = tokio::join!(run(&world, &first), script);
    ended.unwrap();
    {
        let mut hub = world.hub.lock().unwrap();
        let kept: Vec<_> = hub.entries.drain(1..).collect();
        hub.tree = Tree::new();
        let first = leaf_hash(&hub.entries[0]);
        hub.tree.push(first);
        for entry in kept {
            // One entry less, another one changed.
            hub.tree.push(leaf_hash(&[entry.as_slice(), b" "].concat()));
        }
    }
    let ended = tokio::time::timeout(PATIENCE, run(&world, &Tasks::new())).await;
    let error = ended.expect("goes on with a forked log").unwrap_err();
    assert!(
        matches!(error, AgentError::Trust(TrustError::Fork { .. })),
        "{error}"
    );
    tasks.shutdown(Duration::from_secs(10)).await;
}
