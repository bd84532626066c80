//! The folder that the two halves of a node share, and the only thing they share.
//!
//! The agent writes jobs, the worker writes results, both write blobs; every file is complete the moment it has its name
//! (temporary file, fsync, rename, fsync of the folder), so either half may be killed at any time.
//!
//! | folder | file | written by |
//! |---|---|---|
//! | `jobs` | `<job id>.json`: a [`Job`] | agent |
//! | `results` | `<job id>.json`: an [`Outcome`] | worker |
//! | `blobs` | `<sha256>`: reference set, targets, adapters, shards, evaluations | both |
//! | `state` | what each half keeps for itself across restarts | its owner |
//!
//! A job's name follows from its content: submitting it again changes nothing, and a job of the same slot with other
//! content is another job.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use consilium_protocol::manifest::Training;
use consilium_protocol::message::Part;
use consilium_protocol::time::SystemClock;
use consilium_protocol::{Clock as _, Digest, RoundId, UnixMillis};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Longest job file in bytes: room for the digests of a hundred thousand target shards.
const JOB_LIMIT: u64 = 16 << 20;
/// Longest result file in bytes.
const RESULT_LIMIT: u64 = 64 * 1024;
/// Pause between two looks into a folder.
const POLL: Duration = Duration::from_millis(50);
/// A temporary file this old was left by a process that is gone.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the spool cannot be used, or holds something that does not belong there.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A file or folder cannot be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A job or result that cannot be used.
    #[error("{} is malformed: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A blob's bytes are not those of its name.
    #[error("{} holds bytes with digest {got}; it is damaged, delete it and it is made again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Digest of its bytes.
        got: Digest,
    },
}

/// Name of a job, which follows from its content.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(String);

impl JobId {
    /// The name as text: `r<round>-<kind>-<sequence>-<digest of the content, shortened>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Work for the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Job {
    /// Score one shard of the reference set with the source; the artefact is a shard of records.
    Score(ScoreJob),
    /// Train the pivot's adapter for one inner round; the artefact is a PEFT adapter file.
    Distil(DistilJob),
    /// Measure a candidate on the private holdout; the artefact is an evaluation document.
    Evaluate(EvaluateJob),
}

/// One shard to score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreJob {
    /// Round it is for.
    pub round: RoundId,
    /// Index of the shard.
    pub shard: u32,
    /// Items of the reference set that the shard covers, the end excluded.
    pub items: Range<u64>,
    /// The reference set, a blob.
    pub reference: Digest,
    /// Symbol slots of one position (K).
    pub symbols: u16,
    /// Mass that the slots hold before the rest goes to the tail, in thousandths.
    pub fill_permille: u16,
}

/// One inner round of distillation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistilJob {
    /// Round it is for.
    pub round: RoundId,
    /// Manifest of the round; with another one the optimiser starts afresh.
    pub manifest: Digest,
    /// Inner round, from 0.
    pub inner: u32,
    /// Adapter to start from, a blob.
    pub start: Digest,
    /// Shards of targets in order, blobs.
    pub targets: Vec<Digest>,
    /// The reference set, a blob.
    pub reference: Digest,
    /// The node's part of the reference set.
    pub part: Part,
    /// How to train.
    pub training: Training,
    /// Seed of the round.
    pub seed: u64,
    /// Items of one shard.
    pub shard_items: u32,
    /// Items of the reference set.
    pub items: u64,
}

/// Measurement of the candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateJob {
    /// Round it is for.
    pub round: RoundId,
    /// The merged adapter, a blob.
    pub candidate: Digest,
    /// Rank, alpha and modules of the adapter.
    pub training: Training,
}

