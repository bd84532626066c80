//! Models that the user brings in place of the built-in ones.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use consilium_examples::world::Domain;
use consilium_node::worker::LoadedModel;

/// `NAME=FOLDER` of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedFolder {
    /// Whose model.
    pub(crate) domain: Domain,
    /// Where it is.
    pub(crate) folder: PathBuf,
}

impl FromStr for NamedFolder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, folder) = text
            .split_once('=')
            .filter(|(_, folder)| !folder.is_empty())
            .ok_or("expected NAME=FOLDER, for example bank=models/bank")?;
        let domain = Domain::ALL
            .into_iter()
            .find(|domain| domain.name() == name)
            .ok_or_else(|| format!("`{name}` is none of clinic, bank and insurer"))?;
        Ok(Self {
            domain,
            folder: folder.into(),
        })
    }
}

/// Folders of models that are not trained here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Given {
    pivot: Option<PathBuf>,
    sources: [Option<PathBuf>; 3],
}

impl Given {
    /// Checks that each folder holds a model, and that the run does not begin with removing it.
    pub(crate) fn new(pivot: Option<&Path>, sources: &[NamedFolder], out: &Path) -> Result<Self> {
        let mut given = Self {
            pivot: pivot.map(|folder| check(folder, out)).transpose()?,
            ..Self::default()
        };
        for NamedFolder { domain, folder } in sources {
            let place = given
                .sources
                .get_mut(domain.index())
                .context("a place for each domain")?;
            ensure!(place.is_none(), "--source {} is given twice", domain.name());
            *place = Some(check(folder, out)?);
        }
        Ok(given)
    }

    /// The pivot, if it is given.
    pub(crate) fn pivot(&self) -> Option<&Path> {
        self.pivot.as_deref()
    }

    /// An institution's source, if it is given.
    pub(crate) fn source(&self, domain: Domain) -> Option<&Path> {
        self.sources.get(domain.index())?.as_deref()
    }

    /// Whether any model is given.
    pub(crate) fn any(&self) -> bool {
        self.pivot.is_some() || self.sources.iter().any(Option::is_some)
    }

    /// What the report says about them, empty without any.
    pub(crate) fn note(&self) -> String {
        let pivot = self.pivot.iter().map(|_| "the pivot");
        let sources = Domain::ALL
            .into_iter()
            .filter(|&domain| self.source(domain).is_some())
            .map(Domain::name);
        let names: Vec<&str> = pivot.chain(sources).collect();
        if names.is_empty() {
            return String::new();
        }
        format!(
            " Models given: {}; the bars were set for the built-in ones and decide nothing here.",
            names.join(", ")
        )
    }
}

fn check(folder: &Path, out: &Path) -> Result<PathBuf> {
    let whole = folder
        .canonicalize()
        .with_context(|| folder.display().to_string())?;
    if let Ok(out) = out.canonicalize() {
        ensure!(
            !whole.starts_with(&out),
            "{} lies in {}, which the run replaces; copy it elsewhere or choose another --out",
            folder.display(),
            out.display()
        );
    }
    LoadedModel::load(&whole)?;
    Ok(whole)
}
