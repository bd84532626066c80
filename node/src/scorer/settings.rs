//! Which server scores, and how it is asked. Checked once; later code takes the built types.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use ureq::http::Uri;

/// What the server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ServerKind {
    /// vLLM: `POST /v1/completions` with `prompt_logprobs`.
    Vllm,
    /// SGLang: `POST /generate` with `top_logprobs_num`.
    Sglang,
}

impl ServerKind {
    /// As it is written in files and options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }

    /// Path of the endpoint under the server's root.
    pub(super) const fn endpoint(self) -> &'static str {
        match self {
            Self::Vllm => "/v1/completions",
            Self::Sglang => "/generate",
        }
    }
}

impl fmt::Display for ServerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Root of a server: `http` or `https`, a host, no user, query or fragment. Written without a `/v1` or `/` at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl {
    root: String,
    secure: bool,
    local: bool,
    port: u16,
}

impl ServerUrl {
    /// The TCP port.
    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    /// The address of an endpoint.
    pub(super) fn endpoint(&self, kind: ServerKind) -> String {
        format!("{}{}", self.root, kind.endpoint())
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.root)
    }
}

impl FromStr for ServerUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected http://host:port or https://host:port, as the server prints it when it starts";
        let uri: Uri = text.parse().map_err(|_| expected)?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(expected),
        };
        let authority = uri.authority().ok_or(expected)?;
        if authority.as_str().contains('@') {
            return Err(
                "a password in an address ends up in logs; put the key into a file, see key_file",
            );
        }
        if uri.query().is_some() || text.contains('#') || authority.host().is_empty() {
            return Err(expected);
        }
        let root = text.trim_end_matches('/');
        let root = root.strip_suffix("/v1").unwrap_or(root);
        let host = authority.host().trim_matches(['[', ']']);
        let local = host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback());
        Ok(Self {
            root: root.to_owned(),
            secure,
            local,
            port: authority
                .port_u16()
                .unwrap_or(if secure { 443 } else { 80 }),
        })
    }
}

/// A server that scores in place of the source's own weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// What it speaks.
    pub kind: ServerKind,
    /// Where it listens; no other address is ever connected to.
    pub url: ServerUrl,
    /// Name under which it serves the source; SGLang needs none.
    pub model: Option<String>,
    /// Likeliest tokens asked for at each position (K), 1 to 4096.
    pub top: u32,
    /// Requests on their way at once, 1 to 64.
    pub concurrency: u16,
    /// Prompts of one request, 1 to 256.
    pub prompts: u16,
    /// Longest prompt in tokens, 16 to 131072.
    pub max_tokens: u32,
    /// Longest wait for one response, 1 second to 1 hour.
    pub timeout: Duration,
    /// File with the bearer token, one line.
    pub key_file: Option<PathBuf>,
    /// PEM file of the authorities that may have signed the server's certificate; `https` needs it.
    pub ca: Option<PathBuf>,
}

/// The same as it is written: the table `[source_server]`, and the options of the `scorer` command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Args)]
#[serde(deny_unknown_fields)]
pub struct RawServer {
    /// What the server speaks.
    #[arg(long, value_enum)]
    pub kind: ServerKind,
    /// Where it listens, as `http://host:port`; no other address is ever connected to.
    #[arg(long)]
    pub url: String,
    /// Name under which it serves the source; SGLang needs none.
    #[arg(long)]
    pub model: Option<String>,
    /// Likeliest tokens asked for at each position, 1 to 4096; 64 without it.
    #[arg(long)]
    pub top: Option<u32>,
    /// Requests on their way at once, 1 to 64; 4 without it.
    #[arg(long)]
    pub concurrency: Option<u16>,
    /// Prompts of one request, 1 to 256; 8 without it.
    #[arg(long)]
    pub prompts: Option<u16>,
    /// Longest prompt in tokens; 2048 without it, because long prompts times many tokens fill a server's memory.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Longest wait for one response, 1 to 3600; 300 without it.
    #[arg(long)]
    pub timeout_seconds: Option<u32>,
    /// File with the server's key, one line.
    #[arg(long)]
    pub key_file: Option<PathBuf>,
    /// PEM file of the authorities that may have signed the server's certificate; https needs it.
    #[arg(long)]
    pub ca: Option<PathBuf>,
}

/// A value that is out of range: the key, what stands there, what may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongValue {
    /// The key.
    pub key: &'static str,
    /// What stands there.
    pub value: String,
    /// What may stand there.
    pub expected: String,
}

