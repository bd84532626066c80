//! The server as one value: prompts in, listed log-probabilities out, several requests at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use consilium_protocol::Clock as _;
use consilium_protocol::time::SystemClock;
use rayon::prelude::*;

use super::answer::{Answer, Pairs, Prompt};
use super::client::Client;
use super::error::ScorerError;
use super::settings::{ServerKind, ServerSettings};
use super::{sglang, vllm};
use crate::worker::WorkError;

/// Bytes of one listed token in a response, with its text, escapes included: more than any that was seen.
const ENTRY: u64 = 512;
/// Bytes of a response beside its lists.
const REST: u64 = 1 << 20;

/// Whether to go on; asked between requests, from several threads.
pub(super) type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

/// A server and how it is asked.
#[derive(Debug)]
pub(super) struct Server {
    client: Client,
    settings: ServerSettings,
    /// Requests at once, each on a thread that waits.
    pool: rayon::ThreadPool,
    /// Makes salts that no other request has.
    started: u64,
    requests: AtomicU64,
}

impl Server {
    /// Reads key and authorities; dials nothing yet. `wait` comes before the second try of a request.
    ///
    /// # Errors
    /// A file that cannot be used, or no threads.
    pub(super) fn new(settings: &ServerSettings, wait: Duration) -> Result<Self, ScorerError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(settings.concurrency.into())
            .build()
            .map_err(|error| WorkError::Process {
                doing: "start threads",
                source: std::io::Error::other(error),
            })?;
        Ok(Self {
            client: Client::new(settings, wait)?,
            settings: settings.clone(),
            pool,
            started: SystemClock.now().0,
            requests: AtomicU64::new(0),
        })
    }

    /// The endpoint.
    pub(super) fn url(&self) -> &str {
        self.client.url()
    }

    /// Requests so far, repeated tries not counted.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Prompts that are on their way at once.
    pub(super) fn width(&self) -> usize {
        usize::from(self.settings.concurrency) * usize::from(self.settings.prompts)
    }

    /// One request; `texts` asks for what the listed tokens spell.
    ///
    /// # Errors
    /// The server, the network, a response that is not what was asked for, or `stop`.
    pub(super) fn ask(
        &self,
        prompts: &[Prompt],
        top: u32,
        texts: bool,
        stop: Stop<'_>,
    ) -> Result<Answer, ScorerError> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let body = match self.settings.kind {
            ServerKind::Vllm => {
                let salt = format!("consilium-{}-{}-{number}", self.started, std::process::id());
                let model = self.settings.model.as_deref().unwrap_or_default();
                vllm::request(model, prompts, top, &salt)
            }
            ServerKind::Sglang => sglang::request(prompts, top, texts),
        };
        let tokens: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        let entries = u64::from(top)
            .saturating_add(2)
            .saturating_mul(tokens as u64);
        let limit = entries.saturating_mul(ENTRY).saturating_add(REST);
        let bytes = self.client.post(&body, limit, stop)?;
        let parsed = match self.settings.kind {
            ServerKind::Vllm => vllm::parse(&bytes, prompts),
            ServerKind::Sglang => sglang::parse(&bytes, prompts),
        };
        parsed.map_err(|problem| ScorerError::Response {
            url: self.url().to_owned(),
            problem,
        })
    }

    /// Rows of all prompts, in order, cut into requests of which several run at once.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(super) fn ask_all(
        &self,
        prompts: &[Prompt],
        top: u32,
        stop: Stop<'_>,
    ) -> Result<Vec<Vec<Pairs>>, ScorerError> {
        let size = usize::from(self.settings.prompts);
        let answers: Vec<Answer> = self.pool.install(|| {
            prompts
                .par_chunks(size)
                .map(|prompts| self.ask(prompts, top, false, stop))
                .collect::<Result<_, _>>()
        })?;
        Ok(answers.into_iter().flat_map(|answer| answer.rows).collect())
    }
}
