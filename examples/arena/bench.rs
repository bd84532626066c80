//! What all arms of one seed share: world, pivot, sources, and their records of the public text.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use consilium_aggregator::fusion::fuse_shard;
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_examples::lab::clock::say;
use consilium_examples::lab::models::{train_pivot, train_source};
use consilium_examples::lab::parallel::{Job, in_parallel};
use consilium_examples::lab::trainer::{Trainer, items_of, targets_of};
use consilium_examples::world::{Sizes, World};
use consilium_kernels::fusion::{Mixing, WEIGHT_UNITY, fuse};
use consilium_kernels::{RecordShape, RecordView, Records};
use consilium_node::worker::LoadedModel;
use consilium_node::worker::score::score_shard;
use consilium_node::worker::train::distill::ownership;
use consilium_node::worker::train::targets::Targets;
use consilium_protocol::manifest::{FusionRule, Manifest, TargetForm, Training};
use consilium_protocol::reference::{Item, ReferenceSet};
use consilium_protocol::shard::{Header, Shard, Symbols};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RoundId};

use crate::Regime;
use crate::exchange::Kept;
use crate::sites::{self, NAMES};

/// Symbols of a record that leaves nothing out: more are hardly ever likely at once.
pub(crate) const DENSE: u16 = 64;
/// Peak learning rate of every arm: the best of the consortium example's grid for SFT and for the bound.
pub(crate) const RATE: f64 = 6e-3;

/// One seed in one regime.
#[derive(Debug)]
pub(crate) struct Bench {
    /// What the public text says.
    pub(crate) regime: Regime,
    /// Data and questions.
    pub(crate) world: World,
    /// The public text.
    pub(crate) reference: ReferenceSet,
    /// Folder of the pivot.
    pub(crate) pivot: PathBuf,
    /// Folders of the sources, in the order of [`NAMES`].
    pub(crate) sources: [PathBuf; 4],
    /// Adapters and batches, those of a round.
    pub(crate) training: Training,
    /// Steps of every arm that is trained.
    pub(crate) steps: u64,
    /// Records of every source with [`DENSE`] symbols.
    dense: Vec<(InstitutionId, Shard)>,
    /// Adapters that several arms merge.
    pub(crate) kept: Kept,
}

impl Bench {
    /// Makes text and models below `folder`, and scores the public text with every source.
    pub(crate) fn prepare(seed: u64, regime: Regime, steps: u64, folder: &Path) -> Result<Self> {
        say(&format!(
            "seed {seed}, {}: text, models, records",
            regime.label()
        ));
        let sizes = Sizes {
            true_answers_permille: regime.true_answers_permille(),
            ..Sizes::default()
        };
        let world = World::generate(seed, &sizes);
        let files = world.write_files(&folder.join("text"))?;
        let reference = ReferenceSet::parse(&std::fs::read(&files.public)?)?;
        let private = sites::private(&world);
        let pivot = folder.join("pivot");
        let sources = NAMES.map(|name| folder.join(name));
        let mut jobs: Vec<Job<'_, ()>> = vec![Box::new(|| train_pivot(&world, &pivot))];
        for (at, (folder, private)) in sources.iter().zip(&private).enumerate() {
            let world = &world;
            jobs.push(Box::new(move || train_source(world, private, at, folder)));
        }
        in_parallel(jobs)?;
        let mut jobs: Vec<Job<'_, (InstitutionId, Shard)>> = Vec::new();
        for (name, folder) in NAMES.into_iter().zip(&sources) {
            let reference = &reference;
            jobs.push(Box::new(move || {
                let shape = RecordShape {
                    k: usize::from(DENSE),
                    fill_permille: 1000,
                };
                let source = LoadedModel::load(folder)?;
                let all = 0..reference.items().len() as u64;
                let scored = score_shard(&source, reference, all, &shape, &mut ())?;
                Ok((InstitutionId::new(name)?, scored.shard))
            }));
        }
        let dense = in_parallel(jobs)?;
        Ok(Self {
            regime,
            world,
            reference,
            pivot,
            sources,
            training: OpenRequest::default().training,
            steps,
            dense,
            kept: Kept::default(),
        })
    }

    /// All private text as items.
    pub(crate) fn private(&self) -> Vec<Item> {
        items_of(sites::private(&self.world).iter().flatten())
    }

