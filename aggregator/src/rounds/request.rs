//! How `round open` reaches a running server: a request file and a response file in the data folder.

use std::path::{Path, PathBuf};
use std::{fs, io};

use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, Manifest, MergeRule, Mode, Screening,
    SymbolSpace, TargetForm, Training,
};
use consilium_protocol::{Digest, RoundId};
use serde::{Deserialize, Serialize};

/// What the operator chooses; the rest of the manifest follows from charter, pivot and reference set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenRequest {
    /// What leaves the sites.
    pub mode: Mode,
    /// Alphabet of the records.
    pub symbol_space: SymbolSpace,
    /// Symbol slots of one position.
    pub symbols: u16,
    /// Mass that the slots hold, in thousandths.
    pub fill_permille: u16,
    /// Items of one shard.
    pub shard_items: u32,
    /// How records become targets.
    pub fusion: FusionRule,
    /// What becomes of a fused record before it is sent back.
    pub targets: TargetForm,
    /// What is done about records that give their source away.
    pub screening: Screening,
    /// The key of the reference set's decoys, as JSON; its digest becomes `screening.decoys`.
    pub decoy_key: Option<String>,
    /// How the adapter is trained and merged.
    pub training: Training,
    /// Members that a phase needs; the charter's quorum if absent.
    pub quorum: Option<u32>,
    /// Longest wait for each phase.
    pub deadlines: Deadlines,
    /// In mode `adapters`, the most that a member's declared capacity counts; all alike if absent.
    pub max_weight: Option<u32>,
    /// Seed of parts and initial factors.
    pub seed: u64,
}

impl Default for OpenRequest {
    fn default() -> Self {
        let modules = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Self {
            mode: Mode::Unified,
            symbol_space: SymbolSpace::Bytes,
            symbols: 16,
            fill_permille: 995,
            shard_items: 1024,
            fusion: FusionRule::default(),
            targets: TargetForm::default(),
            screening: Screening::default(),
            decoy_key: None,
            training: Training {
                inner_rounds: 8,
                local_steps: 30,
                rows: 12,
                row_tokens: 96,
                learning_rate_micros: 10_000,
                warmup_permille: 50,
                final_permille: 20,
                cross_entropy_permille: 100,
                rank: 32,
                alpha: 64,
                target_modules: modules(&[
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                ]),
                modules_to_save: modules(&["embed_tokens", "lm_head"]),
                outer_rate_permille: 700,
                outer_momentum_permille: 700,
                distillation: Distillation::Trie,
                merge: MergeRule::Product,
                defence: Defence::ClipNorm,
            },
            quorum: None,
            deadlines: Deadlines {
                contribute_seconds: 86_400,
                distil_seconds: 86_400,
                evaluate_seconds: 86_400,
            },
            max_weight: None,
            seed: 1,
        }
    }
}

impl OpenRequest {
    /// Replaces one value by its path, for example `training.rank=16` or `fusion.rule=min_ce`.
    ///
    /// # Errors
    /// No such key, or a value of another type.
    pub fn set(self, assignment: &str) -> Result<Self, String> {
        let (path, value) = assignment
            .split_once('=')
            .ok_or_else(|| format!("{assignment:?} is not of the form key=value"))?;
        let mut document = serde_json::to_value(self).map_err(|error| error.to_string())?;
        let pointer = format!("/{}", path.replace('.', "/"));
        let slot = document
            .pointer_mut(&pointer)
            .ok_or_else(|| format!("no setting is called {path:?}"))?;
        *slot = serde_json::from_str(value)
            .unwrap_or_else(|_| serde_json::Value::String(value.to_owned()));
        // A rule's own parameters differ from rule to rule: a name alone brings its defaults.
        if path == "fusion.rule" {
            let rule = FusionRule::named(value)
                .ok_or_else(|| format!("{assignment}: no fusion rule is called {value:?}"))?;
            *document.pointer_mut("/fusion").ok_or("no rule")? =
                serde_json::to_value(rule).map_err(|error| error.to_string())?;
        }
        // On private text there is nothing to distil.
        if path == "mode" && value == Mode::Adapters.name() {
            let labels = serde_json::json!({"loss": "labels"});
            *document
                .pointer_mut("/training/distillation")
                .ok_or("no loss")? = labels;
        }
        // The pivot's own records have no labels in their tails, and the target's bits are compared with them.
        let is_dual = document.pointer("/training/distillation/loss")
            == Some(&Distillation::DualTrie.name().into());
        if path.starts_with("training.distillation") && is_dual {
            *document.pointer_mut("/targets/tail").ok_or("no tail")? = serde_json::json!("ghost");
        }
        serde_json::from_value(document).map_err(|error| format!("{assignment}: {error}"))
    }
}

/// The server's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OpenResponse {
    /// The round is open and logged.
    Opened {
        /// Its number.
        round: RoundId,
        /// Its signed manifest.
        manifest: Digest,
    },
    /// It cannot be opened.
    Refused {
        /// Why, and what to do.
        problem: String,
    },
}

/// Folder of requests below the data folder.
#[must_use]
pub fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("requests")
}

/// Writes a JSON file so that a reader sees all of it or nothing.
///
/// # Errors
/// The file system's reason.
pub fn write_atomically<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let file = fs::File::create(&temporary)?;
    serde_json::to_writer(&file, value)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Requests that wait, oldest first: the file of each and what it asks.
