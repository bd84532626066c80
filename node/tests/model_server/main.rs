//! A source behind the site's own server gives the shards that its weights would, and a server that is not fit says why.

#![cfg(test)]

mod access;
mod fake;
#[path = "../common/lines.rs"]
mod lines;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use consilium_kernels::RecordShape;
use consilium_node::scorer::{RawServer, Scorer, ScorerSettings, ServerKind};
use consilium_node::spool::{Job, Outcome, ScoreJob, Spool};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::score::{score_shard, score_token_shard};
use consilium_node::worker::tokenizer::train_bpe;
use consilium_node::worker::tokens::tokens_of;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Shard, Symbols};
use consilium_protocol::{Digest, RoundId};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use fake::{Fake, Fault, Running};
use lines::lines;

const KINDS: [ServerKind; 2] = [ServerKind::Vllm, ServerKind::Sglang];
const ITEMS: u64 = 11;
/// Requests of a probe.
const PROBE: usize = 3;
const SHAPE: RecordShape = RecordShape {
    k: 8,
    fill_permille: 995,
};

/// Items with a context for every third; one has characters of several bytes.
fn reference() -> String {
    let mut text: String = lines()[..10]
        .iter()
        .enumerate()
        .map(|(index, line)| {
            let cut = if index % 3 == 0 {
                line.find(" use").unwrap()
            } else {
                0
            };
            let (context, target) = line.split_at(cut);
            format!("{{\"context\":\"{context}\",\"target\":\"{target}\"}}\n")
        })
        .collect();
    text.push_str("{\"target\":\"zwölf Äpfel → kavo\"}\n");
    text
}

