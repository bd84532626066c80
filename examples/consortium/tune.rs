//! `--tune`: which peak rate and how many steps make the arms that the round is compared with as strong as they can be.
//!
//! No round runs: text and pivot of a seed are made as always, then the two arms are trained once per cell of the grid,
//! under the adapters and batches of the round. The best cell is the one with the fewest bits on the report's own test
//! lines; choosing there favours these arms over the fused pivot, never the other way round.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use consilium_aggregator::rounds::request::OpenRequest;
use consilium_examples::lab::clock::say;
use consilium_examples::lab::measure::measure;
use consilium_examples::lab::models::train_pivot;
use consilium_examples::lab::parallel::{Job, in_parallel};
use consilium_examples::lab::trainer::{Trainer, items_of};
use consilium_examples::report::{Arm, Scores};
use consilium_examples::world::{Sizes, World};
use consilium_protocol::reference::ReferenceSet;

use crate::given::Given;

/// Peak learning rates of the grid.
const RATES: [f64; 4] = [3e-3, 6e-3, 1e-2, 2e-2];

/// One trained cell; a rate that is too high ends in numbers that are not finite, which is a result as well.
struct Trial {
    arm: Arm,
    rate: f64,
    steps: u64,
    result: Result<Scores>,
}

/// Trains both arms of one seed for each count of steps at each rate below `folder`, and returns the table.
pub(crate) fn tune(seed: u64, steps: &[u64], given: &Given, folder: &Path) -> Result<String> {
    say(&format!("seed {seed}: text and pivot"));
    let world = World::generate(seed, &Sizes::default());
    let files = world.write_files(&folder.join("text"))?;
    let pivot = match given.pivot() {
        Some(pivot) => pivot.to_owned(),
        None => {
            let pivot = folder.join("pivot");
            train_pivot(&world, &pivot)?;
            pivot
        }
    };
    let reference = ReferenceSet::parse(&std::fs::read(&files.public)?)?;
    let private = items_of(world.institutions.iter().flat_map(|site| &site.private));
    let training = OpenRequest::default().training;
    let mut jobs: Vec<Job<'_, Trial>> = Vec::new();
    for &steps in steps {
        for (arm, items) in [
            (Arm::Sft, reference.items()),
            (Arm::Centralised, private.as_slice()),
        ] {
            for rate in RATES {
                let trainer = Trainer {
                    pivot: &pivot,
                    training: &training,
                    steps,
                    rate,
                    seed: world.seed,
                };
                let world = &world;
                jobs.push(Box::new(move || {
                    let model = trainer.on_labels(items);
                    let trial = Trial {
                        arm,
                        rate,
                        steps,
                        result: model.and_then(|model| measure(&model, world)),
                    };
                    say(&trial.row());
                    Ok(trial)
                }));
            }
        }
    }
    Ok(table(seed, &in_parallel(jobs)?))
}

impl Trial {
    fn row(&self) -> String {
        let cell = format!("{:<22}{:>6}{:>8}", self.arm.label(), self.steps, self.rate);
        let result = match &self.result {
            Ok(result) => result,
            Err(error) => return format!("{cell}  {error:#}"),
        };
        let two =
            |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}"));
        let facts = two(result.facts().rate());
        let [a, b, c] = result.rules.map(|tally| two(tally.rate()));
        format!("{cell}{:>8.3}{facts:>8}{a:>8}{b:>8}{c:>8}", result.union())
    }

    fn bits(&self) -> f64 {
        self.result.as_ref().map_or(f64::INFINITY, Scores::union)
    }
}

/// One line per trial; the best of each arm and count of steps carries a star.
fn table(seed: u64, trials: &[Trial]) -> String {
    let mut text = format!(
        "Seed {seed}\n{:<22}{:>6}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}\n",
        "arm", "steps", "rate", "bits", "facts", "rule A", "rule B", "rule C"
    );
    for trial in trials {
        let best = trials
            .iter()
            .filter(|rival| (rival.arm, rival.steps) == (trial.arm, trial.steps))
            .all(|rival| rival.bits() >= trial.bits());
        let star = if best { " *" } else { "" };
        let _ = writeln!(text, "{}{star}", trial.row());
    }
    text
}
