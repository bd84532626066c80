//! What the kernel lets the scorer touch, by Landlock: the spool, the few files of the source that it reads, and TCP
//! connections to the server's port. A path of private data would be of no use to it.
//!
//! Kernels before 5.13 know nothing of this, before 6.7 nothing of ports; the log says how much holds.

use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, path_beneath_rules,
};

use super::error::ScorerError;
use super::jobs::ScorerSettings;
use crate::worker::WorkError;

/// Rights that are asked for; older kernels give what they have.
const VERSION: ABI = ABI::V5;
/// Port of name servers, where a long answer comes over TCP.
const NAMES: u16 = 53;
/// Files and libraries with which the system resolves names.
const SYSTEM: [&str; 10] = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// Files of a model folder from which tokenizer and chat template are built.
const SOURCE: [&str; 5] = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Confines the calling thread and all that it starts from now on. The spool must be there.
///
/// # Errors
/// The kernel knows Landlock and refuses.
pub(super) fn confine(settings: &ScorerSettings) -> Result<RulesetStatus, ScorerError> {
    restrict(settings).map_err(|error| {
        let source = std::io::Error::other(error);
        let doing = "confine the scorer";
        WorkError::Process { doing, source }.into()
    })
}

fn restrict(settings: &ScorerSettings) -> Result<RulesetStatus, RulesetError> {
    let server = &settings.server;
    let mut readable: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    // A rule is about the file behind a link, as in the cache of the Hugging Face hub.
    readable.extend(SOURCE.iter().map(|name| settings.source.join(name)));
    readable.extend(server.key_file.clone());
    readable.extend(server.ca.clone());
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::from_all(VERSION))?
        .create()?
        .add_rules(path_beneath_rules(readable, AccessFs::from_read(VERSION)))?
        .add_rules(path_beneath_rules(
            [&settings.spool],
            AccessFs::from_all(VERSION),
        ))?
        .add_rule(NetPort::new(server.url.port(), AccessNet::ConnectTcp))?
        .add_rule(NetPort::new(NAMES, AccessNet::ConnectTcp))?
        .restrict_self()?;
    Ok(status.ruleset)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::scorer::{RawServer, ServerKind};

    #[test]
    fn a_confined_scorer_opens_neither_private_files_nor_other_ports() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["spool", "source"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("holdout.jsonl"), "private").unwrap();
        fs::write(at("source/model.safetensors"), "weights").unwrap();
        fs::write(at("blob"), "{}").unwrap();
        std::os::unix::fs::symlink(at("blob"), at("source/tokenizer.json")).unwrap();
        let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (server, other) = (listener(), listener());
        let address = |listener: &TcpListener| listener.local_addr().unwrap();
        let raw = RawServer {
            kind: ServerKind::Sglang,
            url: format!("http://{}", address(&server)),
            model: None,
            top: None,
            concurrency: None,
            prompts: None,
            max_tokens: None,
            timeout_seconds: None,
            key_file: None,
            ca: None,
        };
        let settings = ScorerSettings {
            spool: at("spool"),
            source: at("source"),
            chat_template: false,
            server: raw.check().unwrap(),
        };
        // Confinement is for ever; it ends with the thread.
        let status = std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let status = confine(&settings).unwrap();
                if status == RulesetStatus::NotEnforced {
                    return status;
                }
                assert!(File::open(at("source/tokenizer.json")).is_ok());
                assert!(fs::write(at("spool/new"), "x").is_ok());
                assert!(TcpStream::connect(address(&server)).is_ok());
                for private in ["holdout.jsonl", "source/model.safetensors"] {
                    assert!(File::open(at(private)).is_err(), "{private}");
                }
                assert!(fs::write(at("beside"), "x").is_err());
                if status == RulesetStatus::FullyEnforced {
                    assert!(TcpStream::connect(address(&other)).is_err());
                    assert!(TcpListener::bind("127.0.0.1:0").is_err());
                }
                status
            });
            inside.join().unwrap()
        });
        assert!(File::open(at("holdout.jsonl")).is_ok(), "of this thread");
        println!("Landlock: {status:?}");
    }
}
