//! Scoring against the reference, at every level and for every storage type.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::cpu::{self, Level};
use crate::element::Element;
use crate::records::{RecordShape, RecordView, Records};
use crate::score::{ItemTokens, Missed, RecordParts, RecordsJob, ScoreJob};
use crate::testing::{Case, cases, stored};
use crate::{Backend, reference};

const END: usize = 256;

/// A code is right if it is that of a mass within this many sixteenths of a bit, or of one too
/// small to say.
const CODE_TOLERANCE: f64 = 1e-3;

fn check_code(code: u8, exact: f64, what: &str) {
    let sixteenths = (-16.0 * exact.log2()).clamp(0.0, 255.0);
    let error = (f64::from(code) - sixteenths).abs();
    assert!(
        error <= 0.5 + CODE_TOLERANCE,
        "{what} has code {code}, mass {exact:e}"
    );
}

pub(crate) fn check_position(
    view: RecordView<'_>,
    position: usize,
    exact: &[f64],
    shape: &RecordShape,
) {
    let listed: Vec<(u8, u8)> = view.listed(position).collect();
    let mut tail: f64 = exact[..END].iter().sum();
    let mut filled = exact[END];
    let mut least = f64::INFINITY;
    for &(symbol, code) in &listed {
        let mass = exact[usize::from(symbol)];
        check_code(code, mass, "symbol");
        filled += mass;
        tail -= mass;
        least = least.min(mass);
    }
    check_code(view.end()[position], exact[END], "end");
    if tail > 1e-9 {
        check_code(view.tail()[position], tail, "tail");
    }
    for (symbol, &mass) in (0..=u8::MAX).zip(exact) {
        let is_listed = listed.iter().any(|&(listed, _)| listed == symbol);
        assert!(
            is_listed || mass <= least + 1e-6,
            "{symbol} of mass {mass} is not listed"
        );
    }
    let fill = f64::from(shape.fill_permille) / 1000.0;
    assert!(
        listed.len() == shape.k || filled >= fill - 1e-6,
        "filled to {filled} only"
    );
    assert!(
        listed.len() == 1 || filled - least < fill + 1e-6,
        "filled to {filled} without {least}"
    );
}

/// Scores the rows of a job in parts that end at `cuts`.
fn records_in_parts<T: Element>(
    level: Level,
    job: &RecordsJob<'_>,
    logits: &[T],
    branch_logits: &[T],
    cuts: &[usize],
) -> (Records, Vec<Missed>) {
    let width = job.score.vocab.len();
    let roots = cpu::score::roots(level, job.score.vocab, 0, branch_logits).unwrap();
    let mut parts = RecordParts::new(job);
    let mut start = 0;
    for &end in cuts.iter().chain([&job.score.rows()]) {
        let end = end.max(start);
        parts
            .add(
                level,
                start..end,
                &logits[start * width..end * width],
                &roots,
            )
            .unwrap();
        start = end;
    }
    let mut out = Records::new(job.shape.k).unwrap();
    let missed = parts.finish(&mut out).unwrap();
    (out, missed)
}

