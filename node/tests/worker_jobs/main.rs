//! The worker does the jobs of a spool folder where no socket can be made, takes orders to stop, and goes on where it was.

#![cfg(test)]

#[path = "../common/lines.rs"]
mod lines;
mod tokens;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use consilium_kernels::quant::Format;
use consilium_node::config::{DeviceChoice, Memory};
use consilium_node::spool::{
    DistilJob, EvaluateJob, Job, JobId, Lesson, Outcome, RecordFiles, Rival, ScoreJob, Spool,
};
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::tokenizer::train_bpe;
use consilium_node::worker::{Folders, LoadedModel, Worker};
use consilium_protocol::evaluation::Evaluation;
use consilium_protocol::manifest::{Defence, Distillation, MergeRule, SymbolSpace, Training};
use consilium_protocol::message::Part;
use consilium_protocol::shard::Shard;
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RoundId};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use lines::lines;

const ITEMS: u64 = 40;
const SHARD_ITEMS: u32 = 25;
const COMMAND: &str = "CONSILIUM_TEST_COMMAND";
const CONFIG: &str = "CONSILIUM_TEST_CONFIG";

fn folders(folder: &Path) -> Folders {
    Folders {
        spool: folder.join("spool"),
        pivot: folder.join("pivot").into(),
        source: Some(folder.join("source").into()),
        source_chat_template: false,
        holdout: folder.join("holdout.jsonl"),
        train_data: vec![folder.join("private.jsonl")],
    }
}

/// Model folders, a holdout and a spool that holds the reference set, whose digest is returned.
fn site(folder: &Path) -> Digest {
    let folders = folders(folder);
    let lines = lines();
    for (seed, path, size) in [
        (1, &folders.pivot, 300),
        (2, folders.source.as_ref().unwrap(), 340),
    ] {
        let tokenizer = train_bpe(lines.iter().map(String::as_str), size).unwrap();
        let config = ModelConfig::llama(tokenizer.size(), 64, 1, 2, 48);
        let model = LoadedModel::random(Arc::new(tokenizer), config, seed).unwrap();
        model.save(path.folder()).unwrap();
    }
    let holdout: String = lines[..6]
        .iter()
        .map(|line| {
            let (context, target) = line.split_at(line.find(" use").unwrap());
            format!(
                "{{\"context\":\"{context}\",\"target\":\"{target}\",\"choices\":[\"{target}\",\" none\"]}}\n"
            )
        })
        .collect();
    fs::write(&folders.holdout, holdout).unwrap();
    let reference: String = lines
        .iter()
        .map(|line| format!("{{\"target\":\"{line}\",\"unlabeled\":[[4,8]]}}\n"))
        .collect();
    let spool = Spool::open(&folders.spool).unwrap();
    spool.put_blob(reference.as_bytes()).unwrap()
}

fn training(local_steps: u32) -> Training {
    let modules = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    Training {
        inner_rounds: 2,
        local_steps,
        rows: 2,
        row_tokens: 64,
        learning_rate_micros: 5_000,
        warmup_permille: 50,
        final_permille: 20,
        cross_entropy_permille: 100,
        rank: 4,
        alpha: 8,
        target_modules: modules.map(str::to_owned).to_vec(),
        modules_to_save: ["embed_tokens", "lm_head"].map(str::to_owned).to_vec(),
        outer_rate_permille: 700,
        outer_momentum_permille: 700,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    }
}

fn score(reference: Digest, shard: u32, symbols: u16) -> Job {
    let first = u64::from(shard * SHARD_ITEMS);
    Job::Score(ScoreJob {
        round: RoundId(1),
        shard,
        items: first..ITEMS.min(first + u64::from(SHARD_ITEMS)).max(first),
        reference,
        symbol_space: SymbolSpace::Bytes,
        symbols,
        fill_permille: 995,
    })
}

fn distil(reference: Digest, inner: u32, start: Digest, targets: &[Digest], steps: u32) -> Job {
    Job::Distil(DistilJob {
        round: RoundId(1),
        manifest: Digest::of(b"manifest"),
        inner,
        start,
        lesson: Lesson::Fused {
            records: records(reference, targets),
            part: Part {
                seed: 77 + u64::from(inner),
                from: 5,
                to: 33,
            },
            rival: None,
        },
        training: training(steps),
        seed: 4,
    })
}

