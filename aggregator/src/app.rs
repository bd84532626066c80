//! A running aggregator, put together from its configuration.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use consilium_certs::{SigningIdentity, folder};
use consilium_protocol::artefact::{folder_digest, is_model_file};
use consilium_protocol::quic::{Credentials, Server, ServerLimits, Tasks};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::time::SystemClock;
use consilium_protocol::transcript::key::{NoteSigner, SignatureKind};
use consilium_protocol::{Digest, RejectCode};

use crate::config::{Config, ConfigError, read};
use crate::log::Log;
use crate::release::ReleaseKey;
use crate::rounds::{Bench, Driver, Setup, State};
use crate::server::{self, Shared};
use crate::store::{Blobs, Index};

const GRACE: Duration = Duration::from_secs(10);
/// Connections beyond one for each member.
const SPARE_CONNECTIONS: usize = 16;

/// Runs the server until a signal ends it.
///
/// # Errors
/// A file is missing or wrong, the log does not verify, or the port is taken.
pub async fn serve(config: &Config) -> Result<()> {
    let _lock = lock(&config.data_dir)?;
    let (charter, charter_bytes, charter_digest) = config.charter()?;
    let credentials = Credentials::load(&config.identity)?;
    let limits = ServerLimits {
        connections: charter.members.len() * 2 + SPARE_CONNECTIONS,
    };
    let server = Server::bind(config.listen, credentials, limits)?;
    let listening = server.local_address()?;

    let reference_bytes = read(&config.reference)?;
    let reference = ReferenceSet::parse(&reference_bytes)
        .map_err(|error| ConfigError::content(&config.reference, error))?;
    let blobs = Blobs::open(&config.data_dir)?;
    let charter_blob = blobs.put_bytes(&charter_bytes)?;
    let reference_blob = blobs.put_bytes(&reference_bytes)?;
    let log = Log::open(
        &config.data_dir.join("log"),
        signer(config, &charter.log_key)?,
    )?;
    let index = Index::open(&config.data_dir.join("index"), log.entries())?;
    let bench = Arc::new(Bench {
        blobs,
        charter: charter.clone(),
        reference,
        releases: config.data_dir.join("releases"),
        release: config.release.clone(),
        release_key: ReleaseKey::open(&config.data_dir.join("release.key"))?,
    });
    let setup = Setup {
        data_dir: config.data_dir.clone(),
        pivot: config.pivot.clone(),
        pivot_digest: digest_of_model(&config.pivot)?,
        charter_digest,
        signer: signer(config, &charter.log_key)?,
        listening: listening.to_string(),
    };
    let state = State::load(
        setup,
        Arc::clone(&bench),
        log,
        index,
        [charter_blob, reference_blob],
    )?;

    let tasks = Tasks::new();
    let driver = Driver::start(state, Arc::new(SystemClock), &tasks);
    let shared = Shared::new(&charter, charter_digest, driver, bench);
    let serving = server::serve(server.clone(), shared, tasks.clone());
    tasks.spawn("server", serving);
    // Under a temporary name first: whoever waits for the file finds a whole line.
    let address = config.data_dir.join("address");
    std::fs::write(address.with_extension("tmp"), format!("{listening}\n"))?;
    std::fs::rename(address.with_extension("tmp"), &address)?;
    tracing::info!(%listening, consortium = %config.consortium, "listening");

    signalled().await?;
    tracing::info!("shutting down");
    server.close(RejectCode::ShuttingDown, GRACE).await;
    let report = tasks.shutdown(GRACE).await;
    if !report.is_clean() {
        tracing::warn!(?report, "not everything ended by itself");
    }
    Ok(())
}

/// Rebuilds the index from log and blobs; the server must not be running.
///
/// # Errors
/// The server runs, or the log does not verify.
pub fn reindex(config: &Config) -> Result<u64> {
    let _lock = lock(&config.data_dir)?;
    let (charter, ..) = config.charter()?;
    let log = Log::open(
        &config.data_dir.join("log"),
        signer(config, &charter.log_key)?,
    )?;
    let folder = config.data_dir.join("index");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("{}: cannot be removed", folder.display()))?;
    }
    let index = Index::open(&folder, log.entries())?;
    Ok(index.slots()?)
}

fn signer(config: &Config, log_key: &str) -> Result<NoteSigner> {
    let path = config.identity.join(folder::SIGNING_KEY);
    let signer = SigningIdentity::load(&path)?.note_signer(
        &folder::log_key_name(&config.consortium),
        SignatureKind::Ed25519,
    )?;
    if signer.verifier().to_string() != log_key {
        bail!(
            "{}: is not the key that the charter names as log_key ({log_key}); use that key or have the charter changed",
            path.display()
        );
    }
    Ok(signer)
}

fn digest_of_model(folder: &Path) -> Result<Digest> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(folder).with_context(|| {
        format!(
            "{}: cannot be read; `pivot` must be a model folder",
            folder.display()
        )
    })?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_model_file(&name) {
            let path = entry.path();
            let digest = File::open(&path).and_then(Digest::of_reader);
            let digest = digest.with_context(|| format!("{}: cannot be read", path.display()))?;
            files.push((name, digest));
        }
    }
    if files.is_empty() {
        bail!(
            "{}: holds no config.json, tokenizer.json and *.safetensors",
            folder.display()
        );
    }
    Ok(folder_digest(&files))
}

/// Two servers on one data folder would each believe that the log is theirs.
fn lock(data_dir: &Path) -> Result<File> {
    std::fs::create_dir_all(data_dir)
        .with_context(|| format!("{}: cannot be made", data_dir.display()))?;
    let path: PathBuf = data_dir.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "{}: another aggregator uses this data folder",
                data_dir.display()
            )
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

async fn signalled() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