impl Job {
    /// The name that follows from the content.
    #[must_use]
    pub fn id(&self) -> JobId {
        let (round, slot) = match self {
            Self::Score(job) => (job.round, format!("score-{:04}", job.shard)),
            Self::Distil(job) => (job.round, format!("distil-{:02}", job.inner)),
            Self::Evaluate(job) => (job.round, "evaluate".to_owned()),
        };
        // A job holds integers, digests and plain text, which JSON always carries.
        let content = Digest::of(&serde_json::to_vec(self).unwrap_or_default()).to_string();
        let content: String = content.chars().take(16).collect();
        JobId(format!("r{round}-{slot}-{content}"))
    }

    /// The round it is for.
    #[must_use]
    pub const fn round(&self) -> RoundId {
        match self {
            Self::Score(job) => job.round,
            Self::Distil(job) => job.round,
            Self::Evaluate(job) => job.round,
        }
    }

    /// Order in which jobs are done: by round, then as the phases of a round follow each other.
    const fn order(&self) -> (RoundId, u8, u32) {
        match self {
            Self::Score(job) => (job.round, 0, job.shard),
            Self::Distil(job) => (job.round, 1, job.inner),
            Self::Evaluate(job) => (job.round, 2, 0),
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// The artefact is a blob.
    Done {
        /// Its digest.
        artefact: Digest,
        /// Time that it took.
        seconds: f64,
        /// Numbers worth logging, by name; they stay at the site.
        notes: BTreeMap<String, f64>,
    },
    /// It cannot be done as things are.
    Failed {
        /// Why, with the fix where there is one; stays at the site.
        problem: String,
    },
}

/// The shared folder.
#[derive(Debug, Clone)]
pub struct Spool {
    dir: PathBuf,
}

impl Spool {
    /// Opens a spool and makes what is missing of its folders.
    ///
    /// # Errors
    /// A folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, SpoolError> {
        let spool = Self {
            dir: dir.to_owned(),
        };
        for folder in [spool.jobs(), spool.results(), spool.blobs(), spool.state()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o770)
                .create(&folder)
                .map_err(failed("make", &folder))?;
            remove_abandoned(&folder);
        }
        Ok(spool)
    }

    /// The folder itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hands a job to the worker. Nothing changes if it is there already, done or not.
    ///
    /// # Errors
    /// The job cannot be written.
    pub fn submit(&self, job: &Job) -> Result<JobId, SpoolError> {
        let id = job.id();
        let path = self.job_path(&id);
        if !exists(&path)? {
            write_json(&path, job)?;
        }
        Ok(id)
    }

    /// Takes a job back, with its result if there is one. A worker that is at it notices by [`Self::is_wanted`].
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn withdraw(&self, id: &JobId) -> Result<(), SpoolError> {
        remove(&self.job_path(id))?;
        remove(&self.result_path(id))
    }

    /// Makes a finished job pending again, for a job that failed.
    ///
    /// # Errors
    /// The result cannot be removed.
    pub fn reset(&self, id: &JobId) -> Result<(), SpoolError> {
        remove(&self.result_path(id))
    }

    /// Whether a job is still to be done or its result still to be fetched.
    #[must_use]
    pub fn is_wanted(&self, id: &JobId) -> bool {
        self.job_path(id).exists()
    }

