//! What to do about a run that does not fit: the cheapest change that makes it fit, in the words of the options.

use std::fmt::Write as _;

use consilium_kernels::quant::Format;

use super::{Budget, Memory, Shape, Trained};
use crate::config::{self, DeviceChoice};
use crate::worker::error::{WorkError, size};
use crate::worker::model::ModelConfig;

/// Ways to hold a model, from the cheapest in time and loss to the smallest. Activations computed again and weights in a file
/// change no number; fewer bits do.
const HELD: [config::Memory; 7] = [
    held(Format::F32, true, false),
    held(Format::Bf16, true, false),
    held(Format::Int8, true, false),
    held(Format::Nf4, true, false),
    held(Format::F32, true, true),
    held(Format::Int8, true, true),
    held(Format::Nf4, true, true),
];

const fn held(base: Format, checkpoint_activations: bool, offload: bool) -> config::Memory {
    config::Memory {
        base,
        checkpoint_activations,
        offload,
        device: DeviceChoice::Cpu,
    }
}

/// Rank of adapters that are proposed.
const RANK: usize = 8;

/// Tokens of a row that is proposed.
const SHORT: usize = 256;

/// Why a run does not fit, with what would. `can_adapt` says whether there is a model for adapters.
#[must_use]
pub fn refusal(
    config: &ModelConfig,
    shape: &Shape,
    budget: &Budget,
    can_adapt: bool,
) -> Option<WorkError> {
    let needs = |shape: &Shape| Memory::of(config, shape).total() as u64;
    let needed = needs(shape);
    if needed <= budget.bytes {
        return None;
    }
    let fits = |shape: &&Shape| needs(shape) <= budget.bytes;
    let changes = changes(shape, can_adapt);
    let fix = match changes.iter().find(fits) {
        Some(fitting) => named(shape, fitting),
        None => {
            let least = changes.iter().map(needs).min().unwrap_or(needed);
            format!(
                "this model needs at least {}; take a smaller one, or a larger machine",
                size(least)
            )
        }
    };
    Some(WorkError::Memory {
        needed,
        available: budget.bytes,
        source_of: budget.source.clone(),
        fix,
    })
}

/// Smaller runs, those first that change least.
fn changes(shape: &Shape, can_adapt: bool) -> Vec<Shape> {
    let mut changes = fewer_rows(*shape);
    changes.extend(held_otherwise(*shape));
    let short = Shape {
        rows: 1,
        row_tokens: shape.row_tokens.min(SHORT),
        ..*shape
    };
    changes.push(short);
    changes.extend(held_otherwise(short));
    if can_adapt && shape.trained == Trained::All {
        let adapted = Shape {
            trained: Trained::Adapters {
                rank: RANK,
                embeddings_and_head: false,
            },
            ..short
        };
        changes.push(adapted);
        changes.extend(held_otherwise(adapted));
    }
    changes
}

/// One row less, two less, and so on. A batch of fewer rows is made up for by accumulation.
fn fewer_rows(shape: Shape) -> Vec<Shape> {
    (1..shape.rows)
        .rev()
        .map(|rows| Shape { rows, ..shape })
        .collect()
}

/// The run with its model held in every smaller way, each with as many rows as before, and then with fewer.
fn held_otherwise(shape: Shape) -> Vec<Shape> {
    let now = shape.held;
    let is_smaller = |held: &config::Memory| {
        let can = shape.trained != Trained::All || (held.base == Format::F32 && !held.offload);
        let bits = |format: Format| format.row_bytes(2);
        can && *held != now
            && bits(held.base) <= bits(now.base)
            && (held.checkpoint_activations || !now.checkpoint_activations)
            && (held.offload || !now.offload)
    };
    let device = now.device;
    let ways = HELD.map(|held| config::Memory { device, ..held });
    let smaller = ways.into_iter().filter(is_smaller);
    smaller
        .flat_map(|held| {
            let shape = Shape { held, ..shape };
            let mut shapes = vec![shape];
            shapes.extend(fewer_rows(shape));
            shapes
        })
        .collect()
}

/// The options that make one run the other.
fn named(from: &Shape, to: &Shape) -> String {
    let mut options = String::new();
    let mut option = |text: std::fmt::Arguments<'_>| {
        let gap = if options.is_empty() { "" } else { " " };
        write!(options, "{gap}{text}").expect("writing to a string does not fail");
    };
    if let (Trained::All, Trained::Adapters { rank, .. }) = (from.trained, to.trained) {
        option(format_args!("--lora-rank {rank}"));
    }
    if from.held.base != to.held.base {
        option(format_args!("--base {}", to.held.base.name()));
    }
    if from.held.checkpoint_activations != to.held.checkpoint_activations {
        option(format_args!("--checkpoint-activations"));
    }
    if from.held.offload != to.held.offload {
        option(format_args!("--offload"));
    }
    if from.rows != to.rows {
        option(format_args!("--rows {}", to.rows));
    }
    if from.row_tokens != to.row_tokens {
        option(format_args!("--row-tokens {}", to.row_tokens));
    }
    let what = if from.trained == to.trained {
        ""
    } else {
        "train adapters in place of all weights: "
    };
    let batch = if from.rows == to.rows {
        ""
    } else {
        "; raise --accumulate to keep the batch"
    };
    format!("{what}it fits with {options}{batch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a refusal of a model of about 4 GiB says of so much memory, in MiB.
    fn fix(trained: Trained, mebibytes: u64) -> String {
        let config = ModelConfig::llama(32_000, 2048, 16, 16, 5632);
        let shape = Shape {
            rows: 4,
            row_tokens: 512,
            accumulate: 1,
            trained,
            held: config::Memory::default(),
            tokenizer_bytes: 1 << 20,
        };
        let budget = Budget {
            bytes: mebibytes << 20,
            source: "a test".to_owned(),
        };
        match refusal(&config, &shape, &budget, true) {
            None => "fits".to_owned(),
            Some(WorkError::Memory { fix, .. }) => fix,
            Some(other) => other.to_string(),
        }
    }

    #[test]
    fn the_fix_names_the_cheapest_change_and_more_changes_where_memory_is_less() {
        let adapters = Trained::Adapters {
            rank: 16,
            embeddings_and_head: false,
        };
        let batch = "; raise --accumulate to keep the batch";
        for (mebibytes, want) in [
            (9000, "fits".to_owned()),
            (5500, format!("it fits with --rows 1{batch}")),
            (
                4900,
                format!("it fits with --checkpoint-activations --rows 3{batch}"),
            ),
            (
                3000,
                format!("it fits with --base bf16 --checkpoint-activations --rows 3{batch}"),
            ),
        ] {
            assert_eq!(fix(adapters, mebibytes), want, "{mebibytes} MiB");
        }
        let none = fix(adapters, 200);
        assert!(none.contains("a larger machine"), "{none}");
        let all = fix(Trained::All, 5000);
        assert!(
            all.starts_with("train adapters in place of all weights: it fits with --lora-rank 8"),
            "{all}"
        );
    }
}
