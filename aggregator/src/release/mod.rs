//! Releases: the gate that a candidate passes, and the signed folder that is published.

mod card;
mod error;
mod gate;
mod publish;
mod signature;

pub use error::ReleaseError;
pub use gate::{Baseline, SiteVerdict, Verdict, judge};
pub use publish::{Artefact, PROOF, Release, ReleaseInput, publish};
pub use signature::{ReleaseKey, SIGNATURE, verify};