    /// The manifest of a round of everybody with this rule and this many symbols a position.
    pub(crate) fn manifest(&self, fusion: FusionRule, symbols: u16) -> Result<Manifest> {
        let request = OpenRequest::default();
        let items = self.reference.items().len();
        Ok(Manifest {
            consortium: ConsortiumId::new("arena")?,
            round: RoundId(1),
            mode: request.mode,
            charter: Digest::of(b"charter"),
            pivot: Digest::of(b"pivot"),
            reference: self.reference.digest(),
            items: items as u64,
            symbol_space: request.symbol_space,
            symbols,
            fill_permille: if symbols == DENSE {
                1000
            } else {
                request.fill_permille
            },
            shard_items: u32::try_from(items).context("a set of that many items")?,
            fusion,
            targets: TargetForm::default(),
            screening: request.screening,
            max_weight: None,
            training: self.training.clone(),
            members: NAMES
                .map(InstitutionId::new)
                .into_iter()
                .collect::<Result<_, _>>()?,
            quorum: 2,
            deadlines: request.deadlines,
            seed: self.world.seed,
            previous_release: None,
        })
    }

    /// Every source's records with at most `symbols` symbols, as they would be sent.
    pub(crate) fn records(&self, symbols: u16) -> Result<Vec<(InstitutionId, Shard)>> {
        if symbols == DENSE {
            return Ok(self.dense.clone());
        }
        self.dense
            .iter()
            .map(|(who, shard)| Ok((who.clone(), narrow(shard, self.shape(symbols))?)))
            .collect()
    }

    /// Records of this many symbols as a round asks for them by default.
    pub(crate) fn shape(&self, symbols: u16) -> RecordShape {
        RecordShape {
            k: symbols.into(),
            fill_permille: OpenRequest::default().fill_permille.into(),
        }
    }

    /// Targets from records of `symbols` symbols, for all items.
    pub(crate) fn fuse(
        &self,
        (rule, form): (FusionRule, TargetForm),
        symbols: u16,
        sources: &[(InstitutionId, Shard)],
    ) -> Result<Shard> {
        let manifest = Manifest {
            targets: form,
            ..self.manifest(rule, symbols)?
        };
        Ok(fuse_shard(&manifest, &self.reference, 0, sources)?.targets)
    }

    /// Targets as the trainer reads them.
    pub(crate) fn targets(&self, shard: &Shard) -> Result<Targets> {
        let shard_items = u32::try_from(self.reference.items().len()).unwrap_or(u32::MAX);
        targets_of(&self.reference, shard_items, std::slice::from_ref(shard))
    }

    /// Of `visited` items, those whose records beat the pivot's own.
    pub(crate) fn owned(
        &self,
        pivot: &LoadedModel,
        visited: &[u64],
        targets: &Targets,
        symbols: u16,
    ) -> Result<BTreeSet<u64>> {
        let (items, shape) = (self.reference.items(), self.shape(symbols));
        let owned = ownership(pivot, items, visited, targets, &shape, &mut ())?;
        let owned = owned.into_iter();
        Ok(owned
            .filter_map(|(item, owned)| owned.then_some(item))
            .collect())
    }

    /// The pivot after distillation from these targets.
    pub(crate) fn distil(&self, shard: &Shard) -> Result<LoadedModel> {
        let targets = self.targets(shard)?;
        self.trainer().on_targets(self.reference.items(), &targets)
    }

    /// One trainer, the same for every arm.
    pub(crate) fn trainer(&self) -> Trainer<'_> {
        Trainer {
            pivot: &self.pivot,
            training: &self.training,
            steps: self.steps,
            rate: RATE,
            seed: self.world.seed,
        }
    }
}

/// The mixture of one source is that source, in another shape.
fn narrow(shard: &Shard, shape: RecordShape) -> Result<Shard> {
    let Symbols::Bytes(symbols) = &shard.symbols else {
        bail!("records of tokens have no bytes");
    };
    let k = usize::from(shard.header.symbols);
    let view = RecordView::new(k, symbols, &shard.codes, &shard.end, &shard.tail)?;
    let mut out = Records::new(shape.k)?;
    fuse(Mixing::Item(&[WEIGHT_UNITY]), &[view], &shape, &mut out)?;
    let out = out.view();
    Ok(Shard {
        header: Header {
            symbols: u16::try_from(shape.k)?,
            ..shard.header.clone()
        },
        symbols: Symbols::Bytes(out.symbols().to_vec()),
        codes: out.codes().to_vec(),
        end: out.end().to_vec(),
        tail: out.tail().to_vec(),
        missed: shard.missed.clone(),
        offsets: shard.offsets.clone(),
    })
}