/// Branches, records and bits of several items at every level.
fn check_scores<T: Element>(case: &mut Case, shape: RecordShape, threshold: f32) {
    let vocab = case.vocab.clone();
    let tokens = case.items();
    let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let score = ScoreJob::new(&vocab, &tokens).unwrap();
    let rows = score.rows();
    let logits: Vec<T> = stored(&case.rows(rows));
    let exact_branches = Backend::Reference
        .branches_of(&vocab, &tokens, &logits, threshold)
        .unwrap();
    let exact_bits = Backend::Reference
        .token_bits_of(&vocab, &tokens, &logits)
        .unwrap();
    let items: Vec<ItemTokens<'_>> = tokens
        .iter()
        .zip(&exact_branches)
        .map(|(tokens, branches)| ItemTokens { tokens, branches })
        .collect();
    let job = RecordsJob::new(score.clone(), &items, &shape).unwrap();
    let branch_logits: Vec<T> = stored(&case.rows(job.branch_rows()));
    let cuts = [case.random.below(rows), case.random.below(rows)];
    for level in Level::present() {
        if threshold > 0.0 {
            let found = cpu::score::branches(level, &score, 0..rows, &logits, threshold).unwrap();
            assert_eq!(score.by_item(found), exact_branches, "{level:?}");
        }
        let (records, missed) = records_in_parts(level, &job, &logits, &branch_logits, &[]);
        let in_parts = records_in_parts(level, &job, &logits, &branch_logits, &cuts);
        assert_eq!(
            (&records, &missed),
            (&in_parts.0, &in_parts.1),
            "{level:?}: parts at {cuts:?}"
        );
        assert_eq!(records.view().check_mass(), Ok(()));
        let mut position = 0;
        for (index, missed) in missed.iter().enumerate() {
            let item = reference::score::Item::with_branches(&job, index, &logits, &branch_logits)
                .unwrap();
            let (exact, exact_missed) = reference::score::distributions(&item);
            for exact in &exact {
                let sum: f64 = exact.iter().sum();
                assert!(
                    (sum - 1.0).abs() < 1e-9,
                    "mass of position {position} is {sum}"
                );
                check_position(records.view(), position, exact, &shape);
                position += 1;
            }
            // Beyond this scale the observed byte may have no mass that f32 can say, and nothing
            // to share.
            if case.scale < 100.0 {
                assert!((missed.short - exact_missed.short).abs() < 1e-5);
                assert!((missed.long - exact_missed.long).abs() < 1e-5);
            }
            assert!((0.0..=1.0).contains(&missed.short) && (0.0..=1.0).contains(&missed.long));
        }
        assert_eq!(records.positions(), position);
        let bits = cpu::score::token_bits(level, &score, 0..rows, &logits).unwrap();
        for (bits, exact) in score.sums(&bits).iter().zip(&exact_bits) {
            assert!(
                (bits - exact).abs() <= 1e-6 * exact + 1e-4,
                "{level:?}: {bits} for {exact}"
            );
        }
    }
}

proptest! {
    #[test]
    fn scores_agree_with_the_reference(
        mut case in cases(),
        k in 1_usize..8,
        fill_permille in prop::sample::select(&[0, 900, 995, 1000][..]),
        threshold in prop::sample::select(&[0.0, 1e-3, 0.3, 2.0][..]),
    ) {
        let shape = RecordShape { k, fill_permille };
        check_scores::<f32>(&mut case, shape, threshold);
        check_scores::<bf16>(&mut case, shape, threshold);
        check_scores::<f16>(&mut case, shape, threshold);
    }
}

#[test]
fn the_reference_lists_what_the_fast_path_lists() {
    let mut random = crate::testing::Random(5);
    let pairs: Vec<[u8; 2]> = (0..=255_u8).map(|byte| [byte, b'x']).collect();
    let kinds = pairs.iter().flat_map(|pair| {
        [
            crate::TokenKind::Bytes(&pair[..1]),
            crate::TokenKind::Bytes(pair),
        ]
    });
    let vocab = crate::Vocab::new(kinds.chain([crate::TokenKind::EndOfRecord])).unwrap();
    let tokens: Vec<u32> = (0..40)
        .map(|_| u32::try_from(random.below(512)).unwrap())
        .collect();
    let logits = random.logits(41 * vocab.len(), 6.0);
    let shape = RecordShape {
        k: 16,
        fill_permille: 995,
    };
    let [fast, exact] = [Backend::Cpu, Backend::Reference].map(|backend| {
        let mut out = Records::new(16).unwrap();
        backend
            .records(&vocab, &tokens, &logits, &[], &[], &shape, &mut out)
            .unwrap();
        out
    });
    assert_eq!(fast.view().symbols(), exact.view().symbols());
}
