//! Low-rank adapters under their PEFT names.

#![expect(
    clippy::cast_possible_truncation,
    reason = "computed in f64, kept in f32"
)]

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use super::load::unit;
use super::ops::linear::Projection;
use super::parameters::{Bank, Plan, Slot};
use super::tensors::{NamedTensor, NamedTensors};
use super::{Head, Model, ModelError, attention, feed_forward};
use consilium_kernels::matmul::{View, ViewMut, Write, ab};

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";

/// Names of the full weights that travel with the factors.
const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

/// Adapters on all linear layers: q, k, v, o, gate, up, down.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// Rank of the factors.
    pub rank: usize,
    /// Scale of the product is `alpha / rank`.
    pub alpha: f64,
    /// Train the embedding and the head as well (PEFT `modules_to_save`).
    pub embeddings_and_head: bool,
}

impl LoraConfig {
    pub(crate) fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }
}

/// Factors of all blocks.
#[derive(Debug)]
pub(crate) struct Lora {
    pub(crate) config: LoraConfig,
    /// Attention and feed-forward factors of each layer.
    pub(crate) banks: Vec<[Bank; 2]>,
}

impl Model {
    /// Freezes the weights and adds fresh adapters: A uniform in +-sqrt(3 / in), B zero, both seeded.
    /// A tied head becomes a tensor of its own when it is to be trained.
    pub fn attach_lora(&mut self, config: LoraConfig, seed: u64) -> Result<(), ModelError> {
        if config.rank == 0 || !(config.alpha > 0.0 && config.alpha.is_finite()) {
            return Err(ModelError::BadLora {
                rank: config.rank,
                alpha: config.alpha,
            });
        }
        self.freeze();
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let mut banks = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let (a, f) = (&layer.attention.0, &layer.feed_forward.0);
            let attention = plan(
                index,
                "self_attn",
                &attention::LAYERS,
                [&a.qkv, &a.output],
                config.rank,
            );
            let feed_forward = plan(
                index,
                "mlp",
                &feed_forward::LAYERS,
                [&f.gate_up, &f.down],
                config.rank,
            );
            let mut fill = |slot: &Slot, out: &mut [f32]| {
                if slot.name.contains("lora_A") {
                    let bound = (3.0 / slot.shape[1] as f64).sqrt();
                    for value in out {
                        *value = ((2.0 * unit(&mut rng) - 1.0) * bound) as f32;
                    }
                }
                Ok::<_, ModelError>(())
            };
            let mut pair = [attention.build(&mut fill)?, feed_forward.build(&mut fill)?];
            for bank in &mut pair {
                bank.train()?;
            }
            banks.push(pair);
        }
        self.lora = Some(Lora { config, banks });
        if config.embeddings_and_head {
            self.untie()?;
            self.embedding.train()?;
            if let Head::Own(head) = &mut self.head {
                head.train()?;
            }
        }
        Ok(())
    }

    /// Shape of the adapters, if there are any.
    pub fn lora(&self) -> Option<LoraConfig> {
        self.lora.as_ref().map(|lora| lora.config)
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
        let origin = || "adapter".to_owned();
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
                Some(tensor) if tensor.values.iter().any(|value| !value.is_finite()) => {
                    ModelError::NotFinite {
                        origin: origin(),
                        name: name.to_owned(),
                    }
                }
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
        for bank in lora.banks.iter().flatten() {
            bank.edit(|out| {
                for slot in bank.slots() {
                    out[slot.range()].copy_from_slice(&tensors[&slot.name].values);
                }
            })?;
        }
        if lora.config.embeddings_and_head
            && let Head::Own(head) = &self.head
        {
            self.embedding
                .edit(|out| out.copy_from_slice(&tensors[EMBEDDING].values))?;
            let by_rank = self.in_rank_order(&tensors[HEAD].values);
            head.edit(|out| out.copy_from_slice(&by_rank))?;
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
        for bank in lora.banks.iter().flatten() {
            each(bank, None, false)?;
        }
        if lora.config.embeddings_and_head
            && let Head::Own(head) = &self.head
        {
            each(&self.embedding, Some(EMBEDDING), false)?;
            each(head, Some(HEAD), true)?;
        }
        Ok(())
    }

    /// Adds `scale B A` to the weights in `tensors`.
    pub(crate) fn fold_adapters(&self, tensors: &mut NamedTensors) -> Result<(), ModelError> {
        let Some(lora) = &self.lora else {
            return Ok(());
        };
        let factors = self.adapter()?;
        for (name, a) in factors
            .iter()
            .filter(|(name, _)| name.ends_with(".lora_A.weight"))
        {
            let module = name.trim_end_matches(".lora_A.weight");
            let b = &factors[&format!("{module}.lora_B.weight")];
            let weight = format!("{}.weight", module.trim_start_matches(PREFIX));
            let Some(weight) = tensors.get_mut(&weight) else {
                continue;
            };
            let (out, rank, inputs) = (b.shape[0], b.shape[1], a.shape[1]);
            ab(
                ViewMut::new(&mut weight.values, out, inputs),
                Write::Add,
                View::new(&b.values, out, rank),
                View::new(&a.values, rank, inputs),
                lora.config.scale(),
            );
        }
        Ok(())
    }
}

/// Factors of one block: per projection all A, then all B, as [`Projection::factor_offsets`] has them.
fn plan(
    layer: usize,
    part: &str,
    names: &[&[&str]; 2],
    projections: [&Projection; 2],
    rank: usize,
) -> Plan {
    let mut plan = Plan::default();
    for (names, projection) in names.iter().zip(projections) {
        let name = |module: &str, factor: &str| {
            format!("{PREFIX}model.layers.{layer}.{part}.{module}.{factor}.weight")
        };
        for module in *names {
            plan.push(name(module, "lora_A"), &[rank, projection.inputs]);
        }
        for (module, &out) in names.iter().zip(&projection.outputs) {
            plan.push(name(module, "lora_B"), &[out, rank]);
        }
    }
    plan
}
