//! What to do about a run that does not fit: the cheapest change that makes it fit, in the words of the options.

use std::fmt::Write as _;

use consilium_kernels::quant::Format;

use super::{Estimate, Room, Shape, Trained};
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

/// The same beside a device, where weights in fewer bits lie in the host's memory as offloaded ones do.
const HELD_BESIDE_DEVICE: [config::Memory; 5] = [
    held(Format::F32, true, false),
    held(Format::F32, false, true),
    held(Format::F32, true, true),
    held(Format::Int8, true, false),
    held(Format::Nf4, true, false),
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
    room: &Room,
    can_adapt: bool,
) -> Option<WorkError> {
    let estimate = |shape: &Shape| Estimate::of(config, shape, room);
    let asked = estimate(shape);
    let short = asked.short(room)?;
    let changes = changes(shape, can_adapt, room.device.is_some());
    let fitting = changes
        .iter()
        .find(|changed| estimate(changed).short(room).is_none());
    let fix = match fitting {
        Some(fitting) => named(shape, fitting),
        None => {
            let needed = changes.iter().map(|changed| match estimate(changed) {
                changed if short.is_device => changed.device().unwrap_or(short.needed),
                changed => changed.host(),
            });
            let least = needed.min().unwrap_or(short.needed);
            let (on, larger) = match short.is_device {
                true => (
                    " there",
                    "a larger device, or the processors (--device cpu)",
                ),
                false => ("", "a larger machine"),
            };
            // Where the least would do, the other memory is too small for it.
            if least > short.budget.bytes {
                format!(
                    "this model needs at least {}{on}; take a smaller one, or {larger}",
                    size(least)
                )
            } else {
                format!(
                    "what would fit there is too much for the other memory of this machine; take a smaller model, or {larger}"
                )
            }
        }
    };
    Some(WorkError::Memory {
        place: if short.is_device {
            " on the device"
        } else {
            ""
        },
        needed: short.needed,
        available: short.budget.bytes,
        source_of: short.budget.source.clone(),
        fix,
    })
}

/// Smaller runs, those first that change least.
fn changes(shape: &Shape, can_adapt: bool, on_device: bool) -> Vec<Shape> {
    let mut changes = fewer_rows(*shape);
    changes.extend(held_otherwise(*shape, on_device));
    let short = Shape {
        rows: 1,
        row_tokens: shape.row_tokens.min(SHORT),
        ..*shape
    };
    changes.push(short);
    changes.extend(held_otherwise(short, on_device));
    if can_adapt && shape.trained == Trained::All {
        let adapted = Shape {
            trained: Trained::Adapters {
                rank: RANK,
                embeddings_and_head: false,
            },
            ..short
        };
        changes.push(adapted);
        changes.extend(held_otherwise(adapted, on_device));
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
fn held_otherwise(shape: Shape, on_device: bool) -> Vec<Shape> {
    let now = shape.held;
    let bits = |format: Format| format.row_bytes(2);
    let is_smaller = |held: &config::Memory| {
        let can = shape.trained != Trained::All || (held.base == Format::F32 && !held.offload);
        can && *held != now
            && bits(held.base) <= bits(now.base)
            && (held.checkpoint_activations || !now.checkpoint_activations)
            && (held.offload || !now.offload)
    };
    let device = now.device;
    let ways: &[config::Memory] = match on_device {
        true => &HELD_BESIDE_DEVICE,
        false => &HELD,
    };
    let ways = ways.iter().map(|&held| match on_device {
        // What is in fewer bits already, or offloaded, stays so.
        true => config::Memory {
            base: if bits(held.base) > bits(now.base) {
                now.base
            } else {
                held.base
            },
            offload: held.offload || now.offload,
            device,
            ..held
        },
        false => config::Memory { device, ..held },
    });
    ways.filter(is_smaller)
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
    use crate::worker::plan::{Budget, DeviceMemory, DeviceRoom};

    /// A model of about 4 GiB as f32.
    fn model() -> ModelConfig {
        ModelConfig::llama(32_000, 2048, 16, 16, 5632)
    }

    fn shape(trained: Trained) -> Shape {
        Shape {
            rows: 4,
            row_tokens: 512,
            accumulate: 1,
            trained,
            held: config::Memory::default(),
            tokenizer_bytes: 1 << 20,
        }
    }

    const ADAPTERS: Trained = Trained::Adapters {
        rank: 16,
        embeddings_and_head: false,
    };

    fn mebibytes(number: u64) -> Option<Budget> {
        Some(Budget {
            bytes: number << 20,
            source: "a test".to_owned(),
        })
    }

    fn words(refused: Option<WorkError>) -> String {
        match refused {
            None => "fits".to_owned(),
            Some(WorkError::Memory { fix, .. }) => fix,
            Some(other) => other.to_string(),
        }
    }

    /// What a refusal says of so much memory, in MiB.
    fn fix(trained: Trained, of_host: u64) -> String {
        let room = Room {
            host: mebibytes(of_host),
            device: None,
        };
        words(refusal(&model(), &shape(trained), &room, true))
    }

    /// The same on a device, where values take two bytes.
    fn on_device(shape: &Shape, of_device: u64, of_host: u64) -> Option<WorkError> {
        let room = Room {
            host: mebibytes(of_host),
            device: Some(DeviceRoom {
                value_bytes: 2,
                budget: mebibytes(of_device),
            }),
        };
        refusal(&model(), shape, &room, true)
    }

    #[test]
    fn the_fix_names_the_cheapest_change_and_more_changes_where_memory_is_less() {
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
            assert_eq!(fix(ADAPTERS, mebibytes), want, "{mebibytes} MiB");
        }
        let none = fix(ADAPTERS, 200);
        assert!(none.contains("a larger machine"), "{none}");
        let all = fix(Trained::All, 5000);
        assert!(
            all.starts_with("train adapters in place of all weights: it fits with --lora-rank 8"),
            "{all}"
        );
    }

    #[test]
    fn a_device_has_its_own_limit_and_its_own_fixes() {
        let adapters = shape(ADAPTERS);
        let plenty = 100_000;
        let fix = |of_device, of_host| words(on_device(&adapters, of_device, of_host));
        assert_eq!(fix(plenty, plenty), "fits");
        // A mebibyte less than what the change before it needs.
        let needs = |rows, checkpoint_activations, offload| {
            let held = held(Format::F32, checkpoint_activations, offload);
            let shape = Shape {
                rows,
                held,
                ..adapters
            };
            (DeviceMemory::of(&model(), &shape, 2).total() as u64 >> 20) - 1
        };
        for (of_device, named) in [
            (needs(4, false, false), "--rows 3"),
            (needs(1, false, false), "--checkpoint-activations"),
            (needs(1, true, false), "--offload"),
        ] {
            let said = fix(of_device, plenty);
            assert!(said.contains(named), "{of_device} MiB: {said}");
            assert!(!said.contains("--base"), "{of_device} MiB: {said}");
        }
        let none = fix(100, plenty);
        assert!(
            none.contains("at least") && none.contains("larger device"),
            "{none}"
        );
        // What leaves the device has to be somewhere.
        let nowhere = fix(needs(1, true, false), 1200);
        assert!(!nowhere.contains("--offload"), "{nowhere}");

        let refused = on_device(&adapters, 100, plenty).unwrap().to_string();
        assert!(
            refused.contains("of memory on the device and 100.0 MiB"),
            "{refused}"
        );
        // The host's limit is its own.
        let refused = on_device(&adapters, plenty, 100).unwrap().to_string();
        assert!(refused.contains("of memory and 100.0 MiB"), "{refused}");
    }
}
