//! Requests to the one server: bodies out, bounded bodies in, patience with a server that is busy.
//!
//! No proxy of the environment is used and no redirect followed, so that the only address ever dialled is the configured
//! one.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Error};

use super::error::ScorerError;
use super::settings::ServerSettings;

/// Tries of one request.
const TRIES: u32 = 6;
/// Longest wait that a server may ask for.
const MOST_WAIT: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Steps in which waits look for a reason to stop.
const STEP: Duration = Duration::from_millis(100);
/// Longest key file and PEM file in bytes.
const FILE: u64 = 1 << 20;
/// Bytes of a refusal that are quoted.
const QUOTED: usize = 500;
/// Bytes of a refusal that are read.
const REFUSAL: u64 = 64 * 1024;

/// A client of one endpoint.
pub(super) struct Client {
    agent: Agent,
    url: String,
    /// Value of the header; a secret.
    authorization: Option<String>,
    /// Wait before the second try; doubles with each.
    wait: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Reads key and authorities; dials nothing yet.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub(super) fn new(settings: &ServerSettings, wait: Duration) -> Result<Self, ScorerError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = TlsConfig::builder().unversioned_rustls_crypto_provider(provider);
        if let Some(path) = &settings.ca {
            tls = tls.root_certs(authorities(path)?);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls.build())
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(settings.timeout))
            .user_agent(concat!("consilium-node/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            agent: config.into(),
            url: settings.url.endpoint(settings.kind),
            authorization: settings.key_file.as_deref().map(bearer).transpose()?,
            wait,
        })
    }

    /// The endpoint.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a body and returns the response's, of at most `limit` bytes. A server that is busy (429, 503) or away is asked
    /// again, each time after twice the wait.
    ///
    /// # Errors
    /// What the server or the network says, or `stop`.
    pub(super) fn post(
        &self,
        body: &[u8],
        limit: u64,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<u8>, ScorerError> {
        let mut wait = self.wait;
        for attempt in 1.. {
            if stop() {
                return Err(ScorerError::Stopped);
            }
            let (error, asked) = match self.send(body, limit) {
                Ok(bytes) => return Ok(bytes),
                Err(Failure { error, again: None }) => return Err(*error),
                Err(Failure {
                    error,
                    again: Some(asked),
                }) => (error, asked),
            };
            if attempt == TRIES {
                return Err(*error);
            }
            let pause = asked.unwrap_or(wait).min(MOST_WAIT);
            tracing::warn!(%error, attempt, ?pause, "asks again");
            pause_for(pause, stop);
            wait = wait.saturating_mul(2);
        }
        Err(ScorerError::Stopped)
    }

    fn send(&self, body: &[u8], limit: u64) -> Result<Vec<u8>, Failure> {
        let mut request = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json")
            .header("accept", "application/json");
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        let mut response = request.send(body).map_err(|error| self.broken(&error))?;
        let status = response.status().as_u16();
        if status == 200 {
            let bytes = response.body_mut().with_config().limit(limit).read_to_vec();
            return bytes.map_err(|error| self.broken(&error));
        }
        let asked = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let said = response
            .body_mut()
            .with_config()
            .limit(REFUSAL)
            .read_to_vec();
        let said = words(&said.unwrap_or_default());
        let again = matches!(status, 429 | 503).then_some(asked);
        let fix = fix(status, &said);
        let url = self.url.clone();
        let error = ScorerError::Refused {
            url,
            status,
            said,
            fix: fix.to_owned(),
        };
        let error = Box::new(error);
        Err(Failure { error, again })
    }

    fn broken(&self, error: &Error) -> Failure {
        let (fix, again) = match error {
            Error::ConnectionFailed | Error::HostNotFound => ("; is the server up?", true),
            Error::Io(cause) if is_refusal(cause) => ("; is the server up?", true),
            Error::Io(cause) if is_tls(cause) => (
                "; does source_server.ca hold the authority of the server's certificate?",
                false,
            ),
            Error::Timeout(_) => (
                "; raise source_server.timeout_seconds, or lower source_server.prompts",
                true,
            ),
            Error::BodyExceedsLimit(_) => (
                "; that is more than the tokens asked for can take, is this the right server?",
                false,
            ),
            _ => ("", false),
        };
        let error = ScorerError::Transport {
            url: self.url.clone(),
            problem: error.to_string(),
            fix: fix.to_owned(),
        };
        Failure {
            error: Box::new(error),
            again: again.then_some(None),
        }
    }
}

