//! Models by name: the local Hugging Face cache, by its published layout
//! (<https://huggingface.co/docs/hub/local-cache>). Nothing is ever fetched.

use std::ffi::OsString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Longest part of a name on the hub, in bytes.
const LONGEST_PART: usize = 96;

/// Why a model could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// No folder, and not in the cache either.
    #[error(
        "no folder {} and no model {name} in the cache {}; fetch it with `hf download {name}`, or give a folder",
        folder.display(),
        cache.display()
    )]
    NotCached {
        /// The name.
        name: RepoName,
        /// The folder that the value may have meant.
        folder: PathBuf,
        /// The cache.
        cache: PathBuf,
    },
    /// The cache holds the model, but what its `main` points to is not there.
    #[error("{}: {problem}; fetch it again with `hf download {name}`", path.display())]
    Incomplete {
        /// The name.
        name: RepoName,
        /// File or folder in the cache.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Neither a cache nor a home folder is known.
    #[error(
        "{name} is no folder, and the Hugging Face cache is not known; set HF_HUB_CACHE, HF_HOME or HOME"
    )]
    NoCache {
        /// The name.
        name: RepoName,
    },
}

/// The name of a model on the hub: `organisation/model`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoName(String);

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl RepoName {
    /// The name that a relative path of two parts spells, if the hub could have it.
    fn of(path: &Path) -> Option<Self> {
        let mut parts = path.components().map(|part| match part {
            Component::Normal(part) => part.to_str().filter(|part| is_part(part)),
            _ => None,
        });
        match (parts.next(), parts.next(), parts.next()) {
            (Some(Some(owner)), Some(Some(name)), None) => Some(Self(format!("{owner}/{name}"))),
            _ => None,
        }
    }

    fn folder(&self) -> String {
        format!("models--{}", self.0.replace('/', "--"))
    }
}

/// As `huggingface_hub.utils.validate_repo_id`: letters, digits, `-`, `_` and `.`, none of the last three at an end, no
/// `--` and no `..`.
fn is_part(part: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = |c: char| matches!(c, '-' | '.');
    (1..=LONGEST_PART).contains(&part.len())
        && part.chars().all(is_plain)
        && !part.starts_with(ends)
        && !part.ends_with(ends)
        && !part.contains("--")
        && !part.contains("..")
}

/// A model as a setting names it: a folder, or `organisation/model` in the local cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPlace {
    folder: PathBuf,
    name: Option<RepoName>,
}

impl ModelPlace {
    /// What `value` means in a file of `base`.
    #[must_use]
    pub fn new(base: &Path, value: &Path) -> Self {
        Self {
            folder: base.join(value),
            name: RepoName::of(value),
        }
    }

    /// The folder that the value means unless it is a name.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of the model: the one that the value names, or else the model's in the cache.
    ///
    /// # Errors
    /// Where the value is the name of a model that is not in the cache. A folder that does not exist and cannot be a name
    /// is given back, for its reader to say so.
    pub fn resolve(&self) -> Result<PathBuf, HubError> {
        self.resolve_in(|name| std::env::var_os(name))
    }

    /// As [`resolve`](Self::resolve), but the folder that the value means where a name is not in the cache, for its reader
    /// to say that it is missing.
    #[must_use]
    pub fn resolve_or_folder(&self) -> PathBuf {
        self.resolve().unwrap_or_else(|_| self.folder.clone())
    }

    fn resolve_in(&self, variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, HubError> {
        match &self.name {
            Some(name) if !self.folder.exists() => {
                let unknown = || HubError::NoCache { name: name.clone() };
                let cache = cache(variable).ok_or_else(unknown)?;
                snapshot(&cache, name, &self.folder)
            }
            _ => Ok(self.folder.clone()),
        }
    }
}

impl From<&Path> for ModelPlace {
    fn from(value: &Path) -> Self {
        Self::new(Path::new(""), value)
    }
}

impl From<PathBuf> for ModelPlace {
    fn from(value: PathBuf) -> Self {
        value.as_path().into()
    }
}

/// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` of `XDG_CACHE_HOME` or of `~/.cache`.
fn cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let home = || set("HOME").map(PathBuf::from);
    let expanded = |value: OsString| {
        let path = PathBuf::from(value);
        let rest = path.strip_prefix("~").ok();
        let in_home = rest.and_then(|rest| Some(home()?.join(rest)));
        in_home.unwrap_or(path)
    };
    if let Some(cache) = set("HF_HUB_CACHE") {
        return Some(expanded(cache));
    }
    if let Some(home) = set("HF_HOME") {
        return Some(expanded(home).join("hub"));
    }
    let caches = set("XDG_CACHE_HOME").map(expanded);
    let caches = caches.or_else(|| home().map(|home| home.join(".cache")))?;
    Some(caches.join("huggingface/hub"))
}

