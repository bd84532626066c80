//! vLLM's completions endpoint, read at commit 002032ee (`entrypoints/openai/completion`).
//!
//! `prompt_logprobs: K` gives for every token of the prompt but the first a map from token id to log-probability: the K
//! likeliest tokens and the prompt's own. With `echo` and `max_tokens: 0` nothing is generated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::answer::{Answer, Pairs, Prompt};

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    prompt: Vec<&'a [u32]>,
    max_tokens: u32,
    echo: bool,
    prompt_logprobs: u32,
    return_token_ids: bool,
    /// Servers that report processed log-probabilities would divide by their own default.
    temperature: f32,
    /// Never the same twice: what another request left in the prefix cache has no log-probabilities.
    cache_salt: &'a str,
}

#[derive(Deserialize)]
struct Response {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    index: usize,
    prompt_logprobs: Option<Vec<Option<BTreeMap<u32, Entry>>>>,
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Entry {
    logprob: f32,
    decoded_token: Option<String>,
}

/// Body of a request for the `top` likeliest tokens.
pub(super) fn request(model: &str, prompts: &[Prompt], top: u32, salt: &str) -> Vec<u8> {
    let request = Request {
        model,
        prompt: prompts.iter().map(|prompt| prompt.ids.as_slice()).collect(),
        max_tokens: 0,
        echo: true,
        prompt_logprobs: top,
        return_token_ids: true,
        temperature: 1.0,
        cache_salt: salt,
    };
    // Numbers and text, which JSON always carries.
    serde_json::to_vec(&request).unwrap_or_default()
}

/// Reads the response to `prompts`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(bytes: &[u8], prompts: &[Prompt]) -> Result<Answer, String> {
    let response: Response = serde_json::from_slice(bytes)
        .map_err(|error| format!("no completion, or a truncated one: {error}"))?;
    let (got, expected) = (response.choices.len(), prompts.len());
    if got != expected {
        return Err(format!("{got} choices for {expected} prompts"));
    }
    let mut answer = Answer::default();
    for (index, (choice, prompt)) in response.choices.into_iter().zip(prompts).enumerate() {
        if choice.index != index {
            return Err(format!("choice {} at place {index}", choice.index));
        }
        if choice.prompt_token_ids.is_some_and(|ids| ids != prompt.ids) {
            return Err(format!(
                "choice {index} is for other token ids than were sent; something between here and vLLM rewrites prompts"
            ));
        }
        let listed = choice.prompt_logprobs.ok_or_else(|| {
            format!(
                "choice {index} has no prompt_logprobs; is this vLLM, and nothing in front of it?"
            )
        })?;
        answer
            .rows
            .push(rows(index, listed, prompt, &mut answer.spelled)?);
    }
    Ok(answer)
}

fn rows(
    index: usize,
    listed: Vec<Option<BTreeMap<u32, Entry>>>,
    prompt: &Prompt,
    spelled: &mut BTreeMap<u32, String>,
) -> Result<Vec<Pairs>, String> {
    let (got, expected) = (listed.len(), prompt.ids.len());
    if got != expected {
        return Err(format!(
            "prompt_logprobs of choice {index} has {got} entries for {expected} tokens"
        ));
    }
    let mut rows = Vec::with_capacity(prompt.wanted());
    let wanted = listed.into_iter().zip(&prompt.ids).enumerate();
    for (token, (entries, id)) in wanted.skip(prompt.from) {
        let entries = entries.ok_or_else(|| {
            format!(
                "prompt_logprobs of choice {index} is null at token {token}; start vLLM with --no-enable-prefix-caching"
            )
        })?;
        if !entries.contains_key(id) {
            return Err(format!(
                "prompt_logprobs of choice {index} lacks the prompt's own token {id} at token {token}"
            ));
        }
        let mut row = Vec::with_capacity(entries.len());
        for (id, entry) in entries {
            row.push((id, entry.logprob));
            if let Some(text) = entry.decoded_token {
                spelled.insert(id, text);
            }
        }
        rows.push(row);
    }
    Ok(rows)
}
