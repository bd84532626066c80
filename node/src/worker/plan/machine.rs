//! The memory that the machine has, and that this process took.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Memory that a run may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// Bytes.
    pub bytes: u64,
    /// Who says so.
    pub source: String,
}

impl Budget {
    /// Of the NVIDIA device that runs use: what the person in charge says, else what no program uses of it. None where there is no
    /// such device.
    #[must_use]
    pub fn of_device(given: Option<u64>) -> Option<Self> {
        if let Some(bytes) = given {
            return Some(Self {
                bytes,
                source: "--device-memory".to_owned(),
            });
        }
        let device = consilium_kernels::cuda::device().ok()?;
        Some(Self {
            bytes: u64::try_from(device.memory_free().ok()?).unwrap_or(u64::MAX),
            source: device.name().to_owned(),
        })
    }

    /// What the person in charge says, else the smallest of what the kernel calls available and what the process's control
    /// groups have left. None where nothing says anything.
    #[must_use]
    pub fn find(given: Option<u64>) -> Option<Self> {
        if let Some(bytes) = given {
            return Some(Self {
                bytes,
                source: "--memory".to_owned(),
            });
        }
        let read = |path: &Path| fs::read_to_string(path).ok();
        let available =
            read(Path::new("/proc/meminfo")).and_then(|text| kibibytes(&text, "MemAvailable:"));
        let available = available.map(|bytes| Self {
            bytes,
            source: "/proc/meminfo".to_owned(),
        });
        let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
        available
            .into_iter()
            .chain(group_budgets(&groups, Path::new("/sys/fs/cgroup"), &read))
            .min_by_key(|budget| budget.bytes)
    }
}

/// The value of a line `name  number kB`.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = rest.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(1024)
}

/// What each control group on the way up from the process's own has left: its limit, less what it uses and cannot give
/// back. `groups` is `/proc/self/cgroup`.
fn group_budgets(groups: &str, root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Vec<Budget> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (root, limit, usage) = if controllers.is_empty() {
            (root.to_owned(), "memory.max", "memory.current")
        } else if controllers.split(',').any(|name| name == "memory") {
            (
                root.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        } else {
            continue;
        };
        let own = root.join(path.trim_start_matches('/'));
        for folder in own
            .ancestors()
            .take_while(|folder| folder.starts_with(&root))
        {
            let number =
                |name: &str| -> Option<u64> { read(&folder.join(name))?.trim().parse().ok() };
            // "max" is no number: no limit.
            if let (Some(limit), Some(used)) = (number(limit), number(usage)) {
                let cached =
                    read(&folder.join("memory.stat")).and_then(|stat| inactive_file(&stat));
                let used = used.saturating_sub(cached.unwrap_or(0));
                found.push(Budget {
                    bytes: limit.saturating_sub(used),
                    source: display(folder, limit),
                });
            }
        }
    }
    found
}

fn display(folder: &Path, limit: u64) -> String {
    let folder: PathBuf = folder.into();
    format!("{}, limit {limit} bytes", folder.display())
}

fn inactive_file(stat: &str) -> Option<u64> {
    stat.lines()
        .find_map(|line| line.strip_prefix("inactive_file "))?
        .trim()
        .parse()
        .ok()
}

/// Highest resident memory of this process so far, in bytes; none where the kernel does not tell.
#[must_use]
pub fn peak() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_tightest_of_all_groups_on_the_way_up_counts_and_cache_does_not() {
        let files: BTreeMap<&str, &str> = BTreeMap::from([
            ("/g/a/b/memory.max", "max\n"),
            ("/g/a/b/memory.current", "10\n"),
            ("/g/a/memory.max", "1000\n"),
            ("/g/a/memory.current", "700\n"),
            ("/g/a/memory.stat", "anon 1\ninactive_file 300\n"),
            ("/g/memory/c/memory.limit_in_bytes", "900\n"),
            ("/g/memory/c/memory.usage_in_bytes", "950\n"),
        ]);
        let read = |path: &Path| files.get(path.to_str()?).map(ToString::to_string);
        let bytes = |groups: &str| -> Vec<u64> {
            let budgets = group_budgets(groups, Path::new("/g"), &read);
            budgets.iter().map(|budget| budget.bytes).collect()
        };
        assert_eq!(bytes("0::/a/b\n"), [600]);
        assert_eq!(bytes("3:cpu,memory:/c\n1:pids:/a\n"), [0]);
        assert_eq!(bytes("nonsense"), [0_u64; 0]);
        assert_eq!(
            kibibytes("MemFree: 1 kB\nMemAvailable:   12 kB\n", "MemAvailable:"),
            Some(12288)
        );
        assert!(Budget::find(None).is_some_and(|budget| budget.bytes > 0));
        assert!(peak().is_some_and(|bytes| bytes > 1 << 20));
    }
}
