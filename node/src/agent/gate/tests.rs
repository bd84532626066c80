//! Each rule of the gate, and what the ledger holds after it.

use std::sync::Arc;

use consilium_protocol::time::SystemClock;
use consilium_protocol::{ConsortiumId, InstitutionId, RoundId};

use super::*;
use crate::agent::testing::{adapter, evaluation, manifest, shard, token_shard, tokens};

struct Site {
    folder: tempfile::TempDir,
    gate: Gate,
}

fn owner() -> Owner {
    Owner {
        consortium: ConsortiumId::new("demo").unwrap(),
        institution: InstitutionId::new("clinic").unwrap(),
    }
}

fn policy() -> Policy {
    Policy {
        modes: vec![Mode::Unified],
        max_symbols: 16,
        max_rounds: 1,
        max_bytes: 100_000,
    }
}

fn site(policy: Policy) -> Site {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"hidden_size": 128}"#).unwrap();
    let ledger = Ledger::open(
        &folder.path().join("ledger.jsonl"),
        &owner(),
        Arc::new(SystemClock),
    )
    .unwrap();
    let gate = Gate::new(policy, owner(), folder.path(), ledger);
    Site { folder, gate }
}

fn hub() -> PeerIdentity {
    "consilium://demo/aggregator/hub".parse().unwrap()
}

