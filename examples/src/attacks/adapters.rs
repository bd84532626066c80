//! Attacks with adapters, as pure functions on adapters in memory.
//!
//! A dishonest member sees its own honest adapter and, as the strongest attacks assume, those of all honest others. Attacks act on the
//! parameters that are sent. Attacks that scale an update scale B and whole modules about the start and leave A, so that from a start
//! of zero the product is scaled exactly.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

const B: &str = ".lora_B.weight";
const A: &str = ".lora_A.weight";

/// A tensor's shape and values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    /// Lengths of its axes.
    pub shape: Vec<usize>,
    /// As many values as the product of these.
    pub values: Vec<f32>,
}

/// An adapter in memory: tensors by their PEFT names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Adapter(pub BTreeMap<String, Values>);

/// What a dishonest member sends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attack {
    /// The update with the other sign.
    SignFlip,
    /// Normal noise instead of an update, `scale` times as large as the honest one.
    Noise {
        /// In units of the honest update's root mean square.
        scale: f32,
    },
    /// The update times a factor.
    Scaled {
        /// Such as 100.
        by: f32,
    },
    /// No update: a free rider.
    Zero,
    /// The first honest member's adapter.
    Copy,
    /// Inner product manipulation (arXiv 1903.03936): minus epsilon times the mean of the honest updates.
    Ipm {
        /// 0.5 hides in the crowd, 100 overpowers it.
        epsilon: f32,
    },
    /// A little is enough (arXiv 1902.06156): the honest mean minus z standard deviations of every parameter.
    Alie {
        /// See [`alie_z`]; 1.5 where that is zero.
        z: f32,
    },
    /// Min-Max (Shejwalkar and Houmansadr, NDSS 2021): as far from the mean against the standard deviation as the honest are
    /// apart from each other.
    MinMax,
    /// Min-Sum (the same): the sum of squared distances to the honest is no larger than any honest member's.
    MinSum,
    /// One value that is no number.
    NanBomb,
}

impl Attack {
    /// Every attack, with the usual parameters; `members` of whom `dishonest` lie.
    #[must_use]
    pub fn all(members: usize, dishonest: usize) -> Vec<Self> {
        let z = alie_z(members, dishonest);
        vec![
            Self::SignFlip,
            Self::Noise { scale: 10.0 },
            Self::Scaled { by: 100.0 },
            Self::Zero,
            Self::Copy,
            Self::Ipm { epsilon: 0.5 },
            Self::Ipm { epsilon: 100.0 },
            Self::Alie {
                z: if z > 0.0 { z } else { 1.5 },
            },
            Self::MinMax,
            Self::MinSum,
            Self::NanBomb,
        ]
    }

    /// A short name for tables.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::SignFlip => "sign flip".to_owned(),
            Self::Noise { scale } => format!("noise x{scale}"),
            Self::Scaled { by } => format!("scaled x{by}"),
            Self::Zero => "zero (free rider)".to_owned(),
            Self::Copy => "copy".to_owned(),
            Self::Ipm { epsilon } => format!("IPM {epsilon}"),
            Self::Alie { z } => format!("ALIE {z:.2}"),
            Self::MinMax => "Min-Max".to_owned(),
            Self::MinSum => "Min-Sum".to_owned(),
            Self::NanBomb => "NaN bomb".to_owned(),
        }
    }

    /// What the attacker sends. `own` is what it would send if it were honest, `honest` what the honest others send, at least one;
    /// all have the tensors of `start`. The seed decides the noise.
    ///
    /// # Errors
    /// Adapters of other tensors or shapes, or nobody honest.
    pub fn apply(
        &self,
        start: &Adapter,
        own: &Adapter,
        honest: &[Adapter],
        seed: u64,
    ) -> Result<Adapter> {
        let first = honest.first().context("no honest adapter")?;
        for adapter in honest.iter().chain([own]) {
            start.same_layout(adapter)?;
        }
        Ok(match *self {
            Self::SignFlip => scaled(start, own, -1.0),
            Self::Noise { scale } => noise(start, own, scale, seed),
            Self::Scaled { by } => scaled(start, own, by),
            Self::Zero => start.clone(),
            Self::Copy => first.clone(),
            Self::Ipm { epsilon } => scaled(start, &moments(honest).0, -epsilon),
            Self::Alie { z } => {
                let (mean, deviation) = moments(honest);
                mean.plus(-f64::from(z), &deviation)
            }
            Self::MinMax => far_within(honest, |distances, apart| {
                let most = apart.iter().flatten().copied().fold(0.0, f64::max);
                distances.iter().copied().fold(0.0, f64::max) <= most
            }),
            Self::MinSum => far_within(honest, |distances, apart| {
                let sum = |row: &Vec<f64>| row.iter().sum::<f64>();
                let most = apart.iter().map(sum).fold(0.0, f64::max);
                distances.iter().sum::<f64>() <= most
            }),
            Self::NanBomb => {
                let mut bomb = own.clone();
                let last = bomb.0.values_mut().next_back();
                if let Some(value) = last.and_then(|tensor| tensor.values.last_mut()) {
                    *value = f32::NAN;
                }
                bomb
            }
        })
    }
}

