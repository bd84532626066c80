//! Everything that is hashed or signed has the bytes that it had when it was released.
//!
//! The vectors come from `tests/vectors/make.py`, see the README beside it.

#![cfg(test)]

use std::fmt::Debug;

use consilium_protocol::artefact::Kind;
use consilium_protocol::charter::{Charter, Member};
use consilium_protocol::codec::{decode, encode};
use consilium_protocol::contribution::{Statement, Unverified};
use consilium_protocol::evaluation::{Evaluation, Score};
use consilium_protocol::event::{Entry, Event, Phase, Reason, TargetIndex};
use consilium_protocol::frame::{FrameHeader, HEADER};
use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, Manifest, MergeRule, Mode, Screening,
    SymbolSpace, TargetForm, Training,
};
use consilium_protocol::message::{
    Content, Download, Hello, Logged, Message, Part, Ready, Receipt, Reject, Status, Task, Upload,
    Welcome,
};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RejectCode, RoundId, UnixMillis};

const HINT: &str = "is not its vector; see protocol/tests/vectors/README.md";

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn id(name: &str) -> InstitutionId {
    InstitutionId::new(name).unwrap()
}

fn north() -> ConsortiumId {
    ConsortiumId::new("north").unwrap()
}

fn manifest() -> Manifest {
    Manifest {
        consortium: north(),
        round: RoundId(3),
        mode: Mode::Unified,
        charter: digest("charter"),
        pivot: digest("pivot"),
        reference: digest("reference"),
        items: 4096,
        symbol_space: SymbolSpace::Bytes,
        symbols: 16,
        fill_permille: 995,
        shard_items: 1024,
        fusion: FusionRule::Softmax { sharpness: 20 },
        targets: TargetForm::default(),
        screening: Screening::default(),
        training: Training {
            inner_rounds: 8,
            local_steps: 30,
            rows: 12,
            row_tokens: 96,
            learning_rate_micros: 10_000,
            warmup_permille: 50,
            final_permille: 20,
            cross_entropy_permille: 100,
            rank: 32,
            alpha: 64,
            target_modules: vec!["q_proj".to_owned(), "down_proj".to_owned()],
            modules_to_save: vec!["lm_head".to_owned()],
            outer_rate_permille: 700,
            outer_momentum_permille: 650,
            distillation: Distillation::Trie,
            merge: MergeRule::Product,
            defence: Defence::None,
        },
        members: vec![id("bank"), id("clinic")],
        quorum: 2,
        deadlines: Deadlines {
            contribute_seconds: 60,
            distil_seconds: 61,
            evaluate_seconds: 62,
        },
        max_weight: None,
        seed: u64::MAX,
        previous_release: None,
    }
}

fn events() -> Vec<Event> {
    let institution = id("clinic");
    vec![
        Event::Opened {
            manifest: digest("manifest"),
            start: digest("start"),
        },
        Event::Joined {
            institution: institution.clone(),
            capacity: 7,
        },
        Event::Accepted {
            institution: institution.clone(),
            kind: Kind::Records,
            sequence: 1,
            artefact: digest("artefact"),
            signature: "00".repeat(64),
            ledger: digest("ledger"),
        },
        Event::Refused {
            institution,
            kind: Kind::Adapter,
            sequence: 2,
            artefact: digest("artefact"),
            code: RejectCode::WrongReference,
        },
        Event::Closed {
            phase: Phase::Contribute,
            members: vec![id("bank"), id("clinic")],
        },
        Event::Closed {
            phase: Phase::Distil { inner: 5 },
            members: Vec::new(),
        },
        Event::Closed {
            phase: Phase::Evaluate,
            members: vec![id("bank")],
        },
        Event::Fused {
            targets: digest("targets"),
            routing: digest("routing"),
            report: None,
        },
        Event::Merged {
            inner: 5,
            adapter: digest("adapter"),
            momentum: digest("momentum"),
            truncation_ppm: 12_345,
        },
        Event::Released {
            release: digest("release"),
            report: digest("report"),
        },
        Event::Rejected {
            reason: Reason::Quorum,
            blamed: Vec::new(),
            report: None,
        },
        Event::Rejected {
            reason: Reason::Gate,
            blamed: Vec::new(),
            report: None,
        },
        Event::Rejected {
            reason: Reason::NoGain,
            blamed: Vec::new(),
            report: None,
        },
        Event::Rejected {
            reason: Reason::Operator,
            blamed: Vec::new(),
            report: None,
        },
    ]
}