    /// All jobs that are there, done or not, in the order in which they are done. A malformed file is reported, set
    /// aside under the name `<file>.malformed`, and otherwise ignored.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn jobs_in_order(&self) -> Result<Vec<(JobId, Job)>, SpoolError> {
        let mut jobs = Vec::new();
        for path in json_files(&self.jobs())? {
            match read_json::<Job>(&path, JOB_LIMIT) {
                Ok(Some(job)) if path == self.job_path(&job.id()) => jobs.push((job.id(), job)),
                Ok(Some(job)) => set_aside(&SpoolError::Malformed {
                    problem: format!("its content is that of job {}", job.id()),
                    path,
                }),
                // Withdrawn since the folder was listed.
                Ok(None) => {}
                Err(error) => set_aside(&error),
            }
        }
        jobs.sort_by(|(a_id, a), (b_id, b)| (a.order(), a_id).cmp(&(b.order(), b_id)));
        Ok(jobs)
    }

    /// The first job without a result.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn next_job(&self) -> Result<Option<(JobId, Job)>, SpoolError> {
        for (id, job) in self.jobs_in_order()? {
            if !exists(&self.result_path(&id))? {
                return Ok(Some((id, job)));
            }
        }
        Ok(None)
    }

    /// Records how a job ended. The artefact must be a blob already.
    ///
    /// # Errors
    /// A number that is not finite, or the result cannot be written.
    pub fn finish(&self, id: &JobId, outcome: &Outcome) -> Result<(), SpoolError> {
        let path = self.result_path(id);
        if let Outcome::Done { seconds, notes, .. } = outcome {
            let numbers = notes
                .iter()
                .map(|(name, number)| (name.as_str(), number))
                .chain([("seconds", seconds)]);
            for (name, number) in numbers {
                if !number.is_finite() {
                    let problem = format!("{name} is {number}, expected a finite number");
                    return Err(SpoolError::Malformed { path, problem });
                }
            }
        }
        write_json(&path, outcome)
    }

    /// How a job ended, if it did. A malformed result is reported, set aside as a malformed job is, and the job is
    /// pending again.
    ///
    /// # Errors
    /// The result cannot be read.
    pub fn outcome(&self, id: &JobId) -> Result<Option<Outcome>, SpoolError> {
        match read_json(&self.result_path(id), RESULT_LIMIT) {
            Ok(outcome) => Ok(outcome),
            Err(error @ SpoolError::Malformed { .. }) => {
                set_aside(&error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Blocks until the folder of jobs changes, for `at_most` this long. For the worker, whose loop is not async.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn wait_for_change(&self, at_most: Duration) -> Result<(), SpoolError> {
        // A channel on which nothing is ever sent: a pause that needs no clock.
        let (_sender, pause) = mpsc::channel::<()>();
        let before = self.listing()?;
        let mut waited = Duration::ZERO;
        while waited < at_most && self.listing()? == before {
            let step = POLL.min(at_most.saturating_sub(waited));
            let _ = pause.recv_timeout(step);
            waited = waited.saturating_add(step);
        }
        Ok(())
    }

    /// Stores bytes under their digest.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, SpoolError> {
        let digest = Digest::of(bytes);
        let path = self.blob_path(&digest);
        if !exists(&path)? {
            write_whole(&path, bytes)?;
        }
        Ok(digest)
    }

    /// Stores a copy of a file under its digest; memory does not grow with the file.
    ///
    /// # Errors
    /// The file cannot be read, or its copy not written.
    pub fn put_blob_file(&self, from: &Path) -> Result<Digest, SpoolError> {
        let mut source = File::open(from).map_err(failed("open", from))?;
        let temporary = temporary(&self.blobs());
        let copied = copy_and_hash(&mut source, &temporary).and_then(|digest| {
            publish(&temporary, &self.blob_path(&digest))?;
            Ok(digest)
        });
        copied.map_err(|source| {
            let _ = fs::remove_file(&temporary);
            failed("copy", from)(source)
        })
    }

    /// Where a blob lies, or would lie.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.to_string())
    }

    /// Whether a blob is there. Its bytes are not read.
    #[must_use]
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// Reads a blob of at most `limit` bytes and checks its digest.
    ///
    /// # Errors
    /// Missing, longer, or damaged.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, SpoolError> {
        let path = self.blob_path(digest);
        let bytes = read_limited(&path, limit)?
            .ok_or_else(|| failed("read", &path)(io::Error::from(io::ErrorKind::NotFound)))?;
        match Digest::of(&bytes) {
            got if got == *digest => Ok(bytes),
            got => Err(SpoolError::Damaged { path, got }),
        }
    }

    /// Reads a blob to its end without keeping it, checks its digest, and returns its length.
    ///
    /// # Errors
    /// Missing or damaged.
    pub fn check_blob(&self, digest: &Digest) -> Result<u64, SpoolError> {
        let path = self.blob_path(digest);
        let (got, length) = hash_file(&path).map_err(failed("read", &path))?;
        if got == *digest {
            Ok(length)
        } else {
            Err(SpoolError::Damaged { path, got })
        }
    }

    /// Removes a blob, if it is there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_blob(&self, digest: &Digest) -> Result<(), SpoolError> {
        remove(&self.blob_path(digest))
    }

    /// Removes every blob, and every part of one, whose digest is not in `keep`. For the agent, between rounds.
    ///
    /// # Errors
    /// The folder cannot be read, or a file not removed.
    pub fn keep_blobs(&self, keep: &BTreeSet<Digest>) -> Result<(), SpoolError> {
        let folder = self.blobs();
        for entry in fs::read_dir(&folder).map_err(failed("read", &folder))? {
            let path = entry.map_err(failed("read", &folder))?.path();
            let digest = path
                .file_stem()
                .and_then(|name| name.to_str()?.parse().ok());
            if digest.is_some_and(|digest| !keep.contains(&digest)) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Where a half keeps a file of its own.
    #[must_use]
    pub fn state_path(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    /// Replaces a file of `state`, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_state(&self, name: &str, bytes: &[u8]) -> Result<(), SpoolError> {
        write_whole(&self.state_path(name), bytes)
    }

    /// Reads a file of `state`, if it is there.
    ///
    /// # Errors
    /// It cannot be read, or is longer than `limit`.
    pub fn read_state(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, SpoolError> {
        read_limited(&self.state_path(name), limit)
    }

    fn jobs(&self) -> PathBuf {
        self.dir.join("jobs")
    }

    fn results(&self) -> PathBuf {
        self.dir.join("results")
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs")
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    fn job_path(&self, id: &JobId) -> PathBuf {
        self.jobs().join(format!("{id}.json"))
    }

    fn result_path(&self, id: &JobId) -> PathBuf {
        self.results().join(format!("{id}.json"))
    }

    /// Names of jobs and results: a reset result is news to the worker as well.
    fn listing(&self) -> Result<Vec<PathBuf>, SpoolError> {
        let mut names = json_files(&self.jobs())?;
        names.extend(json_files(&self.results())?);
        Ok(names)
    }
}

/// SHA-256 and length of a file; memory does not grow with it.
///
/// # Errors
/// It cannot be read.
pub fn hash_file(path: &Path) -> io::Result<(Digest, u64)> {
    let mut file = File::open(path)?;
    hash_stream(&mut file, |_| Ok(()))
}

fn copy_and_hash(source: &mut File, to: &Path) -> io::Result<Digest> {
    let mut target = OpenOptions::new().write(true).create_new(true).open(to)?;
    let (digest, _) = hash_stream(source, |bytes| target.write_all(bytes))?;
    target.sync_all()?;
    Ok(digest)
}

fn hash_stream(
    source: &mut File,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<(Digest, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut length = 0_u64;
    loop {
        let count = source.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok((Digest::from_bytes(hasher.finalize().into()), length));
        };
        hasher.update(bytes);
        each(bytes)?;
        length = length.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), SpoolError> {
    let bytes = serde_json::to_vec(value).map_err(|error| SpoolError::Malformed {
        path: path.to_owned(),
        problem: error.to_string(),
    })?;
    write_whole(path, &bytes)
}

fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<Option<T>, SpoolError> {
    let Some(bytes) = read_limited(path, limit)? else {
        return Ok(None);
    };
    let parsed = serde_json::from_slice(&bytes).map_err(|error| SpoolError::Malformed {
        path: path.to_owned(),
        problem: error.to_string(),
    })?;
    Ok(Some(parsed))
}

fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, SpoolError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(SpoolError::Malformed {
            path: path.to_owned(),
            problem: format!("longer than {limit} bytes"),
        });
    }
    Ok(Some(bytes))
}

/// Writes a file that has its name only once it is complete and on disk.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), SpoolError> {
    let temporary = temporary(path.parent().unwrap_or_else(|| Path::new(".")));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        publish(&temporary, path)
    };
    write().map_err(|source| {
        // Best effort: the first failure is the one to report.
        let _ = fs::remove_file(&temporary);
        failed("write", path)(source)
    })
}

fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    fs::rename(temporary, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn temporary(folder: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // The time tells apart processes of the same number on two machines that share the folder.
    let now = SystemClock.now().0;
    folder.join(format!(".new-{now}-{}-{number}", std::process::id()))
}

/// Best effort: what cannot be removed is no harm.
fn remove_abandoned(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let made = name
            .to_str()
            .and_then(|name| name.strip_prefix(".new-"))
            .and_then(|name| name.split('-').next())
            .and_then(|made| made.parse().ok());
        if made.is_some_and(|made| SystemClock.now().since(UnixMillis(made)) > ABANDONED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn json_files(folder: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("read", folder))? {
        let path = entry.map_err(failed("read", folder))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn set_aside(error: &SpoolError) {
    tracing::warn!(%error, "set aside");
    if let SpoolError::Malformed { path, .. } = error {
        let mut name = path.clone().into_os_string();
        name.push(".malformed");
        let _ = fs::rename(path, name);
    }
}

fn exists(path: &Path) -> Result<bool, SpoolError> {
    path.try_exists().map_err(failed("look for", path))
}

fn remove(path: &Path) -> Result<(), SpoolError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn failed<'a>(doing: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SpoolError + 'a {
    move |source| SpoolError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool() -> (tempfile::TempDir, Spool) {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path()).unwrap();
        (folder, spool)
    }

    fn score(shard: u32) -> Job {
        Job::Score(ScoreJob {
            round: RoundId(1),
            shard,
            items: 0..64,
            reference: Digest::of(b"reference"),
            symbols: 16,
            fill_permille: 995,
        })
    }

    fn done() -> Outcome {
        Outcome::Done {
            artefact: Digest::of(b"shard"),
            seconds: 1.5,
            notes: BTreeMap::from([("bits_per_byte".to_owned(), 1.25)]),
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn jobs_come_in_order_and_submitting_again_changes_nothing() {
        let (_folder, spool) = spool();
        let second = spool.submit(&score(10)).unwrap();
        let first = spool.submit(&score(9)).unwrap();
        assert_eq!(spool.submit(&score(9)).unwrap(), first);
        assert_eq!(names(&spool.jobs()).len(), 2);
        assert!(first.as_str().starts_with("r1-score-0009-"), "{first}");

        assert_eq!(spool.next_job().unwrap(), Some((first.clone(), score(9))));
        spool.finish(&first, &done()).unwrap();
        assert_eq!(spool.outcome(&first).unwrap(), Some(done()));
        assert_eq!(spool.submit(&score(9)).unwrap(), first);
        assert_eq!(spool.next_job().unwrap().unwrap().0, second);
        spool.reset(&first).unwrap();
        assert_eq!(spool.next_job().unwrap().unwrap().0, first);
        spool.withdraw(&first).unwrap();
        assert!(!spool.is_wanted(&first));
        assert_eq!(spool.next_job().unwrap().unwrap().0, second);
    }

    #[test]
    fn a_result_never_counts_for_a_job_with_other_content() {
        let (_folder, spool) = spool();
        let mut other = score(0);
        if let Job::Score(job) = &mut other {
            job.symbols = 8;
        }
        let old = spool.submit(&score(0)).unwrap();
        spool.finish(&old, &done()).unwrap();
        let new = spool.submit(&other).unwrap();
        assert_ne!(old, new);
        assert_eq!(spool.outcome(&new).unwrap(), None);
        assert_eq!(spool.next_job().unwrap(), Some((new, other)));
    }

    #[test]
    fn malformed_files_are_set_aside_and_the_rest_goes_on() {
        let (_folder, spool) = spool();
        let good = spool.submit(&score(3)).unwrap();
        let valid = fs::read_to_string(spool.job_path(&good)).unwrap();
        let unknown = valid.replacen("\"round\"", "\"surprise\":1,\"round\"", 1);
        for (name, content) in [
            ("a.json", ""),
            ("b.json", "{\"score\":{}}"),
            ("c.json", unknown.as_str()),
            ("d.json", valid.as_str()),
            ("e.json", "[1]"),
        ] {
            fs::write(spool.jobs().join(name), content).unwrap();
        }
        let huge = File::create(spool.jobs().join("f.json")).unwrap();
        huge.set_len(JOB_LIMIT + 1).unwrap();
        assert_eq!(spool.next_job().unwrap().unwrap().0, good);
        let left = names(&spool.jobs());
        assert_eq!(
            left.iter().filter(|n| n.ends_with(".malformed")).count(),
            6,
            "{left:?}"
        );

        fs::write(spool.result_path(&good), "{\"done\":{}}").unwrap();
        assert_eq!(spool.outcome(&good).unwrap(), None);
        assert_eq!(spool.next_job().unwrap().unwrap().0, good);
    }

    #[test]
    fn files_without_their_name_yet_are_no_jobs_and_nothing_is_left_behind() {
        let (folder, spool) = spool();
        fs::write(spool.jobs().join(".new-1-2-3"), "half a j").unwrap();
        assert_eq!(spool.next_job().unwrap(), None);
        Spool::open(folder.path()).unwrap();
        assert!(names(&spool.jobs()).is_empty(), "abandoned in 1970");

        let id = spool.submit(&score(0)).unwrap();
        spool.finish(&id, &done()).unwrap();
        let blob = spool.put_blob(b"blob").unwrap();
        fs::write(folder.path().join("file"), b"blob").unwrap();
        assert_eq!(
            spool.put_blob_file(&folder.path().join("file")).unwrap(),
            blob
        );
        for folder in [spool.jobs(), spool.results(), spool.blobs()] {
            assert_eq!(names(&folder).len(), 1, "{folder:?}");
        }
        let unmeasured = Outcome::Done {
            artefact: blob,
            seconds: f64::NAN,
            notes: BTreeMap::new(),
        };
        assert!(spool.finish(&id, &unmeasured).is_err());
        assert_eq!(spool.outcome(&id).unwrap(), Some(done()));
    }

    #[test]
    fn a_damaged_blob_is_noticed() {
        let (_folder, spool) = spool();
        let digest = spool.put_blob(b"blob").unwrap();
        let other = spool.put_blob(b"other").unwrap();
        fs::write(spool.blobs().join(format!("{other}.part")), b"oth").unwrap();
        spool.keep_blobs(&BTreeSet::from([digest])).unwrap();
        assert_eq!(names(&spool.blobs()), [digest.to_string()]);
        assert_eq!(spool.read_blob(&digest, 4).unwrap(), b"blob");
        assert_eq!(spool.check_blob(&digest).unwrap(), 4);
        assert!(spool.read_blob(&digest, 3).is_err());
        fs::write(spool.blob_path(&digest), b"bl0b").unwrap();
        for refused in [
            spool.read_blob(&digest, 4).map(|_| ()),
            spool.check_blob(&digest).map(|_| ()),
        ] {
            assert!(matches!(refused, Err(SpoolError::Damaged { .. })));
        }
    }

    #[test]
    fn waiting_ends_with_the_next_job() {
        let (_folder, spool) = spool();
        let writer = spool.clone();
        let waiter = std::thread::spawn(move || spool.wait_for_change(Duration::from_secs(60)));
        // Not before the waiter has looked once, or it would wait for the whole minute.
        let (_sender, pause) = mpsc::channel::<()>();
        let mut shard = 0;
        while !waiter.is_finished() {
            writer.submit(&score(shard)).unwrap();
            shard += 1;
            let _ = pause.recv_timeout(POLL);
        }
        waiter.join().unwrap().unwrap();
    }
}
