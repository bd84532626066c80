//! The step that is measured: the shapes and losses of `torch/step.py`.

use std::sync::Arc;

use consilium_kernels::loss::{ItemLoss, NO_LABEL, Tail, Term};
use consilium_kernels::quant::Format;
use consilium_kernels::{Records, TokenKind, Vocab};
use consilium_node::worker::model::{
    BaseStorage, LoraConfig, Model, ModelConfig, OffloadFile, Packed, random_as,
};
use consilium_node::worker::train::{AdamW, AdamWConfig, TrainError};

use super::child::status;

const VOCABULARY: usize = 8000;

/// Listed tokens of a target.
const LISTED: usize = 32;

#[derive(Clone, Copy)]
pub(crate) struct Shape {
    width: usize,
    inner: usize,
    layers: usize,
    rows: u32,
    length: u32,
}

impl Shape {
    pub(crate) const SMALL: Self = Self {
        width: 256,
        inner: 672,
        layers: 4,
        rows: 16,
        length: 128,
    };
    const LARGE: Self = Self {
        width: 1024,
        inner: 2752,
        layers: 12,
        rows: 2,
        length: 128,
    };
}

/// How weights and activations are held.
#[derive(Clone, Copy, Default)]
pub(crate) struct Weights {
    format: Format,
    again: bool,
    offload: bool,
}

impl Weights {
    pub(crate) const ALL: [Self; 10] = [
        Self::new(Format::F32, false, false),
        Self::new(Format::Bf16, false, false),
        Self::new(Format::Int8, false, false),
        Self::new(Format::Nf4, false, false),
        Self::new(Format::F32, true, false),
        Self::new(Format::Bf16, true, false),
        Self::new(Format::Int8, true, false),
        Self::new(Format::Nf4, true, false),
        Self::new(Format::F32, true, true),
        Self::new(Format::Nf4, true, true),
    ];

    const fn new(format: Format, again: bool, offload: bool) -> Self {
        Self {
            format,
            again,
            offload,
        }
    }

    pub(crate) fn name(self) -> String {
        let mut name = format!("{:?}", self.format).to_lowercase();
        for (word, is_on) in [("+checkpoint", self.again), ("+offload", self.offload)] {
            if is_on {
                name.push_str(word);
            }
        }
        name
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Loss {
    Labels,
    Listed,
}

pub(crate) struct Job {
    model: Model,
    vocab: Vocab,
    optimiser: AdamW,
    batch: Packed,
    labels: Vec<u32>,
    listed: Option<Records<u32>>,
}

impl Job {
    pub(crate) fn new(shape: Shape, weights: &Weights, loss: Loss) -> Self {
        let spellings: Vec<String> = (1..VOCABULARY).map(|id| format!("t{id}")).collect();
        let tokens = spellings
            .iter()
            .map(|text| TokenKind::Bytes(text.as_bytes()));
        let vocab = Vocab::new(std::iter::once(TokenKind::EndOfRecord).chain(tokens))
            .expect("a plain vocabulary");
        let config = ModelConfig::llama(VOCABULARY, shape.width, shape.layers, 8, shape.inner);
        let here = std::env::current_exe().expect("this program");
        let folder = here.parent().expect("a folder");
        let offload = weights
            .offload
            .then(|| Arc::new(OffloadFile::create(folder).expect("a folder that can be written")));
        let storage = BaseStorage {
            format: weights.format,
            tables: true,
            offload,
            placement: None,
        };
        let order = vocab.id_of_rank().to_vec();
        let mut model = random_as(config, order, 1, &storage).expect("a plain model");
        let lora = LoraConfig {
            rank: 16,
            alpha: 32.0,
            embeddings_and_head: false,
        };
        model.attach_lora(lora, 1).expect("a plain model");
        model.checkpoint_activations(weights.again);
        let mut random = Random(1);
        let mut batch = Packed::default();
        for _ in 0..shape.rows {
            batch.push((0..shape.length).map(|_| random.below(VOCABULARY)));
        }
        let labels = next_of_each(&model, &batch);
        let rows = batch.tokens.len();
        let optimiser = AdamW::new(&model, AdamWConfig::default()).expect("plain weights");
        Self {
            model,
            vocab,
            optimiser,
            batch,
            labels,
            listed: (loss == Loss::Listed).then(|| targets(&mut random, rows)),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    pub(crate) fn step(&mut self) {
        let count = self.batch.tokens.len();
        let weight = 1.0 / count as f32;
        let term = match &self.listed {
            Some(target) => Term::Tokens {
                target: target.view(),
                weight,
                tail: Tail::Ghost,
            },
            None => Term::Labels {
                labels: &self.labels,
                weight,
            },
        };
        let rows = (0u32..).take(count).collect();
        let pass = self
            .model
            .forward(&self.batch, rows)
            .expect("a fitting batch");
        let items = [ItemLoss {
            tokens: &[],
            terms: &[term],
        }];
        let (loss, gradients) = pass
            .backward::<TrainError>(&self.vocab, &items)
            .expect("finite numbers");
        assert!(loss.is_finite());
        self.optimiser
            .step(&mut self.model, &gradients, 1e-3)
            .expect("finite gradients");
    }
}

/// Ranks of the tokens that follow, none for the last of a row.
fn next_of_each(model: &Model, batch: &Packed) -> Vec<u32> {
    let ranks = model.rank_of_id();
    let mut labels = vec![NO_LABEL; batch.tokens.len()];
    for segment in &batch.segments {
        for row in segment.start..segment.start + segment.len - 1 {
            labels[row] = ranks[batch.tokens[row + 1] as usize];
        }
    }
    labels
}

fn targets(random: &mut Random, rows: usize) -> Records<u32> {
    let mut symbols = Vec::with_capacity(rows * LISTED);
    for _ in 0..rows {
        let mut ids = Vec::new();
        while ids.len() < LISTED {
            ids.push(random.below(VOCABULARY));
            ids.sort_unstable();
            ids.dedup();
        }
        symbols.extend(ids);
    }
    Records::from_columns(
        LISTED,
        symbols,
        vec![80; rows * LISTED],
        vec![],
        vec![80; rows],
    )
    .expect("ascending ids")
}

/// Takes three steps and says what they took: bytes beyond the model, of the base, and of the process.
pub(crate) fn peak(shape: &str, weights: &str) -> String {
    let shape = if shape == "large" {
        Shape::LARGE
    } else {
        Shape::SMALL
    };
    let weights = Weights::ALL
        .into_iter()
        .find(|known| known.name() == weights);
    let weights = weights.expect("a name of the table");
    let mut job = Job::new(shape, &weights, Loss::Labels);
    // The peak starts again, without what building the model took.
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
    let before = status("VmRSS");
    for _ in 0..3 {
        job.step();
    }
    let whole = status("VmHWM");
    format!("{} {} {whole}", whole - before, job.model.base_bytes())
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    #[expect(clippy::cast_possible_truncation, reason = "below a small bound")]
    fn below(&mut self, bound: usize) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as u32
    }
}