/// The largest z with which `dishonest` of `members` stay in the crowd (arXiv 1902.06156, algorithm 3): the normal quantile of
/// (n - f - s) / (n - f), s = n / 2 + 1 - f.
#[must_use]
pub fn alie_z(members: usize, dishonest: usize) -> f32 {
    let supporters = (members / 2 + 1).saturating_sub(dishonest);
    let honest = members.saturating_sub(dishonest);
    let share = honest.saturating_sub(supporters) as f64 / honest.max(1) as f64;
    let (mut low, mut high) = (-6.0_f64, 6.0_f64);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if normal_below(middle) < share {
            low = middle;
        } else {
            high = middle;
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "between -6 and 6")]
    let z = high as f32;
    if z.abs() < 1e-3 { 0.0 } else { z }
}

/// The normal distribution function, to 1e-7 (Abramowitz and Stegun 7.1.26).
fn normal_below(x: f64) -> f64 {
    let y = x.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / 0.327_591_1_f64.mul_add(y, 1.0);
    let terms = [
        1.061_405_429,
        -1.453_152_027,
        1.421_413_741,
        -0.284_496_736,
        0.254_829_592,
    ];
    let polynomial = terms.iter().fold(0.0, |sum, term| (sum + term) * t);
    let erf = 1.0 - polynomial * (-y * y).exp();
    if x < 0.0 {
        (1.0 - erf) / 2.0
    } else {
        f64::midpoint(1.0, erf)
    }
}

impl Adapter {
    /// Reads `adapter_model.safetensors`.
    ///
    /// # Errors
    /// Bytes that are no safetensors file of `f32`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let parsed = SafeTensors::deserialize(bytes).context("adapter")?;
        let mut tensors = BTreeMap::new();
        for (name, view) in parsed.tensors() {
            ensure!(view.dtype() == Dtype::F32, "tensor {name} is not of f32");
            let floats = view.data().as_chunks().0.iter();
            let values = Values {
                shape: view.shape().to_vec(),
                values: floats.map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            };
            tensors.insert(name, values);
        }
        Ok(Self(tensors))
    }

    /// Writes `adapter_model.safetensors`.
    ///
    /// # Errors
    /// A tensor whose values are not as many as its shape says.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes: Vec<(&str, &[usize], Vec<u8>)> = self
            .0
            .iter()
            .map(|(name, tensor)| {
                let bytes = tensor.values.iter().flat_map(|value| value.to_le_bytes());
                (name.as_str(), tensor.shape.as_slice(), bytes.collect())
            })
            .collect();
        let mut views = Vec::with_capacity(bytes.len());
        for (name, shape, data) in &bytes {
            let view = TensorView::new(Dtype::F32, shape.to_vec(), data);
            views.push((*name, view.with_context(|| format!("tensor {name}"))?));
        }
        Ok(safetensors::serialize(views, None)?)
    }

    fn same_layout(&self, other: &Self) -> Result<()> {
        let shapes = |adapter: &Self| -> Vec<(String, Vec<usize>)> {
            let tensors = adapter.0.iter();
            tensors
                .map(|(name, tensor)| (name.clone(), tensor.shape.clone()))
                .collect()
        };
        ensure!(
            shapes(self) == shapes(other),
            "an adapter has not the tensors of the start"
        );
        Ok(())
    }

    /// Tensor by tensor, from this one's values and another's.
    #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
    fn with(&self, other: &Self, of: impl Fn(&str, f64, f64) -> f64) -> Self {
        let tensors = self.0.iter().zip(other.0.values());
        let tensors = tensors.map(|((name, a), b)| {
            let pairs = a.values.iter().zip(&b.values);
            let values = pairs.map(|(a, b)| of(name, f64::from(*a), f64::from(*b)) as f32);
            let values = Values {
                shape: a.shape.clone(),
                values: values.collect(),
            };
            (name.clone(), values)
        });
        Self(tensors.collect())
    }

    fn plus(&self, factor: f64, direction: &Self) -> Self {
        self.with(direction, |_, x, d| factor.mul_add(d, x))
    }

    fn squared_distance(&self, other: &Self) -> f64 {
        let tensors = self.0.values().zip(other.0.values());
        let of_tensor = |(a, b): (&Values, &Values)| -> f64 {
            let pairs = a.values.iter().zip(&b.values);
            pairs
                .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                .sum()
        };
        tensors.map(of_tensor).sum()
    }
}

