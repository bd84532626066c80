//! The documents of a release that people and tools read: PEFT configuration, report and model card.

use std::fmt::Write as _;

use consilium_protocol::manifest::{Mode, Training};
use serde::Serialize;
use serde_json::{Value, json};

use super::gate::{Baseline, Verdict};
use super::publish::{Artefact, ReleaseInput};
use crate::fusion::{Accounts, Screened};
use crate::rounds::RecordsReport;

/// `adapter_config.json` as PEFT writes it for LoRA. The scale alpha / r is the manifest's for any rank.
pub(super) fn adapter_config(training: &Training, rank: usize, base_model: &str) -> Value {
    let saved = (!training.modules_to_save.is_empty()).then_some(&training.modules_to_save);
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": null,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": alpha(training, rank),
        "lora_dropout": 0.0,
        "target_modules": training.target_modules,
        "modules_to_save": saved,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": false,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": null,
        "layers_pattern": null,
        "auto_mapping": null,
    })
}

/// An integer wherever it can be, as PEFT has it.
fn alpha(training: &Training, rank: usize) -> Value {
    let (rank, own) = (rank as u64, u64::from(training.rank.max(1)));
    let scaled = u64::from(training.alpha) * rank;
    if scaled.is_multiple_of(own) {
        json!(scaled / own)
    } else {
        json!(scaled as f64 / own as f64)
    }
}

/// `report.json`: what went in and every number behind the decision. Free of clocks, so that a replay of the log writes the
/// same bytes.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    version: u32,
    consortium: &'a str,
    round: u64,
    manifest: String,
    charter: String,
    pivot: String,
    reference: String,
    targets: Option<String>,
    adapter: String,
    records: Option<&'a RecordsReport>,
    contributions: &'a [Artefact],
    truncation_ppm: &'a [u32],
    gate: &'a Verdict,
}

impl<'a> Report<'a> {
    pub(super) fn of(input: &ReleaseInput<'a>) -> Self {
        let manifest = input.manifest;
        Self {
            version: 1,
            consortium: manifest.consortium.as_str(),
            round: manifest.round.0,
            manifest: input.manifest_digest.to_string(),
            charter: manifest.charter.to_string(),
            pivot: manifest.pivot.to_string(),
            reference: manifest.reference.to_string(),
            targets: input.targets.map(|digest| digest.to_string()),
            adapter: input.adapter_digest.to_string(),
            records: input.records,
            contributions: input.contributions,
            truncation_ppm: input.truncation_ppm,
            gate: input.verdict,
        }
    }
}

