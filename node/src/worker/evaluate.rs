//! Measurements of a model: bits per byte, and choices ranked by likelihood.

use consilium_protocol::evaluation::Score;
use rayon::prelude::*;

use super::data::Item;
use super::error::WorkError;
use super::holdout::HoldoutItem;
use super::monitor::Monitor;
use super::source::LoadedModel;

/// Bits per byte over all targets given their contexts, each end counted as one byte; 0 without texts.
///
/// Bits are those of the canonical tokenisation, an upper bound of the true number.
///
/// # Errors
/// A target that cannot be tokenised, a model that gives no finite numbers, or a monitor that says stop.
pub fn bits_per_byte<'a>(
    source: &LoadedModel,
    texts: impl IntoIterator<Item = (&'a str, &'a str)>,
    monitor: &mut dyn Monitor,
) -> Result<f64, WorkError> {
    let texts: Vec<_> = texts.into_iter().collect();
    let positions: usize = texts.iter().map(|(_, target)| target.len() + 1).sum();
    let bits: f64 = bits_of(source, &texts, monitor)?.iter().sum();
    Ok(bits / positions.max(1) as f64)
}

/// Log-likelihood in nats of every choice and its end, given the context; in the order of the items.
///
/// # Errors
/// As [`bits_per_byte`].
pub fn rank_choices<'a>(
    source: &LoadedModel,
    items: impl IntoIterator<Item = (&'a str, &'a [String])>,
    monitor: &mut dyn Monitor,
) -> Result<Vec<Vec<f64>>, WorkError> {
    let items: Vec<_> = items.into_iter().collect();
    let texts: Vec<(&str, &str)> = items
        .iter()
        .flat_map(|&(context, choices)| choices.iter().map(move |choice| (context, &**choice)))
        .collect();
    let mut bits = bits_of(source, &texts, monitor)?.into_iter();
    Ok(items
        .iter()
        .map(|(_, choices)| {
            let likelihood = |bits: f64| -bits * std::f64::consts::LN_2;
            bits.by_ref().take(choices.len()).map(likelihood).collect()
        })
        .collect())
}

/// Mean scores over a holdout. A choice is right where the target ranks strictly before all others.
///
/// # Errors
/// As [`bits_per_byte`].
pub fn evaluate(
    source: &LoadedModel,
    holdout: &[HoldoutItem],
    monitor: &mut dyn Monitor,
) -> Result<Score, WorkError> {
    let texts = holdout.iter().map(|item| (&*item.context, &*item.target));
    let bits_per_byte = bits_per_byte(source, texts, monitor)?;
    let asked: Vec<&HoldoutItem> = holdout
        .iter()
        .filter(|item| !item.choices.is_empty())
        .collect();
    let questions = asked.iter().map(|item| (&*item.context, &*item.choices));
    let ranked = rank_choices(source, questions, monitor)?;
    let right = asked
        .iter()
        .zip(&ranked)
        .filter(|(item, ranked)| is_first(&item.choices, &item.target, ranked))
        .count();
    let accuracy = (!asked.is_empty()).then(|| right as f64 / asked.len() as f64);
    Ok(Score {
        bits_per_byte,
        accuracy,
    })
}

fn is_first(choices: &[String], target: &str, likelihoods: &[f64]) -> bool {
    let of = |right: bool| {
        choices
            .iter()
            .zip(likelihoods)
            .filter(move |(choice, _)| (*choice == target) == right)
            .map(|(_, &likelihood)| likelihood)
            .fold(f64::NEG_INFINITY, f64::max)
    };
    of(true) > of(false)
}

