//! What each attack costs under each merge rule and defence: the distance of the merged update from that of the honest alone.

use anyhow::{Context as _, Result, ensure};
use consilium_aggregator::fusion::{Content, MergeInput, merge_in_memory};
use consilium_kernels::adapters::product::{Factors, gram};
use consilium_protocol::InstitutionId;
use consilium_protocol::manifest::{Defence, MergeRule, Training};
use serde::Serialize;

use super::adapters::{Adapter, Attack, factors, layers};

/// One cell of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// Name of the attack; `none` where everybody is honest.
    pub attack: String,
    /// Name of the merge rule.
    pub merge: &'static str,
    /// Name of the defence.
    pub defence: &'static str,
    /// `|merged - honest only| / |honest only - start|` in product space, whole modules included.
    pub error: Option<f64>,
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

/// Every attack under every rule, attacks in the outer loop. The first rows have no attack and every member, and show what the
/// defence itself costs. What is compared with is the same merge rule over the honest members without a defence.
///
/// # Errors
/// Adapters that cannot be merged even if all are honest.
pub fn table(
    scene: Scene<'_>,
    attacks: &[Attack],
    rules: &[(MergeRule, Defence)],
) -> Result<Vec<Cell>> {
    ensure!(
        scene.dishonest < scene.adapters.len(),
        "at least one member stays honest"
    );
    let (own, honest) = scene.adapters.split_at(scene.dishonest);
    let mut cells = Vec::with_capacity((attacks.len() + 1) * rules.len());
    for attack in std::iter::once(None).chain(attacks.iter().map(Some)) {
        let (sent, honest) = match attack {
            None => (scene.adapters.to_vec(), scene.adapters),
            Some(attack) => {
                let mut sent = Vec::with_capacity(scene.adapters.len());
                for (own, seed) in own.iter().zip(scene.seed..) {
                    sent.push(attack.apply(scene.start, own, honest, seed)?);
                }
                sent.extend_from_slice(honest);
                (sent, honest)
            }
        };
        for &(merge, defence) in rules {
            let alone = scene.merged(honest, merge, Defence::None)?.0;
            let mut cell = Cell {
                attack: attack.map_or_else(|| "none".to_owned(), Attack::name),
                merge: merge.name(),
                defence: defence.name(),
                error: None,
                refused: None,
                excluded: 0,
            };
            match scene.merged(&sent, merge, defence) {
                Ok((merged, excluded)) => {
                    cell.error = Some(relative_error(scene.start, &alone, &merged)?);
                    let liars = if attack.is_some() { scene.dishonest } else { 0 };
                    cell.excluded = excluded.iter().take(liars).filter(|out| **out).count();
                }
                Err(error) => cell.refused = Some(format!("{error:#}")),
            }
            cells.push(cell);
        }
    }
    Ok(cells)
}

impl Scene<'_> {
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
        let mut all = Vec::with_capacity(3);
        for adapter in [start, reference, x] {
            let (b, a, rank) = factors(adapter, layer)?;
            all.push(Factors {
                b: b.values.as_slice(),
                a: a.values.as_slice(),
                rank,
                scale: 1.0,
            });
        }
        let side = |shape: Option<&usize>| shape.copied().unwrap_or(0);
        let (b, a, _) = factors(start, layer)?;
        let g = gram(&all, side(b.shape.first()), side(a.shape.get(1)))?;
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