/// `README.md` with the front matter that model hubs read.
pub(super) fn card(input: &ReleaseInput<'_>) -> String {
    let manifest = input.manifest;
    let verdict = input.verdict;
    let name = format!("{}-round-{}", manifest.consortium, manifest.round);
    let mut sources: Vec<&str> = input
        .contributions
        .iter()
        .map(|artefact| artefact.institution.as_str())
        .collect();
    sources.sort_unstable();
    sources.dedup();
    let baseline = match verdict.baseline {
        Baseline::Pivot => "the pivot before the round",
        Baseline::LastRelease => "the last release",
    };
    let mut text = format!(
        "---\n\
         license: {license}\n\
         base_model: {base}\n\
         library_name: peft\n\
         pipeline_tag: text-generation\n\
         tags:\n- lora\n- consilium\n- federated\n- distillation\n\
         model-index:\n\
         - name: {name}\n  results:\n\
         \x20 - task:\n      type: text-generation\n\
         \x20   dataset:\n      name: private holdouts of {count} institutions\n      type: private\n\
         \x20   metrics:\n    - type: bits_per_byte\n      name: bits per byte, mean over the sites\n      value: {mean:.6}\n\
         ---\n\n\
         # {name}\n\n\
         LoRA adapter that {members} made together in round {round} of the consortium {consortium}, mode {mode}. {left}\n\n\
         ## How good it is\n\n\
         Bits per byte on each site's private holdout, measured by the site itself; lower is better.\n\n\
         | site | this release | pivot | own model | best of both | change | accuracy |\n\
         |---|---|---|---|---|---|---|\n",
        license = quoted(input.license),
        base = quoted(input.base_model),
        count = verdict.sites.len(),
        mean = verdict.candidate_mean,
        members = if sources.is_empty() {
            "the members".to_owned()
        } else {
            sources.join(", ")
        },
        round = manifest.round,
        consortium = manifest.consortium,
        mode = manifest.mode.name(),
        left = what_left(manifest.mode),
    );
    for site in &verdict.sites {
        let evaluation = &site.evaluation;
        let accuracy = evaluation
            .candidate
            .accuracy
            .map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0));
        let source = evaluation.source.map_or_else(
            || "not measured".to_owned(),
            |score| format!("{:.4}", score.bits_per_byte),
        );
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {} | {:.4} | {:.4} | {source} | {:.4} | {:+.1} % | {accuracy} |",
            site.institution,
            evaluation.candidate.bits_per_byte,
            evaluation.pivot.bits_per_byte,
            site.own_best,
            site.change_permille / 10.0,
        );
    }
    let _ = writeln!(
        text,
        "\nThe gate asked that no site fares worse than the better of its own model and the pivot by more than {bound} %, and\n\
         that the mean, {mean:.4}, is below that of {baseline} on the same holdouts, {before:.4}.",
        bound = f64::from(verdict.bound_permille) / 10.0,
        mean = verdict.compared_mean,
        before = verdict.baseline_mean,
    );
    if let Some(records) = input.records {
        if let Some(accounts) = &records.accounts {
            worth(&mut text, accounts);
        }
        screened(&mut text, &records.screening);
    }
    let _ = write!(
        text,
        "\n## How to use it\n\n\
         ```python\n\
         from peft import AutoPeftModelForCausalLM\n\
         model = AutoPeftModelForCausalLM.from_pretrained(\"path/to/this/folder\")\n\
         ```\n\n\
         ## How to check it\n\n\
         `model.sig` is an OpenSSF model signature over every file here but itself and `{proof}`:\n\
         `model_signing verify key . --signature model.sig --public_key release.pub`, with the key that the consortium published.\n\
         `{proof}` proves that the release is in the consortium's log. `report.json` lists every contribution by digest.\n\n\
         ## Limits\n\n\
         Log-probabilities and adapters are not private by themselves. A formal guarantee holds only for sites that trained on\n\
         their data with differential privacy. The numbers above are the sites' own measurements; nobody else saw the holdouts.\n",
        proof = super::publish::PROOF,
    );
    text
}

/// What left the sites in a round of this mode.
const fn what_left(mode: Mode) -> &'static str {
    match mode {
        Mode::Unified => {
            "Each site trained its own\nmodel on its own data at home; what left were next-byte log-probabilities on public text, and adapters \
             trained on them."
        }
        Mode::Pairwise => {
            "Each site trained its own\nmodel on its own data at home and distilled it into the pivot there, on public text; what left were \
             adapters."
        }
        Mode::Adapters => {
            "Each site trained\nadapters of the pivot on its own private data at home; what left were these adapters."
        }
    }
}

/// What each institution's records are worth, as a table.
fn worth(text: &mut String, accounts: &Accounts) {
    let how = accounts.orders.map_or_else(
        || "all coalitions were fused".to_owned(),
        |orders| format!("sampled from {orders} orders of arrival"),
    );
    let _ = writeln!(
        text,
        "\n## Who contributed what\n\n\
         Bits per byte that the fused records save by each institution, on {} items of public text; {how}. Shapley values of a\n\
         domain add up to what the fusion saves of 8 bits.\n\n\
         | domain | institution | alone | leave-one-out | Shapley |\n|---|---|---|---|---|",
        accounts.items
    );
    for domain in &accounts.domains {
        for (who, member) in accounts.institutions.iter().zip(&domain.members) {
            let error = member
                .standard_error
                .map_or_else(String::new, |error| format!(" ± {error:.4}"));
            let _ = writeln!(
                text,
                "| {} | {who} | {:.4} | {:+.4} | {:+.4}{error} |",
                domain.domain, member.alone, member.leave_one_out, member.shapley
            );
        }
    }
}

/// What screening found, if anything.
fn screened(text: &mut String, screening: &Screened) {
    for flag in &screening.flags {
        let kept = if screening.excluded.contains(&flag.institution) {
            "its records took no part"
        } else {
            "its records took part"
        };
        let of = flag
            .of
            .as_ref()
            .map_or_else(String::new, |of| format!(" of {of}"));
        let _ = writeln!(
            text,
            "\nFlag: {} ({:?}{of}), {} where at least {} is expected; {kept}.",
            flag.institution, flag.finding, flag.measured, flag.bound
        );
    }
}

/// A YAML string: JSON's are.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
