//! What each attack costs under each merge rule and defence: the distance of the merged update from that of the honest alone.

use anyhow::{Context as _, Result, ensure};
use consilium_aggregator::fusion::{Content, MergeInput, merge_in_memory};
use consilium_kernels::adapters::product::{Factors, gram};
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, MergeRule, Training};
use serde::{Deserialize, Serialize};

use super::adapters::{Adapter, Attack, factors, layers};
use crate::lab::parallel::{Job, in_parallel};

/// One cell of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Name of the attack; `none` where everybody is honest.
    pub attack: String,
    /// Name of the merge rule.
    pub merge: String,
    /// Name of the defence.
    pub defence: String,
    /// `|merged - honest only| / |honest only - start|` in product space, whole modules included.
    pub error: Option<f64>,
    /// The score of the merged adapter relative to that of the honest only, less one.
    pub cost: Option<f64>,
    /// Why nothing was merged: the attack was refused.
    pub refused: Option<String>,
    /// Dishonest members that did not count.
    pub excluded: usize,
}

/// What is attacked.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Rank, alpha and modules; rule, defence and outer step are replaced.
    pub training: &'a Training,
    /// What everybody started from.
    pub start: &'a Adapter,
    /// What all members send if all are honest; equal weights.
    pub adapters: &'a [Adapter],
    /// The first members, who lie; at least one stays honest.
    pub dishonest: usize,
    /// Decides the noise.
    pub seed: u64,
}

/// What a merged adapter is worth, the lower the better, such as bits per byte.
pub type Score<'a> = &'a (dyn Fn(&Adapter) -> Result<f64> + Sync);

/// Every attack under every rule, attacks in the outer loop. The first rows have no attack and every member, and show what the
/// defence itself costs. What is compared with is the same merge rule over the honest members without a defence.
///
/// # Errors
/// Adapters that cannot be merged even if all are honest, or that cannot be scored.
pub fn table(
    scene: Scene<'_>,
    attacks: &[Attack],
    rules: &[(MergeRule, Defence)],
    score: Score<'_>,
) -> Result<Vec<Cell>> {
    ensure!(
        scene.dishonest < scene.adapters.len(),
        "at least one member stays honest"
    );
    let (own, honest) = scene.adapters.split_at(scene.dishonest);
    let [of_all, of_honest] = [scene.adapters, honest].map(|adapters| {
        let jobs = rules.iter().map(|&(merge, _)| -> Job<'_, (Adapter, f64)> {
            Box::new(move || {
                let alone = scene.merged(adapters, merge, Defence::None)?.0;
                let value = score(&alone)?;
                Ok((alone, value))
            })
        });
        in_parallel(jobs.collect())
    });
    let (of_all, of_honest) = (of_all?, of_honest?);
    let jobs =
        std::iter::once(None)
            .chain(attacks.iter().map(Some))
            .map(|attack| -> Job<'_, Vec<Cell>> {
                let alone = if attack.is_some() {
                    &of_honest
                } else {
                    &of_all
                };
                Box::new(move || {
                    let sent = match attack {
                        None => scene.adapters.to_vec(),
                        Some(attack) => scene.sent(attack, own, honest)?,
                    };
                    rules
                        .iter()
                        .zip(alone)
                        .map(|(&rule, alone)| scene.cell(attack, &sent, rule, alone, score))
                        .collect()
                })
            });
    Ok(in_parallel(jobs.collect())?.into_iter().flatten().collect())
}

