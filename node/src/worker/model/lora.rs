//! Low-rank adapters under their PEFT names.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use std::sync::Arc;

use consilium_kernels::bytes;
use consilium_kernels::matmul::{View, ViewMut, Write, ab};
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use super::adapter_config::{AdapterConfig, module_names};
use super::block::Adapted;
use super::linear::{Low, Place, Projection};
use super::load::unit;
use super::parameters::{Bank, Plan, Slot};
use super::tensors::{NamedTensor, NamedTensors};
use super::{Head, Model, ModelError};

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";

/// Names of the full weights that travel with the factors.
const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

/// Adapters of one rank on all linear layers of the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// Rank of the factors.
    pub rank: usize,
    /// Scale of the product is `alpha / rank`.
    pub alpha: f64,
    /// Train the embedding and the head as well (PEFT `modules_to_save`).
    pub embeddings_and_head: bool,
}

/// Factors of all blocks.
#[derive(Debug)]
pub(crate) struct Lora {
    pub(crate) config: AdapterConfig,
    /// Attention and feed-forward factors of each layer.
    pub(crate) blocks: Vec<[BlockFactors; 2]>,
}

/// Factors of one block.
#[derive(Debug)]
pub(crate) struct BlockFactors {
    /// None if no layer of the block has factors.
    pub(crate) bank: Option<Bank>,
    pub(crate) places: Arc<[Option<Place>]>,
}

impl BlockFactors {
    /// A copy with storage of its own.
    pub(crate) fn duplicate(&self) -> candle_core::Result<Self> {
        let bank = self.bank.as_ref().map(Bank::duplicate);
        Ok(Self {
            bank: bank.transpose()?,
            places: Arc::clone(&self.places),
        })
    }

    pub(crate) fn lend(&self) -> Adapted<'_> {
        Adapted {
            bank: self.bank.as_ref(),
            places: &self.places,
        }
    }
}

impl Lora {
    /// All factors, block after block.
    pub(crate) fn banks(&self) -> impl Iterator<Item = &Bank> {
        let blocks = self.blocks.iter().flatten();
        blocks.filter_map(|block| block.bank.as_ref())
    }

    /// Ranks and scales, layer by layer.
    fn lows(&self) -> Vec<[Vec<Option<Low>>; 2]> {
        let of = |block: &BlockFactors| {
            let lows = block.places.iter();
            lows.map(|place| place.map(|place| place.low)).collect()
        };
        let blocks = self.blocks.iter();
        blocks.map(|[a, f]| [of(a), of(f)]).collect()
    }
}

/// The A factors of a bank.
fn a_slots(bank: &Bank) -> impl Iterator<Item = &Slot> {
    let slots = bank.slots().iter();
    slots.filter(|slot| slot.name.ends_with(".lora_A.weight"))
}

impl Model {
    /// Freezes the weights and adds fresh adapters: A uniform in +-sqrt(3 / in), B zero, both seeded.
    /// A tied head becomes a tensor of its own when it or the embedding is to be trained.
    pub fn attach_lora(
        &mut self,
        config: impl Into<AdapterConfig>,
        seed: u64,
    ) -> Result<(), ModelError> {
        let config = config.into();
        let lows = self.lows(&config)?;
        self.freeze();
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let mut fill = |slot: &Slot, out: &mut [f32]| {
            if slot.name.contains("lora_A") {
                let bound = (3.0 / slot.shape[1] as f64).sqrt();
                for value in out {
                    *value = ((2.0 * unit(&mut rng) - 1.0) * bound) as f32;
                }
            }
            Ok::<_, ModelError>(())
        };
        let mut blocks = Vec::with_capacity(self.layers.len());
        for (index, (layer, [attention, feed_forward])) in self.layers.iter().zip(lows).enumerate()
        {
            let (a, f) = (&layer.attention.0, &layer.feed_forward.0);
            let [a_names, f_names] = module_names(self.config().family, index);
            blocks.push([
                factors(&a_names, [&a.qkv, &a.output], &attention, &mut fill)?,
                factors(&f_names, [&f.gate_up, &f.down], &feed_forward, &mut fill)?,
            ]);
        }
        let (saves_embedding, saves_head) = (config.saves_embedding, config.saves_head);
        self.lora = Some(Lora { config, blocks });
        if saves_embedding || saves_head {
            self.untie()?;
        }
        if saves_embedding {
            self.embedding.train()?;
        }
        if saves_head && let Head::Own(head) = &mut self.head {
            head.train()?;
        }
        self.follow_placement()
    }

