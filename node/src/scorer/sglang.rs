//! SGLang's native endpoint, `POST /generate`.
//!
//! `input_top_logprobs` has the K likeliest tokens at each position from `logprob_start_len` on, `input_token_logprobs` the
//! prompt's own; both as arrays of log-probability, token id and, if asked for, text, the first entry empty.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::answer::{Answer, IMPOSSIBLE, Pairs, Prompt};

#[derive(Serialize)]
struct Request<'a> {
    input_ids: Vec<&'a [u32]>,
    sampling_params: Sampling,
    return_logprob: bool,
    logprob_start_len: Vec<usize>,
    top_logprobs_num: Vec<u32>,
    return_text_in_logprobs: bool,
}

#[derive(Serialize)]
struct Sampling {
    max_new_tokens: u32,
    temperature: f32,
}

#[derive(Deserialize)]
struct Generated {
    meta_info: Meta,
}

#[derive(Deserialize)]
struct Meta {
    input_token_logprobs: Option<Vec<Entry>>,
    input_top_logprobs: Option<Vec<Option<Vec<Entry>>>>,
}

/// Log-probability, id, text.
#[derive(Deserialize)]
struct Entry(Option<f32>, u32, #[serde(default)] Option<String>);

/// Body of a request for the `top` likeliest tokens; `texts` asks for what they spell.
pub(super) fn request(prompts: &[Prompt], top: u32, texts: bool) -> Vec<u8> {
    let request = Request {
        input_ids: prompts.iter().map(|prompt| prompt.ids.as_slice()).collect(),
        sampling_params: Sampling {
            max_new_tokens: 0,
            temperature: 1.0,
        },
        return_logprob: true,
        // The entry at the start itself is empty.
        logprob_start_len: prompts
            .iter()
            .map(|prompt| prompt.from.saturating_sub(1))
            .collect(),
        top_logprobs_num: vec![top; prompts.len()],
        return_text_in_logprobs: texts,
    };
    // Numbers, which JSON always carries.
    serde_json::to_vec(&request).unwrap_or_default()
}

/// Reads the response to `prompts`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(bytes: &[u8], prompts: &[Prompt]) -> Result<Answer, String> {
    let generated: Vec<Generated> = serde_json::from_slice(bytes)
        .map_err(|error| format!("no list of results, or a truncated one: {error}"))?;
    let (got, expected) = (generated.len(), prompts.len());
    if got != expected {
        return Err(format!("{got} results for {expected} prompts"));
    }
    let mut answer = Answer::default();
    for (index, (result, prompt)) in generated.into_iter().zip(prompts).enumerate() {
        let rows = rows(result.meta_info, prompt, &mut answer.spelled)
            .map_err(|problem| format!("result {index}: {problem}"))?;
        answer.rows.push(rows);
    }
    Ok(answer)
}

fn rows(
    meta: Meta,
    prompt: &Prompt,
    spelled: &mut BTreeMap<u32, String>,
) -> Result<Vec<Pairs>, String> {
    let (Some(own), Some(top)) = (meta.input_token_logprobs, meta.input_top_logprobs) else {
        return Err(
            "no input_token_logprobs or input_top_logprobs; is this SGLang, and nothing in front of it?".to_owned(),
        );
    };
    let wanted = prompt.wanted();
    if own.len() != top.len() || own.len() <= wanted {
        return Err(format!(
            "{} and {} entries where {wanted} and the start were asked for; start SGLang with --disable-radix-cache",
            own.len(),
            top.len()
        ));
    }
    let skipped = own.len() - wanted;
    let mut rows = Vec::with_capacity(wanted);
    let entries = own.into_iter().zip(top).skip(skipped);
    for ((own, top), &id) in entries.zip(prompt.observed()) {
        if own.1 != id {
            return Err(format!("token {} where {id} was sent", own.1));
        }
        let top = top.ok_or(
            "a position without its likeliest tokens; start SGLang with --disable-radix-cache",
        )?;
        let mut row = Vec::with_capacity(top.len() + 1);
        for entry in top.into_iter().chain([own]) {
            if row.iter().any(|&(listed, _)| listed == entry.1) {
                continue;
            }
            row.push((entry.1, entry.0.unwrap_or(IMPOSSIBLE)));
            if let Some(text) = entry.2 {
                spelled.insert(entry.1, text);
            }
        }
        rows.push(row);
    }
    Ok(rows)
}