/// A failed try.
struct Failure {
    error: Box<ScorerError>,
    /// Whether another try may help, and the wait that the server asked for.
    again: Option<Option<Duration>>,
}

fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionRefused | ConnectionReset | ConnectionAborted
    )
}

fn is_tls(error: &io::Error) -> bool {
    let Some(cause) = error.get_ref() else {
        return false;
    };
    cause.is::<rustls::Error>()
}

/// The flag or setting that a refusal asks for, with a separator in front.
fn fix(status: u16, said: &str) -> &'static str {
    let has = |part: &str| said.contains(part);
    match status {
        _ if has("greater than max allowed") => {
            "; start vLLM with --max-logprobs of at least source_server.top, or lower source_server.top"
        }
        _ if has("VLLM_MAX_COMPLETION_PROMPTS") => "; lower source_server.prompts",
        _ if has("context length") || has("max_model_len") || has("longer than") => {
            "; start the server with a longer --max-model-len or --context-length, or lower source_server.max_tokens"
        }
        401 | 403 => "; put the key that the server was started with into source_server.key_file",
        404 => {
            "; source_server.model must be a name that the server serves, and source_server.kind what it speaks"
        }
        300..=399 => "; redirects are not followed, name the server itself in source_server.url",
        500 => {
            "; the server's own log says why; out of memory is usual, lower source_server.prompts or source_server.top"
        }
        _ => "",
    }
}

/// The server's own words: the message of its JSON error if it is one, cut.
fn words(bytes: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
    let message = parsed.as_ref().and_then(|value| {
        let places = [
            &value["error"]["message"],
            &value["message"],
            &value["detail"],
            &value["error"],
        ];
        places.into_iter().find_map(|place| place.as_str())
    });
    let text = message.map_or_else(|| String::from_utf8_lossy(bytes), Into::into);
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(QUOTED)
        .collect();
    if text.trim().is_empty() {
        "nothing".to_owned()
    } else {
        text
    }
}

/// Waits without a clock: on a channel on which nothing is sent.
fn pause_for(pause: Duration, stop: &(dyn Fn() -> bool + Sync)) {
    let (_sender, nothing) = mpsc::channel::<()>();
    let mut left = pause;
    while !left.is_zero() && !stop() {
        let step = STEP.min(left);
        let _ = nothing.recv_timeout(step);
        left = left.saturating_sub(step);
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ScorerError> {
    let file = |problem: String| ScorerError::File {
        path: path.to_owned(),
        problem,
    };
    let length = std::fs::metadata(path)
        .map_err(|error| file(format!("cannot read: {error}")))?
        .len();
    if length > FILE {
        return Err(file(format!("{length} bytes, expected at most {FILE}")));
    }
    std::fs::read(path).map_err(|error| file(format!("cannot read: {error}")))
}

fn authorities(path: &Path) -> Result<RootCerts, ScorerError> {
    let bytes = read(path)?;
    let mut certificates = Vec::new();
    for item in parse_pem(&bytes) {
        match item {
            Ok(PemItem::Certificate(certificate)) => certificates.push(certificate),
            Ok(_) => {}
            Err(error) => {
                return Err(ScorerError::File {
                    path: path.to_owned(),
                    problem: format!("not PEM: {error}"),
                });
            }
        }
    }
    if certificates.is_empty() {
        return Err(ScorerError::File {
            path: path.to_owned(),
            problem: "holds no certificate; expected PEM blocks of type CERTIFICATE".to_owned(),
        });
    }
    Ok(RootCerts::from(certificates))
}

/// The header's value. The text of an error never holds the key.
fn bearer(path: &Path) -> Result<String, ScorerError> {
    let bytes = read(path)?;
    let key = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ScorerError::File {
            path: path.to_owned(),
            problem: "expected the server's key on one line, printable ASCII without spaces"
                .to_owned(),
        });
    }
    Ok(format!("Bearer {key}"))
}