fn records(reference: Digest, shards: &[Digest]) -> RecordFiles {
    RecordFiles {
        reference,
        items: ITEMS,
        shards: shards.to_vec(),
        shard_items: SHARD_ITEMS,
        symbol_space: SymbolSpace::Bytes,
        withheld: Vec::new(),
    }
}

/// A fresh adapter, as the aggregator would make one.
fn first_adapter(folder: &Path, spool: &Spool) -> Digest {
    use consilium_node::worker::train::distill::{Distiller, Settings};
    let pivot = LoadedModel::load(folders(folder).pivot.folder()).unwrap();
    let settings = Settings::of(&training(1), 99).unwrap();
    let fresh = Distiller::new(pivot, settings).unwrap();
    spool.put_blob(&fresh.adapter_bytes().unwrap()).unwrap()
}

fn artefact(outcome: Option<Outcome>) -> Digest {
    match outcome {
        Some(Outcome::Done { artefact, .. }) => artefact,
        other => panic!("{other:?}"),
    }
}

fn problem(outcome: Option<Outcome>) -> String {
    match outcome {
        Some(Outcome::Failed { problem }) => problem,
        other => panic!("{other:?}"),
    }
}

/// The real program in a process where the kernel answers any attempt to make a socket with SIGSYS, which cannot be
/// caught as an error and passed over.
struct Process {
    child: Child,
}

impl Process {
    fn worker(folder: &Path) -> Self {
        Self::start(folder, &["worker", "--supervised"], "")
    }

    /// `more` stands at the end of node.toml.
    fn start(folder: &Path, command: &[&str], more: &str) -> Self {
        let config = folder.join("node.toml");
        let (demo, clinic) = (ConsortiumId::new("demo"), InstitutionId::new("clinic"));
        let text =
            consilium_node::config::template(&demo.unwrap(), &clinic.unwrap(), "127.0.0.1:1")
                .replace("# threads = 8", "threads = 1");
        fs::write(&config, text + more).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_without_sockets", "--ignored"])
            .env(COMMAND, command.join(" "))
            .env(CONFIG, config)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn wait_for(&mut self, spool: &Spool, id: &JobId) -> Option<Outcome> {
        for _ in 0..1200 {
            if let Some(outcome) = spool.outcome(id).unwrap() {
                return Some(outcome);
            }
            assert_eq!(self.child.try_wait().unwrap(), None, "the worker is gone");
            spool.wait_for_change(Duration::from_millis(100)).unwrap();
        }
        panic!("no result of {id} in two minutes");
    }

    fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        assert!(
            self.child.wait().unwrap().success(),
            "SIGTERM is no failure"
        );
    }
}

/// Gives up every way to a socket, then becomes the program: a filter of system calls outlives `exec`.
#[test]
#[ignore = "the process of the other tests"]
fn a_process_without_sockets() {
    let (Some(command), Some(config)) = (std::env::var_os(COMMAND), std::env::var_os(CONFIG))
    else {
        return;
    };
    let fatal = [
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_io_uring_setup,
    ];
    let filter = SeccompFilter::new(
        BTreeMap::from(fatal.map(|call| (call, Vec::new()))),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
    let error = Command::new(env!("CARGO_BIN_EXE_consilium-node"))
        .args(command.to_str().unwrap().split(' '))
        .arg("--config")
        .arg(config)
        .exec();
    panic!("cannot become the program: {error}");
}

/// Without this the test below would pass on a machine that ignores the filter.
#[test]
fn the_agent_which_needs_sockets_is_killed_where_there_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Process::start(folder.path(), &["agent"], "");
    let status = agent.child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
}