    /// Shape of the adapters, if there are any.
    pub fn lora(&self) -> Option<&AdapterConfig> {
        self.lora.as_ref().map(|lora| &lora.config)
    }

    /// Whether an adapter of this shape can take the place of the one that is there.
    pub(crate) fn has_adapter_like(&self, config: &AdapterConfig) -> Result<bool, ModelError> {
        let Some(lora) = &self.lora else {
            return Ok(false);
        };
        let saved = |config: &AdapterConfig| (config.saves_embedding, config.saves_head);
        Ok(saved(&lora.config) == saved(config) && lora.lows() == self.lows(config)?)
    }

    fn lows(&self, config: &AdapterConfig) -> Result<Vec<[Vec<Option<Low>>; 2]>, ModelError> {
        config
            .places(self.config())
            .map_err(|(field, reason)| ModelError::BadLora { field, reason })
    }

    /// All adapter tensors under PEFT names, rows in the order of ids.
    pub fn adapter(&self) -> Result<NamedTensors, ModelError> {
        let mut tensors = NamedTensors::new();
        self.each_adapter_tensor(|name, shape, values, by_rank| {
            let values = if by_rank {
                self.in_id_order(values)
            } else {
                values.to_vec()
            };
            tensors.insert(
                name.to_owned(),
                NamedTensor {
                    shape: shape.to_vec(),
                    values,
                },
            );
        })?;
        Ok(tensors)
    }

    /// Replaces the adapter in place: the optimiser's state stays valid. Names and shapes must be exactly
    /// those of [`adapter`](Self::adapter), all values finite; on error nothing has changed.
    pub fn set_adapter(&mut self, tensors: &NamedTensors) -> Result<(), ModelError> {
        self.set_adapter_from("adapter", tensors)
    }

    /// As [`set_adapter`](Self::set_adapter); `origin` is for messages.
    pub(crate) fn set_adapter_from(
        &self,
        origin: &str,
        tensors: &NamedTensors,
    ) -> Result<(), ModelError> {
        let origin = || origin.to_owned();
        let mut expected = 0;
        let mut first_error = None;
        self.each_adapter_tensor(|name, shape, _, _| {
            expected += 1;
            let error = match tensors.get(name) {
                None => ModelError::MissingTensor {
                    origin: origin(),
                    name: name.to_owned(),
                },
                Some(tensor) if tensor.shape != shape => ModelError::WrongShape {
                    origin: origin(),
                    name: name.to_owned(),
                    got: tensor.shape.clone(),
                    expected: shape.to_vec(),
                },
                Some(tensor) if !bytes::are_finite(&tensor.values) => ModelError::NotFinite {
                    origin: origin(),
                    name: name.to_owned(),
                },
                Some(_) => return,
            };
            first_error.get_or_insert(error);
        })?;
        if let Some(error) = first_error {
            return Err(error);
        }
        if tensors.len() != expected {
            let known = self.adapter()?;
            let name = tensors.keys().find(|name| !known.contains_key(*name));
            let name = name.cloned().unwrap_or_default();
            return Err(ModelError::UnknownTensor {
                origin: origin(),
                name,
            });
        }
        let Some(lora) = &self.lora else {
            return Err(ModelError::NoAdapter);
        };
        for bank in lora.banks() {
            bank.edit(|out| {
                for slot in bank.slots() {
                    out[slot.range()].copy_from_slice(&tensors[&slot.name].values);
                }
            })?;
        }
        if lora.config.saves_embedding {
            self.embedding
                .edit(|out| out.copy_from_slice(&tensors[EMBEDDING].values))?;
        }
        if lora.config.saves_head
            && let Head::Own(head) = &self.head
        {
            let by_rank = self.in_rank_order(&tensors[HEAD].values);
            head.edit(|out| out.copy_from_slice(&by_rank))?;
        }
        Ok(())
    }

    /// Values of A of all factors, for [`restore_a`](Self::restore_a).
    pub(crate) fn copy_of_a(&self) -> Result<Vec<f32>, ModelError> {
        let lora = self.lora.as_ref().ok_or(ModelError::NoAdapter)?;
        let mut copy = Vec::new();
        for bank in lora.banks() {
            bank.read(|values| {
                for slot in a_slots(bank) {
                    copy.extend_from_slice(&values[slot.range()]);
                }
            })?;
        }
        Ok(copy)
    }