impl Scene<'_> {
    /// What arrives: the lies first.
    fn sent(&self, attack: &Attack, own: &[Adapter], honest: &[Adapter]) -> Result<Vec<Adapter>> {
        let mut sent = own
            .iter()
            .zip(self.seed..)
            .map(|(own, seed)| attack.apply(self.start, own, honest, seed))
            .collect::<Result<Vec<_>>>()?;
        sent.extend_from_slice(honest);
        Ok(sent)
    }

    fn cell(
        &self,
        attack: Option<&Attack>,
        sent: &[Adapter],
        (merge, defence): (MergeRule, Defence),
        (alone, worth): &(Adapter, f64),
        score: Score<'_>,
    ) -> Result<Cell> {
        let mut cell = Cell {
            attack: attack.map_or_else(|| "none".to_owned(), Attack::name),
            merge: merge.name().to_owned(),
            defence: defence.name().to_owned(),
            error: None,
            cost: None,
            refused: None,
            excluded: 0,
        };
        match self.merged(sent, merge, defence) {
            Ok((merged, excluded)) => {
                cell.error = Some(relative_error(self.start, alone, &merged)?);
                cell.cost = Some(score(&merged)? / worth - 1.0);
                let liars = if attack.is_some() { self.dishonest } else { 0 };
                cell.excluded = excluded.iter().take(liars).filter(|out| **out).count();
            }
            Err(error) => cell.refused = Some(format!("{error:#}")),
        }
        Ok(cell)
    }

    /// The merged adapter, and who did not count.
    fn merged(
        &self,
        adapters: &[Adapter],
        merge: MergeRule,
        defence: Defence,
    ) -> Result<(Adapter, Vec<bool>)> {
        let training = Training {
            merge,
            defence,
            outer_rate_permille: 1000,
            outer_momentum_permille: 0,
            ..self.training.clone()
        };
        let mut files = Vec::with_capacity(adapters.len());
        for (index, adapter) in adapters.iter().enumerate() {
            let name = InstitutionId::new(&format!("member-{index:04}"))?;
            files.push((name, adapter.to_bytes()?));
        }
        let named: Vec<_> = files
            .iter()
            .map(|(name, bytes)| (name.clone(), Content::Bytes(bytes), 1))
            .collect();
        let merged = merge_in_memory(MergeInput {
            training: &training,
            seed: self.seed,
            start: Content::Bytes(&self.start.to_bytes()?),
            momentum: None,
            adapters: &named,
        })?;
        let excluded = merged
            .report
            .members
            .iter()
            .map(|member| member.excluded.is_some());
        Ok((Adapter::parse(&merged.adapter)?, excluded.collect()))
    }
}

/// `|x - reference| / |reference - start|` of the products `B A` and of whole modules, without forming a product.
///
/// # Errors
/// Adapters of other tensors than the start, or values that are not finite.
pub fn relative_error(start: &Adapter, reference: &Adapter, x: &Adapter) -> Result<f64> {
    let [mut apart, mut whole] = [0.0, 0.0];
    for layer in layers(start) {
        let g = inner_products([start, reference, x], layer)?;
        let squared =
            |i: usize, j: usize| (g[3 * i + i] - 2.0 * g[3 * i + j] + g[3 * j + j]).max(0.0);
        apart += squared(2, 1);
        whole += squared(1, 0);
    }
    for (name, before) in start.0.iter().filter(|(name, _)| !name.contains(".lora_")) {
        let of = |adapter: &Adapter| -> Result<Vec<f32>> {
            let tensor = adapter
                .0
                .get(name)
                .with_context(|| format!("no tensor {name}"))?;
            ensure!(
                tensor.values.len() == before.values.len(),
                "tensor {name} has another size"
            );
            Ok(tensor.values.clone())
        };
        let squared = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                .sum()
        };
        let reference = of(reference)?;
        apart += squared(&of(x)?, &reference);
        whole += squared(&reference, &before.values);
    }
    Ok(if whole > 0.0 {
        (apart / whole).sqrt()
    } else {
        0.0
    })
}

/// `|x - sum B A / n| / |sum B A / n|` of the products of n adapters of one scale, without forming a product. Ranks may differ.
///
/// # Errors
/// Adapters of other layers, or values that are not finite.
pub fn error_of_sum(parts: &[Adapter], x: &Adapter) -> Result<f64> {
    let first = parts.first().context("no adapters")?;
    let [mut apart, mut whole] = [0.0, 0.0];
    for layer in layers(first) {
        let g = inner_products(parts.iter().chain([x]), layer)?;
        let n = parts.len();
        // Coefficients of the difference: x less the mean.
        let share = |i: usize| if i == n { 1.0 } else { -1.0 / n as f64 };
        for i in 0..=n {
            for j in 0..=n {
                let product = g[i * (n + 1) + j];
                apart += share(i) * share(j) * product;
                if i < n && j < n {
                    whole += share(i) * share(j) * product;
                }
            }
        }
    }
    Ok((apart.max(0.0) / whole).sqrt())
}

/// Frobenius inner products of the products `B A` of a layer, `[n, n]`.
fn inner_products<'a>(
    adapters: impl IntoIterator<Item = &'a Adapter>,
    layer: &str,
) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    let [mut rows, mut columns] = [0, 0];
    for adapter in adapters {
        let (b, a, rank) = factors(adapter, layer)?;
        rows = b.shape.first().copied().unwrap_or(0);
        columns = a.shape.get(1).copied().unwrap_or(0);
        all.push(Factors {
            b: b.values.as_slice(),
            a: a.values.as_slice(),
            rank,
            scale: 1.0,
        });
    }
    Ok(gram(&all, rows, columns)?)
}