#[test]
fn a_whole_round_is_done_where_no_socket_can_be_made() {
    let folder = tempfile::tempdir().unwrap();
    let reference = site(folder.path());
    let spool = Spool::open(&folders(folder.path()).spool).unwrap();
    let mut worker = Process::worker(folder.path());

    let shards = [0, 1].map(|shard| spool.submit(&score(reference, shard, 8)).unwrap());
    let too_wide = spool.submit(&score(reference, 0, 9)).unwrap();
    let outside = spool.submit(&score(reference, 2, 8)).unwrap();
    let shards = shards.map(|id| artefact(worker.wait_for(&spool, &id)));
    for (index, (digest, items)) in shards.iter().zip([0..25, 25..40]).enumerate() {
        let shard = Shard::parse(&spool.read_blob(digest, 1 << 20).unwrap()).unwrap();
        assert_eq!(shard.header.items(), items, "shard {index}");
        assert_eq!(shard.header.reference, reference);
    }
    let problem_of = |outcome| problem(outcome);
    let text = problem_of(worker.wait_for(&spool, &too_wide));
    assert!(text.contains("hidden size 64"), "{text}");
    let text = problem_of(worker.wait_for(&spool, &outside));
    assert!(text.contains("reference set's 40"), "{text}");

    let start = first_adapter(folder.path(), &spool);
    let endless = distil(reference, 0, start, &shards, 900_000);
    let endless = spool.submit(&endless).unwrap();
    spool.wait_for_change(Duration::from_secs(1)).unwrap();
    spool.withdraw(&endless).unwrap();

    let first = spool
        .submit(&distil(reference, 0, start, &shards, 3))
        .unwrap();
    let first = artefact(worker.wait_for(&spool, &first));
    assert_ne!(first, start);
    let evaluate = Job::Evaluate(EvaluateJob {
        round: RoundId(1),
        candidate: first,
        training: training(3),
    });
    let evaluate = spool.submit(&evaluate).unwrap();
    let evaluation = artefact(worker.wait_for(&spool, &evaluate));
    let evaluation = Evaluation::parse(&spool.read_blob(&evaluation, 1 << 16).unwrap()).unwrap();
    assert!(evaluation.candidate.bits_per_byte < evaluation.pivot.bits_per_byte);
    assert!(evaluation.candidate.accuracy.is_some());
    assert!(!spool.is_wanted(&endless));
    assert_eq!(
        spool.outcome(&endless).unwrap(),
        None,
        "withdrawn jobs have no result"
    );

    worker.terminate();
}

#[test]
fn a_worker_whose_source_is_behind_a_server_leaves_scoring_to_others_and_measures_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let reference = site(folder.path());
    let spool = Spool::open(&folders(folder.path()).spool).unwrap();
    fs::remove_file(folder.path().join("source/model.safetensors")).unwrap();
    let server =
        "[source_server]\nkind = \"vllm\"\nurl = \"http://127.0.0.1:1\"\nmodel = \"big\"\n";
    let mut worker = Process::start(folder.path(), &["worker", "--supervised"], server);
    let left = spool.submit(&score(reference, 0, 8)).unwrap();
    let evaluate = Job::Evaluate(EvaluateJob {
        round: RoundId(1),
        candidate: first_adapter(folder.path(), &spool),
        training: training(3),
    });
    let evaluate = spool.submit(&evaluate).unwrap();
    let evaluation = artefact(worker.wait_for(&spool, &evaluate));
    let evaluation = Evaluation::parse(&spool.read_blob(&evaluation, 1 << 16).unwrap()).unwrap();
    assert_eq!(evaluation.source, None);
    assert!(evaluation.pivot.bits_per_byte > 0.0);
    assert_eq!(spool.outcome(&left).unwrap(), None);
    assert!(spool.is_wanted(&left), "the scorer finds it");
    worker.terminate();
}

#[test]
fn a_signal_ends_the_process_inside_of_a_job_which_stays_to_be_done() {
    let folder = tempfile::tempdir().unwrap();
    let reference = site(folder.path());
    let spool = Spool::open(&folders(folder.path()).spool).unwrap();
    let start = first_adapter(folder.path(), &spool);
    let mut worker = Process::worker(folder.path());
    let shards = [0, 1].map(|shard| spool.submit(&score(reference, shard, 8)).unwrap());
    let shards = shards.map(|id| artefact(worker.wait_for(&spool, &id)));
    let endless = distil(reference, 0, start, &shards, 900_000);
    let id = spool.submit(&endless).unwrap();
    spool.wait_for_change(Duration::from_secs(1)).unwrap();
    worker.terminate();
    assert_eq!(spool.next_job().unwrap().map(|(id, _)| id), Some(id));
}

