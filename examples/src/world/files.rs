//! The world on disk, in the shapes that nodes read: JSONL, one object a line.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{Domain, EvaluationItem, World};

/// Where [`World::write_files`] put things; arrays follow [`Domain::ALL`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// `private/<institution>.jsonl`, `{"text"}`.
    pub private: [PathBuf; 3],
    /// `holdout/<institution>.jsonl`, evaluation items.
    pub holdout: [PathBuf; 3],
    /// `public.jsonl`, `{"context","target","unlabeled"}`.
    pub public: PathBuf,
    /// `test/<domain>.jsonl`, evaluation items for bits per byte.
    pub lines: [PathBuf; 3],
    /// `test/facts.jsonl`, evaluation items in the order of [`super::Tests::facts`].
    pub facts: PathBuf,
    /// `test/rules.jsonl`, evaluation items in the order of [`super::Tests::rules`].
    pub rules: PathBuf,
}

#[derive(Serialize)]
struct Text<'a> {
    text: &'a str,
}

impl World {
    /// Writes every text below a folder, which is made when it is missing. Same world, same bytes.
    pub fn write_files(&self, folder: &Path) -> io::Result<Files> {
        let named = |part: &str| {
            Domain::ALL.map(|domain| folder.join(part).join(format!("{domain}.jsonl")))
        };
        let files = Files {
            private: named("private"),
            holdout: named("holdout"),
            public: folder.join("public.jsonl"),
            lines: named("test"),
            facts: folder.join("test").join("facts.jsonl"),
            rules: folder.join("test").join("rules.jsonl"),
        };
        for part in ["private", "holdout", "test"] {
            fs::create_dir_all(folder.join(part))?;
        }
        for institution in &self.institutions {
            let at = institution.domain.index();
            write(
                &files.private[at],
                institution.private.iter().map(|text| Text { text }),
            )?;
            write(&files.holdout[at], &institution.holdout)?;
            write(&files.lines[at], &self.tests.lines[at])?;
        }
        write(&files.public, self.public.iter().map(|public| &public.item))?;
        let facts = self.tests.facts.iter().map(|question| &question.item);
        write::<&EvaluationItem>(&files.facts, facts)?;
        let rules = self.tests.rules.iter().map(|question| &question.item);
        write::<&EvaluationItem>(&files.rules, rules)?;
        Ok(files)
    }
}

fn write<T: Serialize>(path: &Path, items: impl IntoIterator<Item = T>) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for item in items {
        serde_json::to_writer(&mut file, &item)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}