    /// Puts A back to a [`copy_of_a`](Self::copy_of_a) of the same adapter.
    pub(crate) fn restore_a(&self, copy: &[f32]) -> Result<(), ModelError> {
        let lora = self.lora.as_ref().ok_or(ModelError::NoAdapter)?;
        let mut next = 0;
        for bank in lora.banks() {
            bank.edit(|out| {
                for slot in a_slots(bank) {
                    let place = &mut out[slot.range()];
                    place.copy_from_slice(&copy[next..next + place.len()]);
                    next += place.len();
                }
            })?;
        }
        Ok(())
    }

    /// Calls `f` with name, shape, values and whether the rows are in rank order.
    fn each_adapter_tensor(
        &self,
        mut f: impl FnMut(&str, &[usize], &[f32], bool),
    ) -> Result<(), ModelError> {
        let lora = self.lora.as_ref().ok_or(ModelError::NoAdapter)?;
        let mut each = |bank: &Bank, rename: Option<&str>, by_rank: bool| {
            bank.read(|values| {
                for slot in bank.slots() {
                    let name = rename.unwrap_or(&slot.name);
                    f(name, &slot.shape, &values[slot.range()], by_rank);
                }
            })
        };
        for bank in lora.banks() {
            each(bank, None, false)?;
        }
        if lora.config.saves_embedding {
            each(&self.embedding, Some(EMBEDDING), false)?;
        }
        if lora.config.saves_head
            && let Head::Own(head) = &self.head
        {
            each(head, Some(HEAD), true)?;
        }
        Ok(())
    }

    /// Adds `scale B A` to the weights in `tensors`.
    pub(crate) fn fold_adapters(&self, tensors: &mut NamedTensors) -> Result<(), ModelError> {
        let Some(lora) = &self.lora else {
            return Ok(());
        };
        for (index, blocks) in lora.blocks.iter().enumerate() {
            let names = module_names(self.config().family, index);
            for (block, names) in blocks.iter().zip(names) {
                if let Some(bank) = &block.bank {
                    bank.read(|values| fold(values, &names, &block.places, tensors))?;
                }
            }
        }
        Ok(())
    }
}

/// Adds the products of one block's factors to the weights that they belong to.
fn fold(values: &[f32], names: &[String], places: &[Option<Place>], tensors: &mut NamedTensors) {
    for (name, place) in names.iter().zip(places) {
        let weight = tensors.get_mut(&format!("{name}.weight"));
        let (Some(place), Some(weight)) = (place, weight) else {
            continue;
        };
        let Low { rank, scale } = place.low;
        let (out, inputs) = (weight.shape[0], weight.shape[1]);
        ab(
            ViewMut::new(&mut weight.values, out, inputs),
            Write::Add,
            View::new(&values[place.b..], out, rank),
            View::new(&values[place.a..], rank, inputs),
            scale,
        );
    }
}

/// Factors of one block, trainable: per projection all A, then all B.
fn factors(
    names: &[String],
    projections: [&Projection; 2],
    lows: &[Option<Low>],
    fill: &mut impl FnMut(&Slot, &mut [f32]) -> Result<(), ModelError>,
) -> Result<BlockFactors, ModelError> {
    let mut plan = Plan::default();
    let mut places = Vec::with_capacity(lows.len());
    for projection in projections {
        let layers = projection.before..projection.before + projection.outputs.len();
        let (names, lows) = (&names[layers.clone()], &lows[layers.clone()]);
        for (name, low) in names.iter().zip(lows) {
            places.push(low.map(|low| {
                let name = format!("{PREFIX}{name}.lora_A.weight");
                let a = plan.push(name, &[low.rank, projection.inputs]);
                Place { low, a, b: 0 }
            }));
        }
        let with_outputs = names.iter().zip(&projection.outputs);
        for ((name, &out), place) in with_outputs.zip(&mut places[layers]) {
            if let Some(place) = place {
                let name = format!("{PREFIX}{name}.lora_B.weight");
                place.b = plan.push(name, &[out, place.low.rank]);
            }
        }
    }
    let bank = match plan.len() {
        0 => None,
        _ => {
            let mut bank = plan.build(fill)?;
            bank.train()?;
            Some(bank)
        }
    };
    Ok(BlockFactors {
        bank,
        places: places.into(),
    })
}