///
/// # Errors
/// The folder cannot be read.
pub fn waiting(data_dir: &Path) -> io::Result<Vec<(PathBuf, Result<OpenRequest, String>)>> {
    let folder = folder(data_dir);
    fs::create_dir_all(&folder)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "request")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found
        .into_iter()
        .map(|path| {
            let request = fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| e.to_string()));
            (path, request)
        })
        .collect())
}

/// Where the answer to a request is written.
#[must_use]
pub fn response_path(request: &Path) -> PathBuf {
    request.with_extension("response")
}

/// The manifest of a request.
#[must_use]
pub fn manifest(request: OpenRequest, given: Given) -> Manifest {
    Manifest {
        consortium: given.charter.consortium,
        round: given.round,
        mode: request.mode,
        charter: given.charter_digest,
        pivot: given.pivot,
        reference: given.reference,
        items: given.items,
        symbol_space: request.symbol_space,
        symbols: request.symbols,
        fill_permille: request.fill_permille,
        shard_items: request.shard_items,
        fusion: request.fusion,
        targets: request.targets,
        screening: request.screening,
        training: request.training,
        quorum: request.quorum.unwrap_or(given.charter.quorum),
        members: {
            let mut members: Vec<_> = given
                .charter
                .members
                .into_iter()
                .map(|member| member.institution)
                .collect();
            members.sort();
            members
        },
        deadlines: request.deadlines,
        max_weight: request.max_weight,
        seed: request.seed,
        previous_release: given.previous_release,
    }
}

/// What a manifest takes from the aggregator.
#[derive(Debug, Clone)]
pub struct Given {
    /// The charter.
    pub charter: consilium_protocol::charter::Charter,
    /// Digest of its signed form.
    pub charter_digest: Digest,
    /// Number of the new round.
    pub round: RoundId,
    /// Folder digest of the pivot.
    pub pivot: Digest,
    /// Digest of the reference set.
    pub reference: Digest,
    /// Its items.
    pub items: u64,
    /// The release it starts from.
    pub previous_release: Option<Digest>,
}

#[cfg(test)]
mod tests {
    use consilium_protocol::manifest::TargetTail;

    use super::*;

    #[test]
    fn settings_are_replaced_by_path_and_unknown_ones_refused() {
        let changed = OpenRequest::default().set("training.rank=16").unwrap();
        assert_eq!(changed.training.rank, 16);
        let changed = changed.set("fusion.rule=min_ce").unwrap();
        assert_eq!(changed.fusion, FusionRule::MinCe);
        let changed = OpenRequest::default().set("fusion.rule=softmax");
        let changed = changed.unwrap().set("fusion.sharpness=5").unwrap();
        assert_eq!(changed.fusion, FusionRule::Softmax { sharpness: 5 });
        let changed = changed.set("fusion.rule=guarded_softmax").unwrap();
        assert_eq!(changed.fusion, OpenRequest::default().fusion);
        let adapters = OpenRequest::default().set("mode=adapters").unwrap();
        assert_eq!(adapters.training.distillation, Distillation::Labels);
        let dual = OpenRequest::default().set("training.distillation.loss=dual_trie");
        assert_eq!(dual.unwrap().targets.tail, TargetTail::Ghost);
        let graph = r#"training.distillation={"loss":"infifusion","symbols":10,"temperature_permille":900}"#;
        let changed = OpenRequest::default().set(graph).unwrap();
        let expected = Distillation::Infifusion {
            symbols: 10,
            temperature_permille: 900,
        };
        assert_eq!(changed.training.distillation, expected);
        let changed = OpenRequest::default()
            .set(r#"training.merge={"rule":"ties","density_permille":200,"scale_permille":1000}"#)
            .unwrap()
            .set(r#"training.defence={"rule":"standard"}"#)
            .unwrap();
        let ties = MergeRule::Ties {
            density_permille: 200,
            scale_permille: 1000,
        };
        assert_eq!(changed.training.merge, ties);
        assert_eq!(changed.training.defence, Defence::Standard);
        let changed = OpenRequest::default().set("training.merge.rule=stack");
        assert_eq!(changed.unwrap().training.merge, MergeRule::Stack);
        let changed = OpenRequest::default()
            .set("fusion={\"rule\":\"trimmed_mean\",\"trim_permille\":300}")
            .and_then(|changed| changed.set("fusion.competence_millibits=700"))
            .and_then(|changed| changed.set("targets.symbols=8"))
            .and_then(|changed| changed.set("targets.draws=50"))
            .unwrap();
        let trimmed = FusionRule::TrimmedMean {
            competence_millibits: 700,
            trim_permille: 300,
        };
        assert_eq!(changed.fusion, trimmed);
        assert_eq!(
            (changed.targets.symbols, changed.targets.draws),
            (Some(8), 50)
        );
        let changed = changed.set("fusion.rule=exp_guard").unwrap();
        assert_eq!(Some(changed.fusion), FusionRule::named("exp_guard"));
        for bad in [
            "mode=gossip",
            "training.rang=16",
            "fusion.trim_permille=3",
            "training.rank=many",
            "fusion.rule=best",
            "rank",
            "seed=-1",
        ] {
            assert!(OpenRequest::default().set(bad).is_err(), "{bad}");
        }
    }
}
