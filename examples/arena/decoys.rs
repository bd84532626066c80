//! Whether decoys give away a source that reads the public text, and only that one.
//!
//! The liar owns the records of one of the four and gives whatever the text says a high probability, so that it would win the
//! routing of every item. Some words of the text are wrong on purpose; screening asks what they cost every source.

use anyhow::{Context, Result};
use consilium_aggregator::decoys::{Shares, plant};
use consilium_aggregator::fusion::Screen;
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_examples::attacks::records::{Aim, Attack, attacked};
use consilium_kernels::RecordShape;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::score::score_shard;
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Manifest, Screening};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::Shard;
use serde::{Deserialize, Serialize};

use crate::attacks::{INSIDER, LIAR};
use crate::bench::Bench;
use crate::sites::NAMES;

/// Items of the public text that are looked at.
const ITEMS: usize = 600;
/// One item in ten has a decoy.
const DECOY_PERMILLE: u32 = 100;
/// Symbols of a record.
const SYMBOLS: u16 = 16;

/// Who was kept out of the fusion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Caught {
    /// The seed of the world.
    pub(crate) seed: u64,
    /// Decoys that were counted.
    pub(crate) decoys: u64,
    /// Institutions that screening excludes, ascending.
    pub(crate) excluded: Vec<String>,
}

impl Caught {
    /// Whether it was the liar, and nobody else.
    pub(crate) fn is_just(&self) -> bool {
        self.excluded == [LIAR]
    }
}

/// Whom a round with decoys keeps out.
pub(crate) fn caught(bench: &Bench) -> Result<Caught> {
    let plain = lines(bench)?;
    let shares = Shares {
        decoy_permille: DECOY_PERMILLE,
        holdout_permille: 0,
    };
    let mut secret = [0; 32];
    secret[..8].copy_from_slice(&bench.world.seed.to_le_bytes());
    let (text, key) = plant(&plain, shares, secret)?;
    let reference = ReferenceSet::parse(&text)?;
    let items = reference.items();
    let shape = RecordShape {
        k: SYMBOLS.into(),
        fill_permille: OpenRequest::default().fill_permille.into(),
    };
    let mut sources: Vec<(InstitutionId, Shard)> = Vec::new();
    for (name, folder) in NAMES.into_iter().zip(&bench.sources) {
        let source = LoadedModel::load(folder)?;
        let scored = score_shard(&source, &reference, 0..items.len() as u64, &shape, &mut ())?;
        sources.push((InstitutionId::new(name)?, scored.shard));
    }
    let own = &sources.get(INSIDER).context("an insider")?.1;
    let known: Vec<&Shard> = sources.iter().map(|(_, shard)| shard).collect();
    let lie = attacked(Attack::ReadsText, Aim::All, own, &known, items)?;
    sources.push((InstitutionId::new(LIAR)?, lie));
    let manifest = Manifest {
        reference: reference.digest(),
        items: items.len() as u64,
        shard_items: u32::try_from(items.len())?,
        members: sources.iter().map(|(who, _)| who.clone()).collect(),
        screening: Screening::default(),
        ..bench.manifest(OpenRequest::default().fusion, SYMBOLS)?
    };
    let mut screen = Screen::new(&manifest, &reference, Some(&key));
    screen.add(0, &sources)?;
    let screened = screen.finish();
    let excluded = screened.excluded.iter().map(ToString::to_string);
    Ok(Caught {
        seed: bench.world.seed,
        decoys: screened.decoys,
        excluded: excluded.collect(),
    })
}

/// The first items of the public text as a set of their own.
fn lines(bench: &Bench) -> Result<ReferenceSet> {
    let items = bench.reference.items().iter().take(ITEMS);
    let text: String = items
        .map(|item| {
            let spans: Vec<[usize; 2]> = item
                .unlabeled
                .iter()
                .map(|span| [span.start, span.end])
                .collect();
            let line = serde_json::json!({
                "context": item.context,
                "target": item.target,
                "unlabeled": spans,
            });
            line.to_string() + "\n"
        })
        .collect();
    Ok(ReferenceSet::parse(text.as_bytes())?)
}
