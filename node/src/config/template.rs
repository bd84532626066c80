//! The file that `init` writes.

use consilium_protocol::{ConsortiumId, InstitutionId};

/// A commented file for `init`; it parses once written.
#[must_use]
pub fn template(
    consortium: &ConsortiumId,
    institution: &InstitutionId,
    aggregator: &str,
) -> String {
    format!(
        r#"# Configuration of a Consilium node. Unknown keys are refused. Relative paths start at this file's folder.

consortium = "{consortium}"
institution = "{institution}"

# The aggregator; the node only dials out (UDP).
aggregator = "{aggregator}"
# Name in the aggregator's certificate, if it is not the host above.
# server_name = "aggregator.example.org"

# Certificate and keys of this site, made by `consilium-certs`. Private keys never leave this folder.
identity = "identity"
# The charter as the operator signed it.
charter = "charter.note"

# Jobs, results and artefacts: the only folder that agent and worker share.
spool = "spool"

# Model folders as on the Hugging Face hub (config.json, tokenizer.json, *.safetensors), or names such as
# "organisation/model" of models in this machine's Hugging Face cache; nothing is ever fetched.
pivot = "pivot"
source = "source"
# Whether the source is a chat model whose own template wraps what it is given before it scores; its folder must have one.
# source_chat_template = false

# Public reference set. Named here, the node takes part only in rounds on this very file; otherwise it is fetched.
# reference = "reference.jsonl"
# Private items for the evaluation; only its mean scores leave the site.
holdout = "holdout.jsonl"

# Relative training speed of this site's worker; 0 takes part with records only. In mode "adapters" a round may weigh
# adapters by it.
# capacity = 1

# What may leave the site. Anything that is not allowed here does not.
[policy]
# Modes of rounds that this site takes part in. What leaves in each, beside mean scores on the holdout:
# "unified": records of the public reference set, then adapters trained on the fused records.
# "pairwise": adapters that were trained on this site's own records; the records stay here.
# "adapters": adapters trained on the private text under [train]. They can give that text away.
modes = ["unified"]
# Symbols per position of a record; never more than an eighth of the source's hidden size.
max_symbols = 16
# Rounds that may receive anything, over the life of the ledger.
max_rounds = 100
# Bytes per round.
max_bytes = 4_294_967_296

[worker]
# Threads; all cores without it.
# threads = 8
# Where models compute: "cpu"; "cuda", an NVIDIA device; or "auto", such a device where there is one. Programs built without
# the feature `cuda` have only "cpu". Base weights are bf16 there; int8 and nf4 are decoded by the processor, slowly.
# device = "auto"
# How the pivot's weights are stored while its adapter is trained: "f32", "bf16", "int8" or "nf4" (4 bits).
# base = "f32"
# Activations are computed again in the backward pass rather than kept: less memory, a third more work.
# checkpoint_activations = false
# The weights of the layers stay in a file in the spool (with "cuda" in the host's memory), and one layer at a time is read.
# offload = false

# Score with the source through the site's own model server; its folder above then needs only config.json and the tokenizer.
# Only the public reference set is sent there. Start vLLM with --no-enable-prefix-caching --max-logprobs 64.
# [source_server]
# kind = "vllm"
# url = "http://127.0.0.1:8000"
# model = "our-model"
# Tokens listed per position; the fewer, the less of the source is seen.
# top = 64
# File with the server's key, if it has one.
# key_file = "server.key"

# Private text that rounds of mode "adapters" train on: files or folders, as for `consilium-node train`.
# [train]
# data = ["private.jsonl"]

# The site's own training command, for `consilium-node train --external`; see examples/external.
# [train.external]
# command = ["torchrun", "--nproc-per-node", "8", "train_lora.py"]
# timeout_hours = 24
"#
    )
}