fn entry(event: Event) -> Entry {
    Entry {
        version: 1,
        consortium: north(),
        round: RoundId(3),
        at: UnixMillis(1_700_000_000_000),
        event,
    }
}

#[test]
fn a_manifest_is_signed_as_its_vector() {
    let tokens = Manifest {
        symbol_space: SymbolSpace::Tokens {
            tokenizer: digest("tokenizer"),
            size: 32_000,
        },
        fusion: FusionRule::MinCe,
        previous_release: Some(digest("release")),
        ..manifest()
    };
    let learning = |mode, distillation| Manifest {
        mode,
        training: Training {
            distillation,
            ..manifest().training
        },
        ..manifest()
    };
    let graph = Distillation::Infigfusion {
        symbols: 10,
        temperature_permille: 1000,
        graph_permille: 500,
    };
    let pairwise = learning(Mode::Pairwise, graph);
    let adapters = Manifest {
        max_weight: Some(4),
        ..learning(Mode::Adapters, Distillation::Labels)
    };
    for (manifest, vector) in [
        (manifest(), include_str!("vectors/manifest.txt")),
        (tokens, include_str!("vectors/manifest-tokens.txt")),
        (pairwise, include_str!("vectors/manifest-pairwise.txt")),
        (adapters, include_str!("vectors/manifest-adapters.txt")),
    ] {
        assert_eq!(manifest.to_text().unwrap(), vector, "a manifest {HINT}");
        assert_eq!(Manifest::parse(vector).unwrap(), manifest);
    }
}

#[test]
fn a_charter_is_signed_as_its_vector() {
    let member = |name, seed| Member {
        institution: id(name),
        key: hex::encode(
            ed25519_dalek::SigningKey::from_bytes(&[seed; 32])
                .verifying_key()
                .as_bytes(),
        ),
    };
    let charter = Charter {
        consortium: north(),
        log_key: "north-log+00000000+AAAA".to_owned(),
        modes: vec![Mode::Unified, Mode::Pairwise, Mode::Adapters],
        quorum: 2,
        max_symbols: 16,
        gate_bound_permille: 250,
        members: vec![member("bank", 1), member("clinic", 2)],
    };
    let vector = include_str!("vectors/charter.txt");
    assert_eq!(charter.to_text().unwrap(), vector, "the charter {HINT}");
    assert_eq!(Charter::parse(vector).unwrap(), charter);
}

#[test]
fn every_kind_of_log_entry_is_hashed_as_its_vector() {
    let vectors: Vec<&str> = include_str!("vectors/entries.jsonl").lines().collect();
    let entries: Vec<Entry> = events().into_iter().map(entry).collect();
    assert_eq!(vectors.len(), entries.len());
    for (vector, entry) in vectors.into_iter().zip(entries) {
        let text = String::from_utf8(entry.to_bytes().unwrap()).unwrap();
        assert_eq!(text, vector, "an entry {HINT}");
        assert_eq!(Entry::parse(vector.as_bytes()).unwrap(), entry);
    }
}