fn bits_of(
    source: &LoadedModel,
    texts: &[(&str, &str)],
    monitor: &mut dyn Monitor,
) -> Result<Vec<f64>, WorkError> {
    let items = texts
        .par_iter()
        .map(|(context, target)| source.whole_item(context, target))
        .collect::<Result<Vec<Item>, _>>()?;
    let total = texts.len() as u64;
    let mut bits = Vec::with_capacity(texts.len());
    for run in source.runs(&items) {
        let items = &items[run.clone()];
        let batch = source.batch(items);
        let pass = source.model.score(&batch.packed, &batch.rows)?;
        let ranks: Vec<Vec<u32>> = items
            .iter()
            .map(|item| source.ranks(&item.target))
            .collect();
        let targets: Vec<&[u32]> = ranks.iter().map(Vec::as_slice).collect();
        let of_batch = source.model.score_with(&source.vocab, |head| {
            head.token_bits(&pass.hidden, &targets)
        })??;
        bits.extend(of_batch);
        monitor.advance(run.end as u64, total, None)?;
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::model::Packed;
    use crate::worker::testing::{LINES, log_softmax, model};

    /// Nats of a target and its end, one token at a time.
    fn by_hand(source: &LoadedModel, context: &str, target: &str) -> f64 {
        let item = source.whole_item(context, target).unwrap();
        let mut ids = vec![source.tokenizer.start_of_record()];
        ids.extend(&item.context);
        let end = source.tokenizer.end_of_record();
        let live = source.vocab.end_ranks().end as usize;
        let mut sum = 0.0;
        for &id in item.target.iter().chain([&end]) {
            let mut packed = Packed::default();
            packed.push(ids.iter().copied());
            let last = u32::try_from(ids.len() - 1).unwrap();
            let pass = source.model.score(&packed, &[last]).unwrap();
            let row = source.model.logits(&pass.hidden).unwrap();
            sum += log_softmax(&row, live)[source.ranks(&[id])[0] as usize];
            ids.push(id);
        }
        sum
    }

    #[test]
    fn scores_are_those_of_the_chain_rule_by_hand() {
        let source = model(6);
        let (context, rest) = LINES[0].split_at(LINES[0].find(" use").unwrap());
        let choices = [
            " use dolin 40mg.",
            " use merak 40mg.",
            " use",
            " give 40mg.",
        ]
        .map(String::from);
        let by_hand_all = choices
            .each_ref()
            .map(|choice| by_hand(&source, context, choice));
        let ranked = rank_choices(&source, [(context, choices.as_slice())], &mut ()).unwrap();
        for (got, want) in ranked[0].iter().zip(by_hand_all) {
            assert!((got - want).abs() < 1e-3, "{got} against {want}");
        }

        let best = (0..4)
            .max_by(|&a, &b| by_hand_all[a].total_cmp(&by_hand_all[b]))
            .unwrap();
        let item = |right: usize| HoldoutItem {
            context: context.to_owned(),
            target: choices[right].clone(),
            choices: choices.to_vec(),
        };
        let unasked = HoldoutItem {
            context: String::new(),
            target: rest.to_owned(),
            choices: Vec::new(),
        };
        let holdout = [
            item(best),
            item((best + 1) % 4),
            item(best),
            unasked.clone(),
        ];
        let score = evaluate(&source, &holdout, &mut ()).unwrap();
        assert_eq!(score.accuracy, Some(2.0 / 3.0));
        let mut nats = by_hand(&source, "", rest);
        let mut bytes = rest.len() + 1;
        for item in &holdout[..3] {
            nats += by_hand(&source, &item.context, &item.target);
            bytes += item.target.len() + 1;
        }
        let want = -nats / std::f64::consts::LN_2 / bytes as f64;
        assert!(
            (score.bits_per_byte / want - 1.0).abs() < 1e-5,
            "{score:?} against {want}"
        );
        assert_eq!(
            evaluate(&source, &[unasked], &mut ()).unwrap().accuracy,
            None
        );
    }

    #[test]
    fn a_tie_is_not_right() {
        let choices = ["a", "b"].map(String::from);
        assert!(is_first(&choices, "b", &[-2.0, -1.0]));
        assert!(!is_first(&choices, "b", &[-1.0, -1.0]));
        assert!(!is_first(&choices, "b", &[-1.0, f64::NAN]));
    }
}