impl RawServer {
    /// The same with paths that start at `folder`.
    #[must_use]
    pub fn within(self, folder: &Path) -> Self {
        let at = |path: PathBuf| folder.join(path);
        Self {
            key_file: self.key_file.map(at),
            ca: self.ca.map(at),
            ..self
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn check(self) -> Result<ServerSettings, WrongValue> {
        let wrong = |key, value: &dyn fmt::Display, expected: &str| WrongValue {
            key,
            value: value.to_string(),
            expected: expected.to_owned(),
        };
        let url: ServerUrl = self
            .url
            .parse()
            .map_err(|problem| wrong("url", &format!("{:?}", self.url), problem))?;
        match (self.kind, self.model.as_deref()) {
            (ServerKind::Vllm, None | Some("")) => {
                let expected =
                    "the name under which vLLM serves the model, see --served-model-name";
                return Err(wrong("model", &"absent", expected));
            }
            (_, Some(name)) if name.len() > 512 || name.contains(char::is_control) => {
                return Err(wrong("model", &"unusable", "a name of at most 512 bytes"));
            }
            _ => {}
        }
        if url.secure && self.ca.is_none() {
            let expected = "a PEM file of the authority that signed the server's certificate; the \
                            system's are in /etc/ssl/certs/ca-certificates.crt on Debian";
            return Err(wrong("ca", &"absent", expected));
        }
        if self.key_file.is_some() && !url.secure && !url.local {
            let expected = "https, or no key_file: http would show the key to the network";
            return Err(wrong("url", &self.url, expected));
        }
        let ranged =
            |key, value: Option<u32>, default: u32, range: std::ops::RangeInclusive<u32>| {
                let value = value.unwrap_or(default);
                if range.contains(&value) {
                    return Ok(value);
                }
                let expected = format!("{} to {}", range.start(), range.end());
                Err(wrong(key, &value, &expected))
            };
        let small = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let top = ranged("top", self.top, 64, 1..=4096)?;
        let concurrency = ranged("concurrency", self.concurrency.map(u32::from), 4, 1..=64)?;
        let prompts = ranged("prompts", self.prompts.map(u32::from), 8, 1..=256)?;
        let timeout = ranged("timeout_seconds", self.timeout_seconds, 300, 1..=3600)?;
        Ok(ServerSettings {
            kind: self.kind,
            url,
            model: self.model,
            top,
            concurrency: small(concurrency),
            prompts: small(prompts),
            max_tokens: ranged("max_tokens", self.max_tokens, 2048, 16..=131_072)?,
            timeout: Duration::from_secs(timeout.into()),
            key_file: self.key_file,
            ca: self.ca,
        })
    }
}

impl ServerSettings {
    /// Options of the `scorer` command that say the same.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        option("--kind", self.kind.name().into());
        option("--url", self.url.to_string().into());
        if let Some(model) = &self.model {
            option("--model", model.into());
        }
        option("--top", self.top.to_string().into());
        option("--concurrency", self.concurrency.to_string().into());
        option("--prompts", self.prompts.to_string().into());
        option("--max-tokens", self.max_tokens.to_string().into());
        let seconds = self.timeout.as_secs().to_string();
        option("--timeout-seconds", seconds.into());
        if let Some(path) = &self.key_file {
            option("--key-file", path.into());
        }
        if let Some(path) = &self.ca {
            option("--ca", path.into());
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RawServer {
        RawServer {
            kind: ServerKind::Vllm,
            url: "http://127.0.0.1:8000/v1/".into(),
            model: Some("big".into()),
            top: None,
            concurrency: None,
            prompts: None,
            max_tokens: None,
            timeout_seconds: None,
            key_file: None,
            ca: None,
        }
    }

    #[test]
    fn an_endpoint_is_under_the_servers_root_with_or_without_v1() {
        for url in [
            "http://[::1]:8000",
            "http://[::1]:8000/",
            "http://[::1]:8000/v1",
        ] {
            let url: ServerUrl = url.parse().unwrap();
            assert_eq!(
                url.endpoint(ServerKind::Vllm),
                "http://[::1]:8000/v1/completions"
            );
            assert!(url.local && !url.secure);
        }
        let url: ServerUrl = "https://gpu.site.example/models/big".parse().unwrap();
        assert_eq!(
            url.endpoint(ServerKind::Sglang),
            "https://gpu.site.example/models/big/generate"
        );
        assert!(url.secure && !url.local);
    }

    #[test]
    fn every_wrong_value_names_its_key_and_what_may_stand_there() {
        /// A change, the key it spoils, and what the message says of it.
        type Case<'a> = (&'a dyn Fn(&mut RawServer), &'a str, &'a str);
        let key = Some(PathBuf::from("key"));
        let with = |change: &dyn Fn(&mut RawServer)| {
            let mut raw = raw();
            change(&mut raw);
            raw.check()
        };
        assert_eq!(with(&|_| {}).unwrap().top, 64);
        let cases: [Case<'_>; 12] = [
            (
                &|raw| raw.url = "gpu:8000".into(),
                "url",
                "http://host:port",
            ),
            (
                &|raw| raw.url = "ftp://gpu".into(),
                "url",
                "http://host:port",
            ),
            (
                &|raw| raw.url = "http://gpu/?a=b".into(),
                "url",
                "http://host:port",
            ),
            (
                &|raw| raw.url = "http://me:pw@gpu".into(),
                "url",
                "key_file",
            ),
            (&|raw| raw.url = "https://gpu".into(), "ca", "PEM file"),
            (&|raw| raw.model = None, "model", "--served-model-name"),
            (&|raw| raw.top = Some(0), "top", "1 to 4096"),
            (&|raw| raw.top = Some(4097), "top", "1 to 4096"),
            (&|raw| raw.concurrency = Some(65), "concurrency", "1 to 64"),
            (&|raw| raw.prompts = Some(0), "prompts", "1 to 256"),
            (
                &|raw| raw.max_tokens = Some(15),
                "max_tokens",
                "16 to 131072",
            ),
            (
                &|raw| raw.timeout_seconds = Some(0),
                "timeout_seconds",
                "1 to 3600",
            ),
        ];
        for (change, key, fix) in cases {
            let wrong = with(change).unwrap_err();
            assert_eq!(wrong.key, key);
            assert!(wrong.expected.contains(fix), "{key}: {}", wrong.expected);
        }
        let far = with(&|raw| {
            raw.url = "http://gpu:8000".into();
            raw.key_file = key.clone();
        });
        assert!(far.unwrap_err().expected.contains("https"));
        assert!(with(&|raw| raw.key_file = key.clone()).is_ok(), "loopback");
    }
}
