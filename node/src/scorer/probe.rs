//! Three tokens before any work: whether the server gives what is needed, in the tokens of the source's folder.

use consilium_kernels::ListedRow;

use super::answer::{Answer, Pairs, Prompt};
use super::error::ScorerError;
use super::server::{Server, Stop};
use super::source::Source;

/// Text whose first tokens are asked about.
const TEXT: &str = "the 3 answers";
/// Largest share of the compared tokens that may be spelled otherwise, in hundredths: servers differ in how they write
/// spaces and pieces of characters.
const SPELLED_OTHERWISE: usize = 10;
/// Largest change of a log-probability, in nats, between two runs of one prompt. Batches of other sizes move the last
/// digits of 16-bit arithmetic; a stale cache moves the first.
const CHANGE: f32 = 0.1;
/// Log-probabilities below this are not compared: 16 bits do not resolve them.
const FAINT: f32 = -12.0;

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probed {
    /// Likeliest tokens that the server lists at a position.
    pub top: u32,
    /// Tokens whose spelling was compared with the folder's.
    pub compared: usize,
}

/// Asks about a short prompt, about a longer one that begins like it, and about the short one again.
///
/// # Errors
/// What the server lacks, with the flag that gives it.
pub(super) fn probe(
    server: &Server,
    source: &Source,
    top: u32,
    stop: Stop<'_>,
) -> Result<Probed, ScorerError> {
    let text = source.item("", TEXT, usize::MAX)?.target;
    let short: Vec<u32> = std::iter::once(source.start())
        .chain(text)
        .take(3)
        .collect();
    let long: Vec<u32> = short.iter().copied().chain([source.end(); 2]).collect();
    let ask = |ids: &[u32]| {
        let prompt = Prompt {
            ids: ids.to_vec(),
            from: 1,
        };
        server.ask(&[prompt], top, true, stop)
    };
    let first = ask(&short)?;
    check_rows(server, source, &first, top)?;
    let compared = check_spelling(server, source, &first)?;
    ask(&long)?;
    let again = ask(&short)?;
    check_same(server, &first, &again)?;
    Ok(Probed { top, compared })
}

fn wrong(server: &Server, problem: String) -> ScorerError {
    ScorerError::Response {
        url: server.url().to_owned(),
        problem,
    }
}

fn check_rows(
    server: &Server,
    source: &Source,
    answer: &Answer,
    top: u32,
) -> Result<(), ScorerError> {
    for (token, pairs) in (1..).zip(answer.rows.iter().flatten()) {
        listed_row(server, source, (0, token), pairs, top)?;
    }
    Ok(())
}

/// The row of predictions for token `place.1` of prompt `place.0`.
pub(super) fn listed_row(
    server: &Server,
    source: &Source,
    place: (usize, usize),
    pairs: &Pairs,
    top: u32,
) -> Result<ListedRow, ScorerError> {
    let top = usize::try_from(top).unwrap_or(usize::MAX);
    ListedRow::new(&source.vocab, pairs, top).map_err(|error| ScorerError::Listed {
        url: server.url().to_owned(),
        prompt: place.0,
        token: place.1,
        source: error,
    })
}

/// Compares what the server says its tokens spell with the folder. Returns how many could be compared.
fn check_spelling(server: &Server, source: &Source, answer: &Answer) -> Result<usize, ScorerError> {
    let mut compared = 0;
    let mut otherwise = Vec::new();
    for (&id, theirs) in &answer.spelled {
        let Some(&rank) = source.vocab.rank_of_id().get(id as usize) else {
            continue;
        };
        // Pieces of a character have no text.
        let bytes = source.vocab.token_bytes(rank);
        let Ok(ours) = std::str::from_utf8(bytes) else {
            continue;
        };
        if ours.is_empty() || theirs.contains('\u{fffd}') {
            continue;
        }
        compared += 1;
        // Decoding a piece by itself drops the space in front of it in some tokenizers.
        if theirs.trim_start() != ours.trim_start() {
            otherwise.push((id, theirs, ours));
        }
    }
    if let Some((id, theirs, ours)) = otherwise.first()
        && otherwise.len() * 100 > compared * SPELLED_OTHERWISE
    {
        return Err(wrong(
            server,
            format!(
                "its tokenizer is not the one in the source's folder: {} of {compared} tokens are spelled otherwise, \
                 {id} is {theirs:?} there and {ours:?} here; put the served model's tokenizer.json and \
                 tokenizer_config.json into the folder",
                otherwise.len()
            ),
        ));
    }
    if compared == 0 {
        return Err(wrong(
            server,
            "it does not say what its tokens spell, so its tokenizer cannot be compared with the source's folder; \
             start it without --skip-tokenizer-init"
                .to_owned(),
        ));
    }
    Ok(compared)
}

fn check_same(server: &Server, first: &Answer, again: &Answer) -> Result<(), ScorerError> {
    let rows = |answer: &Answer| -> Vec<Pairs> { answer.rows.iter().flatten().cloned().collect() };
    for (first, again) in rows(first).iter().zip(&rows(again)) {
        for &(id, value) in first {
            let other = again.iter().find(|&&(listed, _)| listed == id);
            let changed = other.is_some_and(|&(_, other)| (other - value).abs() > CHANGE);
            if changed && value > FAINT {
                return Err(wrong(
                    server,
                    format!(
                        "the same prompt got another log-probability of token {id} the second time; start vLLM with \
                         --no-enable-prefix-caching, SGLang with --disable-radix-cache"
                    ),
                ));
            }
        }
    }
    Ok(())
}
