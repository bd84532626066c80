//! Jobs of a round in token space.

use std::path::Path;
use std::sync::Arc;

use consilium_node::spool::{DistilJob, Job, Lesson, RecordFiles, Rival, ScoreJob, Spool};
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::tokenizer::{Tokenizer, train_bpe};
use consilium_node::worker::tokens::tokens_of;
use consilium_node::worker::{Folders, LoadedModel, Worker};
use consilium_protocol::Digest;
use consilium_protocol::manifest::SymbolSpace;
use consilium_protocol::shard::Shard;

use crate::lines::lines;
use crate::{
    ITEMS, SHARD_ITEMS, artefact, distil, first_adapter, folders, problem, records, score, site,
};

/// The token space of a model folder, and the site's reference set with the tokens of that model.
fn token_space(folder: &Path, spool: &Spool) -> (SymbolSpace, Digest) {
    let model = LoadedModel::load(folder).unwrap();
    let space = SymbolSpace::Tokens {
        tokenizer: Digest::of(model.tokenizer.source()),
        size: u32::try_from(model.tokenizer.size()).unwrap(),
    };
    let mut set = String::new();
    for line in lines() {
        let tokens = tokens_of(&model.tokenizer, &model.vocab, &line).unwrap();
        let tokens = serde_json::to_string(&tokens).unwrap();
        set += &format!("{{\"target\":\"{line}\",\"tokens\":{tokens}}}\n");
    }
    (space, spool.put_blob(set.as_bytes()).unwrap())
}

fn save_random(folder: &Path, tokenizer: Arc<Tokenizer>) {
    let config = ModelConfig::llama(tokenizer.size(), 64, 1, 2, 48);
    let model = LoadedModel::random(tokenizer, config, 5).unwrap();
    model.save(folder).unwrap();
}

#[test]
fn jobs_in_token_space_are_done_with_the_rounds_tokenizer_and_refused_with_another() {
    let never = || false;
    let folder = tempfile::tempdir().unwrap();
    site(folder.path());
    let folders = folders(folder.path());
    let spool = Spool::open(&folders.spool).unwrap();
    let start = first_adapter(folder.path(), &spool);
    let outcome = |worker: &mut Worker<'_>, job: &Job| {
        let id = spool.submit(job).unwrap();
        assert!(worker.work().unwrap());
        spool.outcome(&id).unwrap()
    };
    let source = folders.source.as_ref().unwrap().folder().to_owned();
    let pivot = folders.pivot.folder().to_owned();
    save_random(
        &source,
        train_bpe(lines().iter().map(String::as_str), 270)
            .unwrap()
            .into(),
    );
    let (space, reference) = token_space(&pivot, &spool);
    let scored = |reference, space| match score(reference, 0, 8) {
        Job::Score(job) => [0, 1].map(|shard| {
            let first = u64::from(shard * SHARD_ITEMS);
            Job::Score(ScoreJob {
                shard,
                items: first..ITEMS.min(first + u64::from(SHARD_ITEMS)),
                symbol_space: space,
                ..job.clone()
            })
        }),
        other => panic!("{other:?}"),
    };
    let learned =
        |reference, space, shards: &[Digest], rival| match distil(reference, 0, start, shards, 3) {
            Job::Distil(job) => Job::Distil(DistilJob {
                lesson: Lesson::Own {
                    records: RecordFiles {
                        symbol_space: space,
                        ..records(reference, shards)
                    },
                    rival,
                },
                ..job
            }),
            other => panic!("{other:?}"),
        };
    let rival = || Rival {
        adapter: start,
        symbols: 8,
        fill_permille: 995,
    };

    // The pivot's tokens: the source has others.
    let mut worker = Worker::new(folders.clone(), &never).unwrap();
    let text = problem(outcome(&mut worker, &scored(reference, space)[0]));
    assert!(
        text.contains("tokenizer.json of the source has digest"),
        "{text}"
    );
    // The source's: the pivot has others.
    let (of_source, its_reference) = token_space(&source, &spool);
    let shards = scored(its_reference, of_source).map(|job| artefact(outcome(&mut worker, &job)));
    let text = problem(outcome(
        &mut worker,
        &learned(its_reference, of_source, &shards, rival()),
    ));
    assert!(
        text.contains("tokenizer.json of the pivot has digest"),
        "{text}"
    );

    // A source that has the pivot's tokenizer.
    let shared = Folders {
        source: Some(folder.path().join("shared").into()),
        ..folders
    };
    let tokenizer = Arc::clone(&LoadedModel::load(&pivot).unwrap().tokenizer);
    save_random(shared.source.as_ref().unwrap().folder(), tokenizer);
    let mut worker = Worker::new(shared, &never).unwrap();
    let shards = scored(reference, space).map(|job| {
        let id = spool.submit(&job).unwrap();
        spool.reset(&id).unwrap();
        artefact(outcome(&mut worker, &job))
    });
    let shard = Shard::parse(&spool.read_blob(&shards[1], 1 << 20).unwrap()).unwrap();
    assert_eq!((shard.header.space, shard.header.items()), (space, 25..40));
    let adapter = artefact(outcome(
        &mut worker,
        &learned(reference, space, &shards, rival()),
    ));
    assert_ne!(adapter, start);
}
