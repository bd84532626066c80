"""The step of `benches/training.rs` in torch: a Llama with LoRA on its seven projections, cross-entropy or KL on listed tokens, AdamW.

Protocol: prints `ready`, then answers each line `CASE` with the seconds of one step, by the clock and of processors. `step.py memory
CASE` instead takes three steps and prints the bytes that they had at most beyond those of the model. Cases:

plain   modules written here, the fastest operators that torch has for them; needs torch alone
listed  the same with KL on 32 listed tokens in place of labels
peft    transformers and peft, the loop that users write
gkd     trl's generalised Jensen-Shannon loss, a teacher of the same size in the loop
gold    trl's universal logit distillation, a teacher of another vocabulary in the loop
"""

import os
import sys
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", TRL_EXPERIMENTAL_SILENCE="1")

import torch
from torch import nn
from torch.nn import functional as F

ROWS, LENGTH, VOCABULARY, WIDTH, LAYERS, HEADS = 16, 128, 8000, 256, 4, 8
INNER = WIDTH * 8 // 3 // 32 * 32
RANK, ALPHA, LISTED = 16, 32, 32


class Adapted(nn.Module):
    """A frozen linear layer and its factors."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, inputs) / RANK)
        self.b = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(WIDTH), requires_grad=False) for _ in range(2)])
        self.q, self.k, self.v, self.o = (Adapted(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = Adapted(WIDTH, INNER), Adapted(WIDTH, INNER), Adapted(INNER, WIDTH)

    def forward(self, x, cosines, sines):
        y = F.rms_norm(x, (WIDTH,), self.norms[0], 1e-6)
        q, k, v = (part(y).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        y = F.rms_norm(x, (WIDTH,), self.norms[1], 1e-6)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        half = WIDTH // HEADS // 2
        angles = torch.outer(torch.arange(LENGTH), 10000 ** (-torch.arange(half) / half))
        self.cosines, self.sines = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cosines, self.sines)
        return self.head(F.rms_norm(x, (WIDTH,), self.norm, 1e-6))


def rotate(x, cosines, sines):
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def hugging_face(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def adapted():
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(hugging_face(VOCABULARY), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM"))


def labelled(model, ids):
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


def on_listed(model, ids):
    listed = torch.stack([torch.randperm(VOCABULARY)[:LISTED] for _ in range(ROWS * LENGTH)]).view(ROWS, LENGTH, LISTED)
    p = torch.softmax(torch.randn(ROWS, LENGTH, LISTED) * 2, -1)
    return lambda: -(p * torch.log_softmax(model(ids), -1).gather(-1, listed)).sum(-1).mean()


def gkd(model, ids):
    from trl.experimental.gkd import GKDTrainer

    teacher = hugging_face(VOCABULARY).eval()

    def loss():
        with torch.no_grad():
            target = teacher(input_ids=ids).logits
        return GKDTrainer.generalized_jsd_loss(student_logits=model(input_ids=ids).logits, teacher_logits=target, labels=ids, beta=0.5)

    return loss


def gold(model, ids):
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    other = 12000
    teacher = hugging_face(other).eval()
    config = GOLDConfig(output_dir=tempfile.mkdtemp(), use_uld_loss=True, report_to=[], use_cpu=True)
    config.use_extended_uld = False
    criterion = ULDLoss(config, student_tokenizer=byte_tokenizer(VOCABULARY), teacher_tokenizer=byte_tokenizer(other))
    ids = ids % 250 + 3
    labels = ids.clone()
    labels[:, :4] = -100

    def loss():
        with torch.no_grad():
            target = teacher(input_ids=ids).logits
        return criterion(student_logits=model(input_ids=ids).logits, teacher_logits=target, student_labels=labels, teacher_labels=labels,
                         student_input_ids=ids, teacher_input_ids=ids)

    return loss


def byte_tokenizer(size):
    """All bytes, and tokens that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<f{i}>" for i in range(len(tokens), size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def prepare(case):
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    model = Llama() if case in ("plain", "listed") else adapted()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)
    loss = {
        "plain": lambda: lambda: labelled(model, ids),
        "listed": lambda: on_listed(model, ids),
        "peft": lambda: lambda: model(input_ids=ids, labels=ids).loss,
        "gkd": lambda: gkd(model, ids),
        "gold": lambda: gold(model, ids),
    }[case]()

    def step():
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step


def status(field):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def warm():
    """Loads the code that a step runs, so that it does not count as memory of the step."""
    layer = Layer()
    F.cross_entropy(layer(torch.randn(1, 8, WIDTH), torch.ones(8, WIDTH // HEADS), torch.zeros(8, WIDTH // HEADS))[0], torch.zeros(8).long()).backward()
    torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 1e-3, fused=True).step()


def main():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1:2] == ["memory"]:
        warm()
        step = prepare(sys.argv[2])
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = status("VmRSS")
        for _ in range(3):
            step()
        print(status("VmHWM") - before)
        return
    print("ready", flush=True)
    steps = {}
    for line in sys.stdin:
        case = line.strip()
        try:
            if case not in steps:
                steps = {case: prepare(case)}
            start = time.perf_counter(), time.process_time()
            steps[case]()
            print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)
        except ImportError as missing:
            print(f"missing {missing.name}", flush=True)


main()