/// `models--ORG--NAME/snapshots/REVISION`, the revision being that of `refs/main`.
fn snapshot(cache: &Path, name: &RepoName, folder: &Path) -> Result<PathBuf, HubError> {
    let repo = cache.join(name.folder());
    if !repo.is_dir() {
        return Err(HubError::NotCached {
            name: name.clone(),
            folder: folder.into(),
            cache: cache.into(),
        });
    }
    let incomplete = |path: &Path, problem: String| HubError::Incomplete {
        name: name.clone(),
        path: path.into(),
        problem,
    };
    let main = repo.join("refs/main");
    let revision = std::fs::read_to_string(&main)
        .map_err(|error| incomplete(&main, format!("cannot read: {error}")))?;
    let revision = revision.trim();
    if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(incomplete(&main, "does not hold a revision".into()));
    }
    let snapshot = repo.join("snapshots").join(revision);
    if snapshot.is_dir() {
        Ok(snapshot)
    } else {
        Err(incomplete(&snapshot, "is missing".into()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_name_is_found_where_the_hub_client_keeps_it_and_a_folder_comes_first() {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        let hub = "cache/huggingface/hub/models--org--small-1.5B";
        fs::create_dir_all(at(&format!("{hub}/refs"))).unwrap();
        fs::create_dir_all(at(&format!("{hub}/snapshots/0ab1"))).unwrap();
        fs::write(at(&format!("{hub}/refs/main")), "0ab1").unwrap();
        let place = ModelPlace::new(&at("etc"), Path::new("org/small-1.5B"));
        let found = at(&format!("{hub}/snapshots/0ab1"));
        let with = |name: &'static str, value: PathBuf| {
            move |asked: &str| (asked == name).then(|| value.clone().into_os_string())
        };
        for (name, value) in [
            ("XDG_CACHE_HOME", "cache"),
            ("HF_HOME", "cache/huggingface"),
            ("HF_HUB_CACHE", "cache/huggingface/hub"),
        ] {
            assert_eq!(
                place.resolve_in(with(name, at(value))).unwrap(),
                found,
                "{name}"
            );
        }
        let missed = place.resolve_in(with("HOME", at("cache"))).unwrap_err();
        assert!(
            missed.to_string().contains("`hf download org/small-1.5B`"),
            "{missed}"
        );
        assert!(matches!(missed, HubError::NotCached { .. }));
        let unset = place.resolve_in(|_| None).unwrap_err();
        assert!(matches!(unset, HubError::NoCache { .. }));

        fs::write(at(&format!("{hub}/refs/main")), "../../etc").unwrap();
        let cache = || with("HF_HUB_CACHE", at("cache/huggingface/hub"));
        let broken = place.resolve_in(cache()).unwrap_err().to_string();
        assert!(
            broken.contains("refs/main: does not hold a revision"),
            "{broken}"
        );
        fs::write(at(&format!("{hub}/refs/main")), "0ab2").unwrap();
        let broken = place.resolve_in(cache()).unwrap_err().to_string();
        assert!(
            broken.contains("0ab2: is missing; fetch it again"),
            "{broken}"
        );

        fs::create_dir_all(at("etc/org/small-1.5B")).unwrap();
        let folder = place.resolve_in(|_| None).unwrap();
        assert_eq!(folder, at("etc/org/small-1.5B"));
    }

    #[test]
    fn what_cannot_be_a_name_is_a_folder() {
        for value in [
            "pivot",
            "/org/name",
            "../org",
            "a/b/c",
            "org/na--me",
            "or g/name",
            "./x/.y",
        ] {
            let place = ModelPlace::new(Path::new("/etc/consilium"), Path::new(value));
            let folder = place.resolve_in(|_| None).unwrap();
            assert_eq!(folder, Path::new("/etc/consilium").join(value));
        }
    }
}
