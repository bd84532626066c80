//! Which linear layers of a model an adapter's settings mean.

use fancy_regex::Regex;

use super::{AdapterConfig, Refusal, Targets};
use crate::worker::model::config::{Family, ModelConfig, Modules};
use crate::worker::model::linear::Low;

/// Longest regular expression that is read, in bytes.
const LONGEST_PATTERN: usize = 1 << 12;

impl AdapterConfig {
    /// Rank and scale of each linear layer of each block, attention's first; `None` where it has no factors.
    pub(crate) fn places(
        &self,
        config: &ModelConfig,
    ) -> Result<Vec<[Vec<Option<Low>>; 2]>, Refusal> {
        if self.rank == 0 || !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return Err((
                "r",
                format!(
                    "adapters of rank {} and alpha {}: both must be positive",
                    self.rank, self.alpha
                ),
            ));
        }
        let matcher = Matcher::new(self)?;
        let of = |layer: usize, names: Vec<String>| {
            let place = |name: &String| matcher.place(name, self, layer);
            names.iter().map(place).collect::<Result<Vec<_>, _>>()
        };
        let places = (0..config.layers)
            .map(|layer| {
                let [attention, feed_forward] = module_names(config.family, layer);
                Ok([of(layer, attention)?, of(layer, feed_forward)?])
            })
            .collect::<Result<Vec<_>, Refusal>>()?;
        self.check_names(config, &matcher)?;
        if places.iter().flatten().flatten().all(Option::is_none) {
            return Err((
                "target_modules",
                "no linear layer of the model is among them".into(),
            ));
        }
        Ok(places)
    }

    /// Every named target must be a linear layer of a block, and no other target be the embedding or the head.
    fn check_names(&self, config: &ModelConfig, matcher: &Matcher) -> Result<(), Refusal> {
        let known: Vec<&str> = config.family.modules().collect();
        for (name, is_saved) in [
            ("lm_head", self.saves_head),
            ("model.embed_tokens", self.saves_embedding),
        ] {
            // What is saved whole is no target, as in PEFT.
            if !is_saved && matcher.is_target(name)? {
                let reason = format!(
                    "`{name}` cannot have factors; train it whole by `modules_to_save`, or leave it out"
                );
                return Err(("target_modules", reason));
            }
        }
        let Targets::Names(names) = &self.targets else {
            return Ok(());
        };
        for name in names {
            let matches = |layer| {
                let modules = module_names(config.family, layer);
                modules
                    .iter()
                    .flatten()
                    .any(|module| ends_with(module, name))
            };
            if !(0..config.layers).any(matches) {
                let reason = format!(
                    "the model has no linear layer `{name}`, it has {}",
                    known.join(", ")
                );
                return Err(("target_modules", reason));
            }
        }
        Ok(())
    }
}

/// Whole names of a block's linear layers, attention's first.
pub(crate) fn module_names(family: Family, layer: usize) -> [Vec<String>; 2] {
    let of = |part: &str, modules: Modules| {
        let modules = modules.into_iter().flatten();
        modules
            .map(|module| format!("model.layers.{layer}.{part}.{module}"))
            .collect()
    };
    [
        of("self_attn", family.attention_modules()),
        of("mlp", family.feed_forward_modules()),
    ]
}

/// Compiled expressions of a configuration.
struct Matcher {
    targets: Set,
    excluded: Option<Set>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

enum Set {
    All,
    Names(Vec<String>),
    Pattern(&'static str, Regex),
}

impl Set {
    fn new(field: &'static str, targets: &Targets) -> Result<Self, Refusal> {
        Ok(match targets {
            Targets::AllLinear => Self::All,
            Targets::Names(names) => Self::Names(names.clone()),
            Targets::Pattern(pattern) => Self::Pattern(
                field,
                compile(field, pattern, &format!(r"\A(?:{pattern})\z"))?,
            ),
        })
    }

    fn has(&self, name: &str) -> Result<bool, Refusal> {
        Ok(match self {
            Self::All => name.starts_with("model.layers."),
            Self::Names(names) => names.iter().any(|end| ends_with(name, end)),
            Self::Pattern(field, pattern) => found(field, pattern, name)?,
        })
    }
}

impl Matcher {
    fn new(config: &AdapterConfig) -> Result<Self, Refusal> {
        let excluded = config.excluded.as_ref();
        Ok(Self {
            targets: Set::new("target_modules", &config.targets)?,
            excluded: excluded
                .map(|excluded| Set::new("exclude_modules", excluded))
                .transpose()?,
            ranks: endings("rank_pattern", &config.rank_pattern)?,
            alphas: endings("alpha_pattern", &config.alpha_pattern)?,
        })
    }