#[test]
fn a_worker_that_restarts_repeats_or_holds_less_gives_the_same_adapters() {
    let never = || false;
    let adapters = |restarts: bool, memory: Memory| {
        let folder = tempfile::tempdir().unwrap();
        let reference = site(folder.path());
        let folders = folders(folder.path());
        let spool = Spool::open(&folders.spool).unwrap();
        let start = first_adapter(folder.path(), &spool);
        let new = || Worker::new(folders.clone(), &never).unwrap();
        let mut worker = new().with_memory(memory);
        let mut done = |job: &Job| {
            if restarts {
                worker = new().with_memory(memory);
            }
            let id = spool.submit(job).unwrap();
            spool.reset(&id).unwrap();
            assert!(worker.work().unwrap());
            artefact(spool.outcome(&id).unwrap())
        };
        let shards = [0, 1].map(|shard| done(&score(reference, shard, 8)));
        let jobs = [0, 1, 2].map(|inner| distil(reference, inner, start, &shards, 4));
        let adapters = jobs.each_ref().map(|job| {
            let adapter = done(job);
            assert_eq!(done(job), adapter, "repeated");
            adapter
        });
        assert!(!worker.work().unwrap(), "nothing is left to do");
        adapters
    };
    let plain = Memory {
        device: DeviceChoice::Cpu,
        ..Memory::default()
    };
    let less = Memory {
        checkpoint_activations: true,
        offload: true,
        ..plain
    };
    let four_bits = Memory {
        base: Format::Nf4,
        ..less
    };
    let uninterrupted = adapters(false, plain);
    assert_ne!(uninterrupted[0], uninterrupted[1]);
    assert_eq!(adapters(true, plain), uninterrupted);
    assert_eq!(adapters(true, less), uninterrupted);
    assert_ne!(adapters(false, four_bits), uninterrupted);
}

/// A worker in this process, as the jobs of one round of another mode find it.
#[test]
fn each_lesson_and_each_loss_gives_an_adapter_of_its_own_that_repeats() {
    let never = || false;
    let folder = tempfile::tempdir().unwrap();
    let reference = site(folder.path());
    let folders = folders(folder.path());
    let private: String = lines()[..9]
        .iter()
        .map(|line| format!("{{\"text\":\"{line}\"}}\n"))
        .collect();
    fs::write(&folders.train_data[0], private).unwrap();
    let spool = Spool::open(&folders.spool).unwrap();
    let start = first_adapter(folder.path(), &spool);
    let done = |worker: &mut Worker<'_>, job: &Job| {
        let id = spool.submit(job).unwrap();
        spool.reset(&id).unwrap();
        assert!(worker.work().unwrap());
        artefact(spool.outcome(&id).unwrap())
    };
    let mut worker = Worker::new(folders.clone(), &never).unwrap();
    let shards = [0, 1].map(|shard| done(&mut worker, &score(reference, shard, 8)));
    let own = || Lesson::Own {
        records: records(reference, &shards),
        rival: Rival {
            adapter: start,
            symbols: 8,
            fill_permille: 995,
        },
    };
    let symbols = 5;
    let temperature_permille = 1000;
    let cases = [
        (own(), Distillation::Trie),
        (own(), Distillation::TrieListed),
        (own(), Distillation::Uld { symbols }),
        (
            own(),
            Distillation::Infifusion {
                symbols,
                temperature_permille,
            },
        ),
        (
            own(),
            Distillation::Infigfusion {
                symbols,
                temperature_permille,
                graph_permille: 500,
            },
        ),
        (
            Lesson::Public {
                records: records(reference, &[]),
            },
            Distillation::Labels,
        ),
        (Lesson::Private, Distillation::Labels),
    ];
    let mut adapters = Vec::new();
    for (index, (lesson, distillation)) in cases.into_iter().enumerate() {
        let job = |inner| {
            Job::Distil(DistilJob {
                round: RoundId(1),
                manifest: Digest::of(&[u8::try_from(index).unwrap()]),
                inner,
                start,
                lesson: lesson.clone(),
                training: Training {
                    distillation,
                    ..training(3)
                },
                seed: 4,
            })
        };
        let first = done(&mut worker, &job(0));
        let second = done(&mut worker, &job(1));
        let mut restarted = Worker::new(folders.clone(), &never).unwrap();
        assert_eq!(done(&mut restarted, &job(1)), second, "{distillation:?}");
        adapters.extend([first, second]);
    }
    let different: std::collections::BTreeSet<_> = adapters.iter().collect();
    assert_eq!(different.len(), adapters.len(), "{adapters:?}");

    fs::remove_file(&folders.train_data[0]).unwrap();
    let nowhere = Job::Distil(DistilJob {
        round: RoundId(1),
        manifest: Digest::of(b"nowhere"),
        inner: 0,
        start,
        lesson: Lesson::Private,
        training: training(3),
        seed: 4,
    });
    let id = spool.submit(&nowhere).unwrap();
    assert!(worker.work().unwrap());
    let text = problem(spool.outcome(&id).unwrap());
    assert!(text.contains("private.jsonl"), "{text}");
}