impl Site {
    fn put(&self, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(Digest::of(bytes).to_string());
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn release(&mut self, kind: Kind, bytes: &[u8]) -> Result<Permit, GateError> {
        let path = self.put(bytes);
        self.gate
            .release(&manifest(), statement(kind, bytes), &path, &hub())
    }

    fn lines(&self) -> usize {
        let text = std::fs::read_to_string(self.folder.path().join("ledger.jsonl")).unwrap();
        text.lines().count()
    }
}

fn statement(kind: Kind, bytes: &[u8]) -> Statement {
    Statement {
        consortium: owner().consortium,
        round: RoundId(1),
        manifest: Digest::of(b"signed manifest"),
        institution: owner().institution,
        kind,
        sequence: 0,
        artefact: Digest::of(bytes),
    }
}

#[test]
fn what_the_round_asks_for_leaves_once_it_is_in_the_ledger() {
    let mut site = site(policy());
    for (kind, bytes) in [
        (Kind::Records, shard(&manifest(), 0)),
        (Kind::Adapter, adapter(&manifest(), 4)),
        (Kind::Evaluation, evaluation()),
    ] {
        let before = site.lines();
        let permit = site.release(kind, &bytes).unwrap();
        assert_eq!(site.lines(), before + 1);
        let text = std::fs::read_to_string(site.folder.path().join("ledger.jsonl")).unwrap();
        let line = text.lines().last().unwrap();
        assert!(line.contains(&Digest::of(&bytes).to_string()), "{line}");
        let key = SigningKey::from_bytes(&[7; 32]);
        let (upload, _) = permit.into_upload(&key);
        assert_eq!(upload.ledger, Digest::of(line.as_bytes()));
        assert_eq!(upload.length, u64::try_from(bytes.len()).unwrap());
        // A retry sends the same bytes and is no second release.
        site.release(kind, &bytes).unwrap();
        assert_eq!(site.lines(), before + 1);
    }
}

#[test]
fn records_of_tokens_leave_through_the_same_rules_and_the_same_ledger() {
    let manifest = tokens(manifest());
    let bytes = token_shard(&manifest, 0).to_bytes().unwrap();
    let mut site = site(policy());
    let path = site.put(&bytes);
    let good = statement(Kind::Records, &bytes);
    site.gate
        .release(&manifest, good.clone(), &path, &hub())
        .unwrap();
    assert_eq!(site.lines(), 2);
    let text = std::fs::read_to_string(site.folder.path().join("ledger.jsonl")).unwrap();
    assert!(text.contains(&Digest::of(&bytes).to_string()), "{text}");

    let narrow = Policy {
        max_symbols: 15,
        ..policy()
    };
    let mut narrow = self::site(narrow);
    let path = narrow.put(&bytes);
    let refused = narrow.gate.release(&manifest, good, &path, &hub());
    assert!(matches!(refused, Err(GateError::Policy { key, .. }) if key == "policy.max_symbols"));
    assert_eq!(narrow.lines(), 1);
}

#[test]
fn each_rule_of_the_policy_holds_and_leaves_no_line() {
    let records = shard(&manifest(), 0);
    let refuse = |policy: Policy, key: &str| {
        let mut site = site(policy);
        let refused = site.release(Kind::Records, &records).unwrap_err();
        assert!(refused.to_string().contains(key), "{refused}");
        assert_eq!(site.lines(), 1, "{refused}");
    };
    refuse(
        Policy {
            modes: Vec::new(),
            ..policy()
        },
        "policy.modes",
    );
    refuse(
        Policy {
            max_symbols: 15,
            ..policy()
        },
        "policy.max_symbols",
    );
    refuse(
        Policy {
            max_rounds: 0,
            ..policy()
        },
        "policy.max_rounds",
    );
    let almost = u64::try_from(records.len()).unwrap() - 1;
    refuse(
        Policy {
            max_bytes: almost,
            ..policy()
        },
        "policy.max_bytes",
    );
}

#[test]
fn the_hidden_size_of_the_source_bounds_the_symbols() {
    let records = shard(&manifest(), 0);
    for (config, message) in [
        (
            Some(r#"{"hidden_size": 127}"#),
            "eighth of the source's hidden size 127",
        ),
        (Some(r#"{"hidden": 128}"#), "missing field `hidden_size`"),
        (Some("{"), "config.json"),
        (None, "config.json"),
    ] {
        let mut site = site(policy());
        let path = site.folder.path().join("config.json");
        match config {
            Some(text) => std::fs::write(path, text).unwrap(),
            None => std::fs::remove_file(path).unwrap(),
        }
        let refused = site.release(Kind::Records, &records).unwrap_err();
        assert!(refused.to_string().contains(message), "{refused}");
        assert_eq!(site.lines(), 1);
    }
}

#[test]
fn only_this_consortiums_aggregator_receives_and_only_our_own_statements() {
    let bytes = evaluation();
    let mut site = site(policy());
    let path = site.put(&bytes);
    let good = statement(Kind::Evaluation, &bytes);
    for peer in [
        "consilium://demo/node/hub",
        "consilium://other/aggregator/hub",
    ] {
        let refused = site
            .gate
            .release(&manifest(), good.clone(), &path, &peer.parse().unwrap());
        assert!(
            matches!(refused, Err(GateError::Recipient { .. })),
            "{peer}"
        );
    }
    let mut wrong = vec![good.clone(), good.clone(), good];
    wrong[0].institution = InstitutionId::new("bank").unwrap();
    wrong[1].round = RoundId(2);
    wrong[2].consortium = ConsortiumId::new("other").unwrap();
    for statement in wrong {
        let refused = site.gate.release(&manifest(), statement, &path, &hub());
        assert!(matches!(refused, Err(GateError::Statement { .. })));
    }
    assert_eq!(site.lines(), 1);
}

#[test]
fn other_bytes_never_leave_for_the_statement_or_for_a_slot_once_filled() {
    let mut site = site(policy());
    let (bytes, other) = (adapter(&manifest(), 4), adapter(&manifest(), 5));
    let path = site.put(&other);
    let swapped = site
        .gate
        .release(&manifest(), statement(Kind::Adapter, &bytes), &path, &hub());
    assert!(matches!(swapped, Err(GateError::Digest { .. })));
    site.release(Kind::Adapter, &bytes).unwrap();
    let second = site.release(Kind::Adapter, &other);
    assert!(matches!(second, Err(GateError::Slot { .. })));
    assert_eq!(site.lines(), 2);
}

#[test]
fn a_second_round_beyond_the_limit_receives_nothing() {
    let mut site = site(policy());
    let bytes = evaluation();
    site.release(Kind::Evaluation, &bytes).unwrap();
    let path = site.put(&bytes);
    let mut next = statement(Kind::Evaluation, &bytes);
    next.manifest = Digest::of(b"another manifest");
    let refused = site.gate.release(&manifest(), next, &path, &hub());
    assert!(matches!(refused, Err(GateError::Policy { key, .. }) if key == "policy.max_rounds"));
    site.release(Kind::Evaluation, &bytes).unwrap();
}

#[test]
fn in_modes_without_records_none_leave_and_adapters_do() {
    for mode in [Mode::Pairwise, Mode::Adapters] {
        let mut site = site(Policy {
            modes: vec![mode],
            ..policy()
        });
        let manifest = Manifest { mode, ..manifest() };
        let mut release = |kind, bytes: &[u8]| {
            let path = site.put(bytes);
            let passed = site
                .gate
                .release(&manifest, statement(kind, bytes), &path, &hub());
            (passed, site.lines())
        };
        let (refused, lines) = release(Kind::Records, &shard(&manifest, 0));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(mode.name()), "{refused}");
        assert_eq!(lines, 1);
        let (passed, lines) = release(Kind::Adapter, &adapter(&manifest, 4));
        passed.unwrap();
        assert_eq!(lines, 2);
    }
}
