//! The models of the examples: one source per institution on its own text, and the pivot on public text.

use std::path::Path;
use std::sync::Arc;

use crate::world::World;
use anyhow::{Context, Result};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::data::{Item, Record, tokenize};
use consilium_node::worker::model::ModelConfig;
use consilium_node::worker::tokenizer::train_bpe;
use consilium_node::worker::train::{TrainConfig, train_language_model};

/// Width of the residual stream; the egress gate allows an eighth of it as symbols per position.
const WIDTH: usize = 128;
const HEADS: usize = 4;
const FEED_FORWARD: usize = 344;
const RATE: f64 = 3e-3;

/// Tokens of each source's vocabulary, in the order of the institutions: no two alike.
const SOURCE_TOKENS: [usize; 4] = [384, 448, 512, 576];
const SOURCE_LAYERS: usize = 2;
const PIVOT_TOKENS: usize = 400;
const PIVOT_LAYERS: usize = 3;

/// The source of institution `at` (0 to 3) in `folder`: a little public text, so that it is not absurd abroad, then its
/// own.
///
/// # Errors
/// No such institution, training that ends in numbers that are not finite, or a folder that cannot be written.
pub fn train_source(world: &World, private: &[String], at: usize, folder: &Path) -> Result<()> {
    let tokens = *SOURCE_TOKENS.get(at).context("no such institution")?;
    let private: Vec<&str> = private.iter().map(String::as_str).collect();
    let stages = [(public_text(world), 80), (private.clone(), 250)];
    let seed = world.seed * 10 + at as u64;
    train(&private, tokens, SOURCE_LAYERS, &stages, seed, folder)
}

/// The pivot in `folder`: a tokenizer of its own, hardly trained.
///
/// # Errors
/// As [`train_source`].
pub fn train_pivot(world: &World, folder: &Path) -> Result<()> {
    let public = public_text(world);
    let stages = [(public.clone(), 120)];
    train(
        &public,
        PIVOT_TOKENS,
        PIVOT_LAYERS,
        &stages,
        world.seed * 10 + 9,
        folder,
    )
}

fn public_text(world: &World) -> Vec<&str> {
    world
        .public
        .iter()
        .map(|public| public.item.target.as_str())
        .collect()
}

fn train(
    vocabulary: &[&str],
    tokens: usize,
    layers: usize,
    stages: &[(Vec<&str>, u64)],
    seed: u64,
    folder: &Path,
) -> Result<()> {
    let tokenizer = Arc::new(train_bpe(vocabulary.iter().copied(), tokens)?);
    let config = ModelConfig::llama(tokenizer.size(), WIDTH, layers, HEADS, FEED_FORWARD);
    let mut loaded = LoadedModel::random(Arc::clone(&tokenizer), config, seed)?;
    for (stage, (texts, steps)) in (0_u64..).zip(stages) {
        let records: Vec<Record> = texts
            .iter()
            .map(|text| Record {
                context: String::new(),
                target: (*text).to_owned(),
            })
            .collect();
        let items: Arc<[Item]> = tokenize(&tokenizer, &records)?.into();
        loaded.model.train_all()?;
        loaded.model = train_language_model(
            loaded.model,
            &loaded.vocab,
            items,
            tokenizer.end_of_record(),
            TrainConfig::new(*steps, RATE, seed + 1000 * stage),
            |_| {},
        )?;
    }
    std::fs::create_dir_all(folder)?;
    loaded.save(folder)?;
    Ok(())
}