/// B and whole modules `start + by (own - start)`, A that of `own`.
fn scaled(start: &Adapter, own: &Adapter, by: f32) -> Adapter {
    start.with(own, |name, before, x| {
        if name.ends_with(A) {
            x
        } else {
            f64::from(by).mul_add(x - before, before)
        }
    })
}

fn noise(start: &Adapter, own: &Adapter, scale: f32, seed: u64) -> Adapter {
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    // Irwin and Hall: twelve uniform draws have variance one.
    let mut normal = || {
        (0..12)
            .map(|_| f64::from(draws.next_u32()) / 2_f64.powi(32))
            .sum::<f64>()
            - 6.0
    };
    let mut noisy = start.clone();
    for ((name, tensor), own) in noisy.0.iter_mut().zip(own.0.values()) {
        if name.ends_with(A) {
            tensor.values.clone_from(&own.values);
            continue;
        }
        let pairs = tensor.values.iter().zip(&own.values);
        let squares: f64 = pairs
            .map(|(a, b)| (f64::from(*b) - f64::from(*a)).powi(2))
            .sum();
        let size = f64::from(scale) * (squares / tensor.values.len().max(1) as f64).sqrt();
        for value in &mut tensor.values {
            #[expect(clippy::cast_possible_truncation, reason = "parameters are f32")]
            let moved = (f64::from(*value) + size * normal()) as f32;
            *value = moved;
        }
    }
    noisy
}

/// Mean and standard deviation of every parameter.
fn moments(honest: &[Adapter]) -> (Adapter, Adapter) {
    let Some(first) = honest.first() else {
        return Default::default();
    };
    let zero = first.with(first, |_, _, _| 0.0);
    let share = 1.0 / honest.len() as f64;
    let mean = honest
        .iter()
        .fold(zero.clone(), |sum, adapter| sum.plus(share, adapter));
    let squares = honest.iter().fold(zero, |sum, adapter| {
        let apart = adapter.with(&mean, |_, x, mean| share * (x - mean).powi(2));
        sum.plus(1.0, &apart)
    });
    let deviation = squares.with(&squares, |_, square, _| square.sqrt());
    (mean, deviation)
}

/// `mean - gamma deviation` with the largest gamma that `hidden` allows, given its squared distances to the honest and theirs to
/// each other.
fn far_within(honest: &[Adapter], hidden: impl Fn(&[f64], &[Vec<f64>]) -> bool) -> Adapter {
    let (mean, deviation) = moments(honest);
    let distances = |from: &Adapter| -> Vec<f64> {
        honest
            .iter()
            .map(|adapter| from.squared_distance(adapter))
            .collect()
    };
    let apart: Vec<Vec<f64>> = honest.iter().map(distances).collect();
    let at = |gamma: f64| mean.plus(-gamma, &deviation);
    let (mut low, mut high) = (0.0, 50.0);
    for _ in 0..30 {
        let gamma = f64::midpoint(low, high);
        if hidden(&distances(&at(gamma)), &apart) {
            low = gamma;
        } else {
            high = gamma;
        }
    }
    at(low)
}

/// Layers with factors, by what stands before `.lora_B.weight`.
pub(super) fn layers(adapter: &Adapter) -> impl Iterator<Item = &str> {
    adapter.0.keys().filter_map(|name| name.strip_suffix(B))
}

/// B, A and the rank of a layer.
pub(super) fn factors<'a>(
    adapter: &'a Adapter,
    layer: &str,
) -> Result<(&'a Values, &'a Values, usize)> {
    let of = |factor: &str| {
        let name = format!("{layer}{factor}");
        adapter
            .0
            .get(&name)
            .with_context(|| format!("no tensor {name}"))
    };
    let (b, a) = (of(B)?, of(A)?);
    let rank = a.shape.first().copied().context("A has no shape")?;
    Ok((b, a, rank))
}
