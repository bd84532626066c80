//! What a site says about the candidate after measuring it on its private holdout: a few aggregate numbers.

use serde::{Deserialize, Serialize};

use crate::limits;

/// Mean scores of one model on one holdout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Bits per byte, end of record counted as one byte; 0 or more.
    pub bits_per_byte: f64,
    /// Share of the choice items whose right choice ranks first, 0..=1; absent without such items.
    pub accuracy: Option<f64>,
}

/// The evaluation document of one institution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// The merged candidate.
    pub candidate: Score,
    /// The pivot before the round.
    pub pivot: Score,
    /// The institution's own source; absent where it is behind a server that is shown no private text.
    pub source: Option<Score>,
}

/// Why a document is no evaluation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("evaluation: {0}")]
pub struct EvaluationError(String);

impl Evaluation {
    /// Parses and checks a document.
    ///
    /// # Errors
    /// Too long, no such document, or a number that is not finite or out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, EvaluationError> {
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limits::EVALUATION {
            return Err(EvaluationError(format!(
                "{} bytes are too many",
                bytes.len()
            )));
        }
        let parsed: Self =
            serde_json::from_slice(bytes).map_err(|error| EvaluationError(error.to_string()))?;
        let source = parsed.source.map(|score| ("source", score));
        let others = [("candidate", parsed.candidate), ("pivot", parsed.pivot)];
        for (name, score) in others.into_iter().chain(source) {
            if !(0.0..=64.0).contains(&score.bits_per_byte) {
                return Err(EvaluationError(format!(
                    "{name}.bits_per_byte is {}, expected 0 to 64",
                    score.bits_per_byte
                )));
            }
            if score
                .accuracy
                .is_some_and(|accuracy| !(0.0..=1.0).contains(&accuracy))
            {
                return Err(EvaluationError(format!(
                    "{name}.accuracy is outside of 0 to 1"
                )));
            }
        }
        Ok(parsed)
    }

    /// The document as it is sent.
    ///
    /// # Errors
    /// A number that JSON cannot carry.
    pub fn to_bytes(&self) -> Result<Vec<u8>, EvaluationError> {
        let bytes = serde_json::to_vec(self).map_err(|error| EvaluationError(error.to_string()))?;
        Self::parse(&bytes).map(|_| bytes)
    }
}