    fn is_target(&self, name: &str) -> Result<bool, Refusal> {
        let is_excluded = self.excluded.as_ref().map(|excluded| excluded.has(name));
        Ok(!is_excluded.transpose()?.unwrap_or(false) && self.targets.has(name)?)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "kept in f32 like the factors"
    )]
    fn place(
        &self,
        name: &str,
        config: &AdapterConfig,
        layer: usize,
    ) -> Result<Option<Low>, Refusal> {
        let chosen = config.layers.as_ref();
        if chosen.is_some_and(|layers| !layers.contains(&layer)) || !self.is_target(name)? {
            return Ok(None);
        }
        let rank = only("rank_pattern", &self.ranks, name)?.unwrap_or(config.rank);
        let alpha = only("alpha_pattern", &self.alphas, name)?.unwrap_or(config.alpha);
        let divisor = if config.rank_stabilised {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        let scale = (alpha / divisor) as f32;
        Ok(Some(Low { rank, scale }))
    }
}

fn ends_with(name: &str, end: &str) -> bool {
    let before = name.strip_suffix(end);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// The value of the patterns that match. PEFT takes the first in the file's order; several that disagree are refused,
/// because that order is easily lost.
fn only<T: Copy + PartialEq>(
    field: &'static str,
    patterns: &[(Regex, T)],
    name: &str,
) -> Result<Option<T>, Refusal> {
    let mut value = None;
    for (pattern, other) in patterns {
        if found(field, pattern, name)? {
            match value {
                Some(value) if value != *other => {
                    return Err((
                        field,
                        format!("several patterns match `{name}` and disagree"),
                    ));
                }
                _ => value = Some(*other),
            }
        }
    }
    Ok(value)
}

fn endings<T: Copy>(
    field: &'static str,
    patterns: &[(String, T)],
) -> Result<Vec<(Regex, T)>, Refusal> {
    let compiled = |(pattern, value): &(String, T)| {
        let whole = format!(r"\A(?:.*\.)?(?:{pattern})\z");
        Ok((compile(field, pattern, &whole)?, *value))
    };
    patterns.iter().map(compiled).collect()
}

fn compile(field: &'static str, pattern: &str, whole: &str) -> Result<Regex, Refusal> {
    if pattern.len() > LONGEST_PATTERN {
        return Err((field, format!("an expression of {} bytes", pattern.len())));
    }
    Regex::new(whole).map_err(|error| (field, format!("`{pattern}`: {error}")))
}

/// The regex crate gives up on an expression that goes back and forth for too long.
fn found(field: &'static str, pattern: &Regex, name: &str) -> Result<bool, Refusal> {
    pattern
        .is_match(name)
        .map_err(|error| (field, format!("`{name}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::model::LoraConfig;

    #[test]
    fn names_exclusions_layers_and_patterns_choose_as_in_peft() {
        let model = ModelConfig::llama(8, 8, 2, 2, 8);
        let plain = LoraConfig {
            rank: 2,
            alpha: 4.0,
            embeddings_and_head: false,
        };
        let adapter = AdapterConfig {
            targets: Targets::Names(vec!["q_proj".into(), "mlp.up_proj".into()]),
            excluded: Some(Targets::Pattern(r".*layers\.0\..*up_proj".into())),
            rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 8)],
            alpha_pattern: vec![("up_proj".into(), 1.0)],
            ..plain.into()
        };
        let chosen = |adapter: &AdapterConfig| {
            let places = adapter.places(&model).unwrap();
            let blocks = places.into_iter().flatten().flatten();
            let low = |low: Option<Low>| low.map(|low| (low.rank, low.scale.to_bits()));
            blocks.map(low).collect::<Vec<_>>()
        };
        let of = |rank, scale: f32| Some((rank, scale.to_bits()));
        let (q0, q1, up1) = (of(2, 2.0), of(8, 0.5), of(2, 0.5));
        let none = None;
        assert_eq!(
            chosen(&adapter),
            [
                [q0, none, none, none, none, none, none],
                [q1, none, none, none, none, up1, none]
            ]
            .concat()
        );
        let second = AdapterConfig {
            layers: Some(vec![1]),
            ..adapter
        };
        assert_eq!(chosen(&second)[..7], [none; 7]);
        let nothing = AdapterConfig {
            layers: Some(vec![7]),
            ..second
        };
        assert_eq!(nothing.places(&model).unwrap_err().0, "target_modules");
    }
}