/// A model folder whose predictions are far from uniform: random weights, the embedding and with it the head enlarged.
fn save_model(folder: &Path, seed: u64) {
    let tokenizer = train_bpe(lines().iter().map(String::as_str), 340).unwrap();
    let mut config = ModelConfig::llama(tokenizer.size() + 5, 64, 1, 2, 48);
    config.eos = vec![tokenizer.end_of_record()];
    let model = LoadedModel::random(Arc::new(tokenizer), config, seed).unwrap();
    model.save(folder).unwrap();
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let enlarged: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let by = if name.contains("norm") { 1.0 } else { 12.0 };
            let values = view.data().chunks_exact(4).flat_map(|value| {
                let value = f32::from_le_bytes(value.try_into().unwrap());
                (value * by).to_le_bytes()
            });
            (name, view.shape().to_vec(), values.collect())
        })
        .collect();
    let views = enlarged.iter().map(|(name, shape, data)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A site: model folder, spool with the reference set, and a job for all of it.
struct Site {
    folder: tempfile::TempDir,
    reference: Digest,
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        save_model(&folder.path().join("source"), 3);
        let spool = Spool::open(&folder.path().join("spool")).unwrap();
        let reference = spool.put_blob(reference().as_bytes()).unwrap();
        Self { folder, reference }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn spool(&self) -> Spool {
        Spool::open(&self.at("spool")).unwrap()
    }

    fn model(&self) -> LoadedModel {
        LoadedModel::load(&self.at("source")).unwrap()
    }

    fn job(&self) -> Job {
        Job::Score(ScoreJob {
            round: RoundId(1),
            shard: 0,
            items: 0..ITEMS,
            reference: self.reference,
            symbol_space: SymbolSpace::Bytes,
            symbols: 8,
            fill_permille: 995,
        })
    }

    fn server(&self, kind: ServerKind, fault: Fault) -> Running {
        Fake::new(kind, self.model(), fault).start()
    }

    fn settings(&self, server: &Running, top: u32) -> ScorerSettings {
        let raw = RawServer {
            kind: server.fake.kind,
            url: server.url(),
            model: Some("big".to_owned()),
            top: Some(top),
            concurrency: Some(2),
            prompts: Some(2),
            max_tokens: None,
            timeout_seconds: Some(20),
            key_file: None,
            ca: server.url().starts_with("https").then(|| self.at("ca.pem")),
        };
        ScorerSettings {
            spool: self.at("spool"),
            source: self.at("source"),
            chat_template: false,
            server: raw.check().unwrap(),
        }
    }

    fn scorer(&self, server: &Running, top: u32) -> Scorer {
        let wait = Duration::from_millis(1);
        Scorer::with_wait(&self.settings(server, top), wait).unwrap()
    }

    /// Does the job and returns the shard, or what the result says.
    fn score(&self, scorer: &mut Scorer) -> Result<Shard, String> {
        self.score_job(scorer, &self.job())
    }

    fn score_job(&self, scorer: &mut Scorer, job: &Job) -> Result<Shard, String> {
        let spool = self.spool();
        let id = spool.submit(job).unwrap();
        spool.reset(&id).unwrap();
        assert!(scorer.work(&|| false).unwrap());
        match spool.outcome(&id).unwrap().unwrap() {
            Outcome::Done { artefact, .. } => {
                let bytes = spool.read_blob(&artefact, 1 << 20).unwrap();
                Ok(Shard::parse(&bytes).unwrap())
            }
            Outcome::Failed { problem } => Err(problem),
        }
    }

    /// The shard that the weights give.
    fn direct(&self) -> Shard {
        let reference = ReferenceSet::parse(reference().as_bytes()).unwrap();
        let scored = score_shard(&self.model(), &reference, 0..ITEMS, &SHAPE, &mut ()).unwrap();
        assert!(scored.stats.branches > 20, "{:?}", scored.stats);
        scored.shard
    }
}

fn symbols(shard: &Shard) -> &[u8] {
    match &shard.symbols {
        Symbols::Bytes(symbols) => symbols,
        Symbols::Tokens(_) => panic!("bytes"),
    }
}

#[test]
fn with_every_token_listed_the_shard_is_that_of_the_weights_within_a_step() {
    let site = Site::new();
    let direct = site.direct();
    for kind in KINDS {
        let mut fake = Fake::new(kind, site.model(), Fault::None);
        fake.max_logprobs = 4096;
        let server = fake.start();
        let shard = site.score(&mut site.scorer(&server, 4096)).unwrap();
        assert_near(kind, &shard, &direct);
    }
}

#[test]
fn in_token_space_the_shard_is_that_of_the_weights_within_a_step() {
    let site = Site::new();
    let model = site.model();
    let mut set = String::new();
    for line in lines() {
        let tokens = tokens_of(&model.tokenizer, &model.vocab, &line).unwrap();
        let tokens = serde_json::to_string(&tokens).unwrap();
        set += &format!("{{\"target\":\"{line}\",\"tokens\":{tokens}}}\n");
    }
    let space = SymbolSpace::Tokens {
        tokenizer: Digest::of(model.tokenizer.source()),
        size: u32::try_from(model.tokenizer.size()).unwrap(),
    };
    let set = ReferenceSet::parse(set.as_bytes())
        .map(|parsed| (parsed, set))
        .unwrap();
    let reference = site.spool().put_blob(set.1.as_bytes()).unwrap();
    let direct = score_token_shard(&model, &set.0, 0..ITEMS, space, &SHAPE, &mut ()).unwrap();
    let Job::Score(job) = site.job() else {
        panic!("a score job")
    };
    let job = |symbol_space| {
        Job::Score(ScoreJob {
            reference,
            symbol_space,
            ..job.clone()
        })
    };
    for kind in KINDS {
        let server = site.server(kind, Fault::None);
        let mut scorer = site.scorer(&server, 20);
        let shard = site.score_job(&mut scorer, &job(space)).unwrap();
        assert_eq!(shard.header, direct.shard.header);
        assert_eq!(shard.offsets, direct.shard.offsets);
        let far = |got: &[u8], want: &[u8]| {
            assert_eq!(got.len(), want.len());
            got.iter()
                .zip(want)
                .filter(|(a, b)| a.abs_diff(**b) > 1)
                .count()
        };
        assert_eq!(far(&shard.tail, &direct.shard.tail), 0, "{kind}");
        // Two masses that differ by rounding alone may change places at the border of what is kept.
        assert!(far(&shard.codes, &direct.shard.codes) <= 8, "{kind}");
        let other = SymbolSpace::Tokens {
            tokenizer: reference,
            size: 3,
        };
        let refused = site.score_job(&mut scorer, &job(other)).unwrap_err();
        assert!(
            refused.contains("tokenizer.json of the source"),
            "{refused}"
        );
    }
}

/// Two shards are the same within a step of the codes.
fn assert_near(kind: ServerKind, shard: &Shard, direct: &Shard) {
    assert_eq!(shard.header, direct.header);
    assert_eq!(shard.offsets, direct.offsets);
    let near = |got: &[u8], want: &[u8]| {
        assert_eq!(got.len(), want.len());
        got.iter()
            .zip(want)
            .filter(|(got, want)| got.abs_diff(**want) > 1)
            .count()
    };
    assert_eq!(near(&shard.end, &direct.end), 0, "{kind}: end");
    assert_eq!(near(&shard.tail, &direct.tail), 0, "{kind}: tail");
    let missed = (&shard.missed, &direct.missed);
    assert_eq!(near(missed.0, missed.1), 0, "{kind}: missed {missed:?}");
    // Two masses that differ by rounding alone may change places at the border of what is kept.
    let moved = symbols(shard)
        .iter()
        .zip(symbols(direct))
        .filter(|(a, b)| a != b)
        .count();
    assert!(moved <= 8, "{kind}: {moved} symbols");
    let off = near(&shard.codes, &direct.codes);
    assert!(
        off <= moved,
        "{kind}: {off} codes with {moved} symbols moved"
    );
}

#[test]
fn a_chat_model_behind_a_server_gets_contexts_in_its_template_as_its_weights_would() {
    let site = Site::new();
    let plain = site.direct();
    let template = "{% for m in messages %}use {{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %} ->{% endif %}";
    fs::write(site.at("source/chat_template.jinja"), template).unwrap();
    let mut model = site.model();
    model.use_chat_template(&site.at("source")).unwrap();
    let reference = ReferenceSet::parse(reference().as_bytes()).unwrap();
    let wrapped = score_shard(&model, &reference, 0..ITEMS, &SHAPE, &mut ()).unwrap();
    assert_ne!(wrapped.shard.codes, plain.codes, "the template has a say");
    for kind in KINDS {
        let mut fake = Fake::new(kind, site.model(), Fault::None);
        fake.max_logprobs = 4096;
        let server = fake.start();
        let settings = ScorerSettings {
            chat_template: true,
            ..site.settings(&server, 4096)
        };
        let shard = site.score(&mut Scorer::new(&settings).unwrap()).unwrap();
        assert_near(kind, &shard, &wrapped.shard);
        fs::rename(site.at("source/chat_template.jinja"), site.at("away")).unwrap();
        let error = Scorer::new(&settings).unwrap_err().to_string();
        assert!(error.contains("no chat template"), "{error}");
        fs::rename(site.at("away"), site.at("source/chat_template.jinja")).unwrap();
    }
}

#[test]
fn with_twenty_tokens_listed_no_symbol_gets_more_than_the_weights_give_it() {
    let site = Site::new();
    let direct = site.direct();
    for kind in KINDS {
        let server = site.server(kind, Fault::None);
        let shard = site.score(&mut site.scorer(&server, 20)).unwrap();
        let (mut same, mut lower) = (0, 0);
        for position in 0..shard.positions() {
            let of = |shard: &Shard, symbol: u8| {
                let slots = position * 8..(position + 1) * 8;
                let place = symbols(shard)[slots.clone()]
                    .iter()
                    .position(|s| *s == symbol)?;
                Some(shard.codes[slots][place])
            };
            for symbol in 0..=255 {
                if let (Some(got), Some(want)) = (of(&shard, symbol), of(&direct, symbol)) {
                    assert!(
                        got.saturating_add(1) >= want,
                        "{kind} {position} {symbol}: {got} {want}"
                    );
                    if got <= want.saturating_add(1) {
                        same += 1;
                    } else {
                        lower += 1;
                    }
                }
            }
        }
        assert!(
            same > 100 && lower > 20,
            "{kind}: {same} the same, {lower} lower"
        );
    }
}

#[test]
fn an_unfit_server_is_named_with_its_own_words_and_the_fix() {
    let site = Site::new();
    let cases = [
        (
            Fault::FailsFrom(0),
            20,
            vec!["500", "CUDA out of memory", "source_server.prompts"],
        ),
        (Fault::CutsBody, 20, vec!["http://127.0.0.1"]),
        (Fault::CutsJson, 20, vec!["truncated"]),
        (
            Fault::Redirects,
            20,
            vec!["307", "redirects are not followed"],
        ),
        (
            Fault::NoLogprobs,
            20,
            vec!["logprobs", "nothing in front of it"],
        ),
        (
            Fault::Sharpened,
            20,
            vec!["sum to", "raw log-probabilities"],
        ),
        (Fault::Floods, 20, vec!["right server"]),
        (
            Fault::Changes,
            20,
            vec![
                "second time",
                "--no-enable-prefix-caching",
                "--disable-radix-cache",
            ],
        ),
        (
            Fault::OtherTokenizer,
            20,
            vec!["tokenizer", "spelled otherwise"],
        ),
    ];
    for kind in KINDS {
        for (fault, top, parts) in &cases {
            let server = site.server(kind, *fault);
            let problem = site.score(&mut site.scorer(&server, *top)).unwrap_err();
            for part in parts {
                assert!(
                    problem.contains(part),
                    "{kind} {fault:?}: {part} is not in: {problem}"
                );
            }
            assert!(problem.contains(&server.url()), "{problem}");
        }
    }
    let server = site.server(ServerKind::Vllm, Fault::None);
    let problem = site.score(&mut site.scorer(&server, 64)).unwrap_err();
    for part in [
        "greater than max allowed: 20",
        "--max-logprobs",
        "source_server.top",
    ] {
        assert!(problem.contains(part), "{part} is not in: {problem}");
    }
}

#[test]
fn a_busy_server_is_asked_again() {
    let site = Site::new();
    for kind in KINDS {
        let server = site.server(kind, Fault::Busy);
        site.score(&mut site.scorer(&server, 20)).unwrap();
        let requests = server.fake.requests.lock().unwrap();
        assert_eq!(requests[0], requests[1]);
        assert_eq!(requests[0], requests[2]);
    }
}

#[test]
fn a_server_that_is_away_is_named_after_a_few_tries() {
    let site = Site::new();
    let server = site.server(ServerKind::Vllm, Fault::None);
    let mut scorer = site.scorer(&server, 20);
    let url = server.url();
    drop(server);
    let problem = site.score(&mut scorer).unwrap_err();
    assert!(
        problem.contains(&url) && problem.contains("is the server up?"),
        "{problem}"
    );
}

#[test]
fn what_was_scored_before_a_failure_is_not_asked_again() {
    let site = Site::new();
    let whole = {
        let server = site.server(ServerKind::Vllm, Fault::None);
        let shard = site.score(&mut site.scorer(&server, 20)).unwrap();
        (shard, server.count())
    };
    assert!(
        site.spool().states_named("scored-").unwrap().is_empty(),
        "parts are removed"
    );
    // The same address fails and works: parts are those of one server.
    let first = site.server(ServerKind::Vllm, Fault::FailsFrom(whole.1 - 3));
    let settings = site.settings(&first, 20);
    let wait = Duration::from_millis(1);
    let problem = site
        .score(&mut Scorer::with_wait(&settings, wait).unwrap())
        .unwrap_err();
    assert!(problem.contains("500"), "{problem}");
    let kept = site.spool().states_named("scored-").unwrap();
    assert!(!kept.is_empty());
    let address = first.url();
    drop(first);
    let second = Fake::new(ServerKind::Vllm, site.model(), Fault::None).start_at(&address);
    let shard = site
        .score(&mut Scorer::with_wait(&settings, wait).unwrap())
        .unwrap();
    assert_eq!(shard, whole.0);
    let (again, once) = (second.count() - PROBE, whole.1 - PROBE);
    let parts = kept.len();
    assert!(
        again <= once - 2 * parts,
        "{again} of {once} after {parts} parts"
    );
}

#[test]
fn a_withdrawn_job_and_an_order_to_stop_end_the_work_without_a_result() {
    let site = Site::new();
    let server = site.server(ServerKind::Sglang, Fault::None);
    let mut scorer = site.scorer(&server, 20);
    let spool = site.spool();
    let id = spool.submit(&site.job()).unwrap();
    assert!(scorer.work(&|| true).unwrap());
    assert_eq!(spool.outcome(&id).unwrap(), None);
    assert_eq!(server.count(), 0, "nothing was asked");
    spool.withdraw(&id).unwrap();
    assert!(!scorer.work(&|| false).unwrap());
}

/// The real program, which is given the spool, the source and the address, and no other file.
#[test]
fn the_scorer_process_does_score_jobs_until_a_signal_ends_it() {
    let site = Site::new();
    let server = site.server(ServerKind::Vllm, Fault::None);
    // The server has the weights; the scorer needs none.
    fs::remove_file(site.at("source/model.safetensors")).unwrap();
    let settings = site.settings(&server, 20);
    let command = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consilium-node"));
        command
            .env_clear()
            // A proxy of the environment would be another address.
            .env("HTTP_PROXY", "http://127.0.0.1:9")
            .env("ALL_PROXY", "http://127.0.0.1:9")
            .arg("scorer")
            .args(["--spool", site.at("spool").to_str().unwrap()])
            .args(["--source", site.at("source").to_str().unwrap()])
            .args(settings.server.arguments())
            .args(more)
            .stdout(Stdio::piped());
        command
    };
    let probe = command(&["--probe", "--json"]).output().unwrap();
    let text = String::from_utf8(probe.stdout).unwrap();
    assert!(
        probe.status.success() && text.contains("\"tokens_per_position\":20"),
        "{text}"
    );

    let spool = site.spool();
    let id = spool.submit(&site.job()).unwrap();
    let mut scorer = command(&["--supervised"]).spawn().unwrap();
    let outcome = (0..600).find_map(|_| {
        spool.wait_for_change(Duration::from_millis(100)).unwrap();
        spool.outcome(&id).unwrap()
    });
    let Some(Outcome::Done {
        artefact, notes, ..
    }) = outcome
    else {
        panic!("{outcome:?}")
    };
    let shard = Shard::parse(&spool.read_blob(&artefact, 1 << 20).unwrap()).unwrap();
    assert_eq!(
        (shard.header.items(), shard.header.reference),
        (0..ITEMS, site.reference)
    );
    assert!(
        notes["bits_per_byte"] > 0.0 && notes["branches_per_token"] > 0.0,
        "{notes:?}"
    );
    let pid = scorer.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(scorer.wait().unwrap().success(), "SIGTERM is no failure");
}
