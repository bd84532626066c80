//! Opening a round: from the operator's request to the first entry in the log.

use consilium_protocol::decoys::DecoyKey;
use consilium_protocol::event::Event;
use consilium_protocol::manifest::{Manifest, Training};
use consilium_protocol::transcript::note::SignedNote;
use consilium_protocol::{Digest, RoundId, UnixMillis};

use super::request::{self, Given, OpenRequest, OpenResponse};
use super::state::{State, is_over};
use crate::fusion;

impl State {
    /// Opens the rounds that the operator asked for. True if one was opened.
    pub fn open_requested_rounds(&mut self, at: UnixMillis) -> bool {
        let waiting = match request::waiting(&self.setup.data_dir) {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::warn!(%error, "the folder of requests cannot be read");
                return false;
            }
        };
        let mut opened = false;
        for (path, request) in waiting {
            let response = match request.and_then(|request| self.open(at, request)) {
                Ok((round, manifest)) => {
                    opened = true;
                    OpenResponse::Opened { round, manifest }
                }
                Err(problem) => OpenResponse::Refused { problem },
            };
            let answered = request::write_atomically(&request::response_path(&path), &response)
                .and_then(|()| std::fs::remove_file(&path));
            if let Err(error) = answered {
                tracing::warn!(%error, "a request could not be answered");
            }
        }
        opened
    }

    fn open(
        &mut self,
        at: UnixMillis,
        mut request: OpenRequest,
    ) -> Result<(RoundId, Digest), String> {
        if let Some(active) = &self.active
            && !is_over(active.round.phase())
        {
            return Err(format!(
                "round {} is still open; wait for its end",
                active.round.manifest().round
            ));
        }
        // A release on another pivot is no measure for this one.
        let last_release = self
            .last_release
            .clone()
            .filter(|last| last.pivot == self.setup.pivot_digest);
        let reference = &self.bench.reference;
        if request.screening.decoys.is_some() {
            return Err(
                "screening.decoys follows from the key; give the key with --decoys".to_owned(),
            );
        }
        request.screening.decoys = self.decoy_key(request.decoy_key.take())?;
        let manifest = request::manifest(
            request,
            Given {
                charter: self.bench.charter.clone(),
                charter_digest: self.setup.charter_digest,
                round: RoundId(self.rounds.saturating_add(1)),
                pivot: self.setup.pivot_digest,
                reference: reference.digest(),
                items: u64::try_from(reference.items().len()).unwrap_or(u64::MAX),
                previous_release: last_release.as_ref().map(|last| last.release),
            },
        );
        let text = |error: &dyn std::fmt::Display| error.to_string();
        manifest
            .obeys(&self.bench.charter)
            .map_err(|error| text(&error))?;
        fusion::check_reference(&manifest, reference).map_err(|error| text(&error))?;
        let note = SignedNote::sign(
            manifest.to_text().map_err(|error| text(&error))?,
            &self.setup.signer,
        )
        .map_err(|error| text(&error))?;
        let blobs = &self.bench.blobs;
        let digest = blobs
            .put_bytes(note.to_string().as_bytes())
            .map_err(|error| text(&error))?;
        let start = match last_release {
            Some(last) if has_same_tensors(&last.training, &manifest.training) => last.adapter,
            _ => self.untrained(&manifest)?,
        };
        let round = manifest.round;
        self.active = None;
        self.rounds = round.0;
        self.record(
            at,
            &Event::Opened {
                manifest: digest,
                start,
            },
        )
        .map_err(|error| text(&error))?;
        Ok((round, digest))
    }

    /// Stores the key of the decoys, which nobody may fetch until the records are closed.
    fn decoy_key(&self, key: Option<String>) -> Result<Option<Digest>, String> {
        let Some(key) = key else { return Ok(None) };
        DecoyKey::parse(key.as_bytes(), &self.bench.reference)
            .map_err(|error| error.to_string())?;
        let stored = self.bench.blobs.put_bytes(key.as_bytes());
        stored.map(Some).map_err(|error| error.to_string())
    }

    /// Stores an untrained adapter on the pivot.
    fn untrained(&self, manifest: &Manifest) -> Result<Digest, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let (pivot, blobs) = (&self.setup.pivot, &self.bench.blobs);
        let draft = blobs.draft().map_err(|error| text(&error))?;
        fusion::initial_adapter(pivot, &manifest.training, manifest.seed, draft.file())
            .map_err(|error| text(&error))?;
        blobs.keep(draft).map_err(|error| text(&error))
    }
}

/// Whether an adapter of one can be trained on as one of the other, and means the same.
fn has_same_tensors(a: &Training, b: &Training) -> bool {
    a.merge.keeps_rank()
        && (a.rank, a.alpha) == (b.rank, b.alpha)
        && a.target_modules == b.target_modules
        && a.modules_to_save == b.modules_to_save
}