#[test]
fn documents_that_the_log_knows_by_digest_have_the_bytes_of_their_vectors() {
    let score = |bits_per_byte, accuracy| Score {
        bits_per_byte,
        accuracy,
    };
    let evaluation = Evaluation {
        candidate: score(0.5, Some(0.75)),
        pivot: score(1.25, None),
        source: Some(score(0.625, Some(1.0))),
    };
    let vector = include_bytes!("vectors/evaluation.json");
    assert_eq!(
        evaluation.to_bytes().unwrap(),
        vector,
        "the evaluation {HINT}"
    );
    assert_eq!(Evaluation::parse(vector).unwrap(), evaluation);

    let shards = vec![digest("shard 0"), digest("shard 1")];
    let targets = serde_json::to_string(&TargetIndex {
        shards,
        withheld: Vec::new(),
        key: None,
    })
    .unwrap();
    assert_eq!(
        targets,
        include_str!("vectors/targets.json"),
        "the index of targets {HINT}"
    );
}

/// The frames in the order of the vectors.
struct Frames(std::str::Lines<'static>);

impl Frames {
    fn next<T: Message + PartialEq + Debug>(&mut self, name: &str, message: &T) {
        let (named, vector) = self.0.next().unwrap().split_once(": ").unwrap();
        assert_eq!(named, name);
        let body = encode(message).unwrap();
        let mut frame = FrameHeader::new(T::KIND, &body).to_bytes().to_vec();
        frame.extend(&body);
        assert_eq!(hex::encode(&frame), vector, "the frame `{name}` {HINT}");
        let (header, body) = frame.split_first_chunk::<HEADER>().unwrap();
        FrameHeader::parse(header).unwrap().check(body).unwrap();
        assert_eq!(decode::<T>(body).unwrap(), *message);
    }
}

#[test]
fn every_kind_of_frame_is_sent_as_its_vector() {
    let logged = |event: usize, proof: &str| Logged {
        entry: entry(events()[event].clone()).to_bytes().unwrap(),
        proof: proof.to_owned(),
    };
    let status = |task| Status {
        round: Some(logged(0, "proof")),
        task,
    };
    let statement = Statement {
        consortium: north(),
        round: RoundId(3),
        manifest: digest("manifest"),
        institution: id("clinic"),
        kind: Kind::Adapter,
        sequence: 5,
        artefact: digest("artefact"),
    };
    let signature = std::array::from_fn(|index| u8::try_from(index).unwrap());
    let mut frames = Frames(include_str!("vectors/frames.txt").lines());
    let hello = Hello {
        version: 1,
        software: "node 1.0".to_owned(),
        consortium: north(),
        institution: id("clinic"),
        capacity: 7,
        log_size: 41,
    };
    frames.next("hello", &hello);
    let welcome = Welcome {
        version: 1,
        charter: digest("charter"),
        checkpoint: "checkpoint\n".to_owned(),
        consistency: vec![digest("left"), digest("right")],
    };
    frames.next("welcome", &welcome);
    let idle = Status {
        round: None,
        task: Task::Wait,
    };
    frames.next("status wait", &idle);
    let score = Task::Score { shards: vec![0, 9] };
    frames.next("status score", &status(score));
    let distil = Task::Distil {
        inner: 5,
        start: logged(8, "proof 2"),
        targets: logged(7, "proof 3"),
        part: Part {
            seed: 99,
            from: 10,
            to: 20,
        },
    };
    frames.next("status distil", &status(distil));
    let candidate = logged(8, "proof 2");
    frames.next("status evaluate", &status(Task::Evaluate { candidate }));
    let outcome = logged(9, "proof 4");
    frames.next("status finished", &status(Task::Finished { outcome }));
    let start = logged(8, "proof 2");
    frames.next("status train", &status(Task::Train { inner: 5, start }));
    let upload = Upload {
        statement: Unverified::new(statement, signature),
        length: 1234,
        ledger: digest("ledger"),
    };
    frames.next("upload", &upload);
    frames.next("ready", &Ready { offset: 1000 });
    let accepted = logged(2, "proof 5");
    frames.next("receipt", &Receipt { accepted });
    let code = RejectCode::Storage;
    frames.next("reject", &Reject { code });
    let download = Download {
        digest: digest("artefact"),
        offset: 512,
    };
    frames.next("download", &download);
    frames.next("content", &Content { length: 4096 });
    assert_eq!(frames.0.next(), None, "a vector without a message");
}
