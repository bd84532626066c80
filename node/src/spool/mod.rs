//! The folder that the two halves of a node share, and the only thing they share.
//!
//! The agent writes jobs, the worker writes results, both write blobs; every file is complete the moment it has its name
//! (temporary file, fsync, rename, fsync of the folder), so either half may be killed at any time. Where the source is
//! behind a server, a scorer takes the place of the worker for score jobs.
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

mod blobs;
mod files;
mod job;
#[cfg(test)]
mod tests;

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use consilium_protocol::Digest;

use files::{
    exists, failed, json_files, names, read_json, read_limited, remove, remove_abandoned,
    set_aside, write_json, write_whole,
};

pub use files::hash_file;
pub use job::{DistilJob, EvaluateJob, Job, JobId, Lesson, Outcome, RecordFiles, Rival, ScoreJob};

/// Longest job file in bytes: room for the digests of a hundred thousand target shards.
const JOB_LIMIT: u64 = 16 << 20;
/// Longest result file in bytes.
const RESULT_LIMIT: u64 = 64 * 1024;
/// Pause between two looks into a folder.
const POLL: Duration = Duration::from_millis(50);

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
        self.next_job_of(|_| true)
    }

    /// The first job without a result among those that are one's own.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn next_job_of(
        &self,
        own: impl Fn(&Job) -> bool,
    ) -> Result<Option<(JobId, Job)>, SpoolError> {
        for (id, job) in self.jobs_in_order()? {
            if own(&job) && !exists(&self.result_path(&id))? {
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

    /// Names of the files of `state` that begin so, in order.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn states_named(&self, prefix: &str) -> Result<Vec<String>, SpoolError> {
        names(&self.state(), prefix)
    }

    /// Removes a file of `state`, if it is there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_state(&self, name: &str) -> Result<(), SpoolError> {
        remove(&self.state_path(name))
    }

    /// Names of jobs and results: a reset result is news to the worker as well.
    fn listing(&self) -> Result<Vec<PathBuf>, SpoolError> {
        let mut names = json_files(&self.jobs())?;
        names.extend(json_files(&self.results())?);
        Ok(names)
    }
}
