//! A small round for the tests of this half: manifest, shard, adapter, evaluation.

use consilium_protocol::evaluation::{Evaluation, Score};
use consilium_protocol::manifest::{
    Deadlines, Defence, Distillation, FusionRule, Manifest, MergeRule, Mode, Screening,
    SymbolSpace, TargetForm, Training,
};
use consilium_protocol::reference::ReferenceSet;
use consilium_protocol::shard::{Header, Shard, Symbols};
use consilium_protocol::{ConsortiumId, Digest, InstitutionId, RoundId};
use safetensors::{Dtype, tensor::TensorView};

pub(crate) const REFERENCE: &[u8] =
    b"{\"target\":\"one\"}\n{\"target\":\"two\"}\n{\"context\":\"c\",\"target\":\"three\"}\n";

pub(crate) fn training() -> Training {
    Training {
        inner_rounds: 2,
        local_steps: 3,
        rows: 2,
        row_tokens: 32,
        learning_rate_micros: 10_000,
        warmup_permille: 50,
        final_permille: 20,
        cross_entropy_permille: 0,
        rank: 4,
        alpha: 8,
        target_modules: vec!["q_proj".to_owned(), "v_proj".to_owned()],
        modules_to_save: vec!["lm_head".to_owned()],
        outer_rate_permille: 700,
        outer_momentum_permille: 700,
        distillation: Distillation::Trie,
        merge: MergeRule::Product,
        defence: Defence::None,
    }
}

/// Round 1 of consortium `demo`: three items in two shards.
pub(crate) fn manifest() -> Manifest {
    Manifest {
        consortium: ConsortiumId::new("demo").unwrap(),
        round: RoundId(1),
        mode: Mode::Unified,
        charter: Digest::of(b"charter"),
        pivot: Digest::of(b"pivot"),
        reference: Digest::of(REFERENCE),
        items: 3,
        symbol_space: SymbolSpace::Bytes,
        symbols: 16,
        fill_permille: 995,
        shard_items: 2,
        fusion: FusionRule::Softmax { sharpness: 20 },
        targets: TargetForm::default(),
        screening: Screening::default(),
        training: training(),
        members: vec![InstitutionId::new("clinic").unwrap()],
        quorum: 1,
        deadlines: Deadlines {
            contribute_seconds: 60,
            distil_seconds: 60,
            evaluate_seconds: 60,
        },
        max_weight: None,
        seed: 1,
        previous_release: None,
    }
}

/// A valid shard for the reference set above.
pub(crate) fn shard(manifest: &Manifest, index: u32) -> Vec<u8> {
    let range = manifest.shard_range(index);
    let set = ReferenceSet::parse(REFERENCE).unwrap();
    let mut offsets = vec![0_u64];
    for item in range.clone() {
        let item = &set.items()[usize::try_from(item).unwrap()];
        let end = offsets.last().unwrap() + u64::try_from(item.positions()).unwrap();
        offsets.push(end);
    }
    let n = usize::try_from(*offsets.last().unwrap()).unwrap();
    let k = usize::from(manifest.symbols);
    let shard = Shard {
        header: Header::new(
            manifest.reference,
            range,
            SymbolSpace::Bytes,
            manifest.symbols,
        ),
        symbols: Symbols::Bytes(vec![b'e'; n * k]),
        codes: (0..n * k)
            .map(|at| if at % k == 0 { 16 } else { 255 })
            .collect(),
        end: vec![32; n],
        tail: vec![32; n],
        missed: vec![255; (offsets.len() - 1) * 2],
        offsets,
    };
    shard.to_bytes().unwrap()
}

/// The same round in token space.
pub(crate) fn tokens(manifest: Manifest) -> Manifest {
    Manifest {
        symbol_space: SymbolSpace::Tokens {
            tokenizer: Digest::of(b"tokenizer.json"),
            size: 320,
        },
        ..manifest
    }
}

/// A valid shard of tokens: two positions for each item.
pub(crate) fn token_shard(manifest: &Manifest, index: u32) -> Shard {
    let range = manifest.shard_range(index);
    let items = usize::try_from(range.end - range.start).unwrap();
    let (n, k) = (2 * items, usize::from(manifest.symbols));
    Shard {
        header: Header::new(
            manifest.reference,
            range,
            manifest.symbol_space,
            manifest.symbols,
        ),
        symbols: Symbols::Tokens(vec![300; n * k]),
        codes: (0..n * k)
            .map(|at| if at % k == 0 { 16 } else { 255 })
            .collect(),
        end: vec![255; n],
        tail: vec![16; n],
        missed: vec![255; 2 * items],
        offsets: (0..=items).map(|item| 2 * item as u64).collect(),
    }
}

/// A valid adapter of the manifest whose values are all `value`.
pub(crate) fn adapter(manifest: &Manifest, value: u8) -> Vec<u8> {
    let rank = usize::try_from(manifest.training.rank).unwrap();
    let layer = "base_model.model.model.layers.0.self_attn.q_proj";
    let (a, b) = (
        format!("{layer}.lora_A.weight"),
        format!("{layer}.lora_B.weight"),
    );
    let tensors: [(&str, &[usize]); 3] = [
        (&a, &[rank, 8]),
        (&b, &[8, rank]),
        ("base_model.model.lm_head.weight", &[10, 8]),
    ];
    let mut bytes = safetensors(&tensors, &[("format", "pt")]);
    *bytes.last_mut().unwrap() = value;
    bytes
}

pub(crate) fn evaluation() -> Vec<u8> {
    let score = Score {
        bits_per_byte: 1.5,
        accuracy: Some(0.5),
    };
    Evaluation {
        candidate: score,
        pivot: score,
        source: Some(score),
    }
    .to_bytes()
    .unwrap()
}

/// A safetensors file of zeros.
pub(crate) fn safetensors(tensors: &[(&str, &[usize])], metadata: &[(&str, &str)]) -> Vec<u8> {
    let longest = tensors
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>());
    let zeros = vec![0; longest.max().unwrap_or(0) * 4];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = &zeros[..shape.iter().product::<usize>() * 4];
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
        ((*name).to_owned(), view)
    });
    let texts = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    safetensors::serialize(views, Some(texts)).unwrap()
}
