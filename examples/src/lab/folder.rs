//! The folder that a run leaves behind.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// Makes the output folder of an example, replacing one that an earlier run of it made.
///
/// # Errors
/// A folder that is not empty and that `example` did not make, or a disk that fails.
pub fn claim(out: &Path, example: &str) -> Result<()> {
    let mark = out.join(format!(".consilium-{example}"));
    if mark.exists() {
        std::fs::remove_dir_all(out).with_context(|| out.display().to_string())?;
    } else if out.exists() && out.read_dir()?.next().is_some() {
        bail!(
            "{} is not empty and no earlier run made it; choose another --out",
            out.display()
        );
    }
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    std::fs::write(
        &mark,
        format!("made by the example {example}; may be replaced\n"),
    )
    .with_context(|| mark.display().to_string())
}
