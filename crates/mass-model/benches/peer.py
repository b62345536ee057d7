"""The same layers and training steps in PyTorch, one step at a time on request, so that all sides can take turns.

Started by the example `compare`. It reads lines from standard input and answers each with one line:

    moe 4096 ...    a task with its sizes: forgets what was built before; the answer names the task's variants
    build eager     builds a variant; the answer is `ready` and the mean number of experts a token, or `missing` and why
    go eager        makes one step of a variant; the answer is its seconds
    memory          the answer is the peak resident size of this process in KiB

Variants: `eager`; `compile`, which is `torch.compile` with its defaults on the layer, the loss or the forward pass (graph breaks
and recompilations where routing depends on data are part of it); for the mixture layer also `grouped_mm`, which computes all
experts by one grouped product, and `grouped_mm+compile`. MASS_PEER_VARIANTS=eager,grouped_mm leaves the others out:
compiling a mixture layer of 16 experts takes minutes.
"""
import os
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": F.relu, "gelu_erf": F.gelu, "silu": F.silu}


def read_floats(path, shape):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    return torch.frombuffer(data, dtype=torch.float32).reshape(shape).clone()


class Moe(nn.Module):
    """Top-k or top-p experts: one index_select, two products and one index_add_ for each expert."""

    def __init__(self, d, hidden, experts, activation, k=0, p=0.0):
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts, self.act, self.k, self.p = experts, ACTIVATIONS[activation], k, p
        self.make(d, hidden)

    def make(self, d, hidden):
        self.fc1 = nn.ModuleList(nn.Linear(d, hidden) for _ in range(self.experts))
        self.fc2 = nn.ModuleList(nn.Linear(hidden, d) for _ in range(self.experts))

    def route(self, x):
        """Assignments in order of experts: tokens, experts, weights, and where each expert's end."""
        r = self.gate(x).softmax(-1)
        if self.k:
            values, experts = r.topk(self.k, dim=-1)
            weights = (values / values.sum(-1, keepdim=True)).flatten()
            tokens, experts = torch.arange(len(x)).repeat_interleave(self.k), experts.flatten()
        else:
            values, experts = r.sort(-1, descending=True)
            keep = values.cumsum(-1) - values < self.p
            kept = values * keep
            tokens, slots = keep.nonzero(as_tuple=True)
            weights = (kept / kept.sum(-1, keepdim=True))[tokens, slots]
            experts = experts[tokens, slots]
        experts, order = experts.sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.experts), right=True)
        return tokens[order], experts, weights[order].unsqueeze(1), ends

    def forward(self, x):
        tokens, _, weights, ends = self.route(x)
        y = torch.zeros_like(x)
        start = 0
        for fc1, fc2, end in zip(self.fc1, self.fc2, ends.tolist()):
            if start == end:
                continue
            t = tokens[start:end]
            out = fc2(self.act(fc1(x.index_select(0, t))))
            y.index_add_(0, t, out * weights[start:end])
            start = end
        return y


class GroupedMoe(Moe):
    """The same with stacked weights: one index_select, two grouped products and one index_add_ for all experts."""

    def make(self, d, hidden):
        def uniform(fan_in, *shape):
            return nn.Parameter(torch.empty(self.experts, *shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))

        self.w1, self.b1 = uniform(d, hidden, d), uniform(d, hidden)
        self.w2, self.b2 = uniform(hidden, d, hidden), uniform(hidden, d)

    def forward(self, x):
        tokens, experts, weights, ends = self.route(x)
        ends = ends.to(torch.int32)
        # As an embedding, the addition of biases has the fastest backward pass of those there are.
        h = F.grouped_mm(x.index_select(0, tokens), self.w1.mT, offs=ends) + F.embedding(experts, self.b1)
        out = F.grouped_mm(self.act(h), self.w2.mT, offs=ends) + F.embedding(experts, self.b2)
        return torch.zeros_like(x).index_add_(0, tokens, out * weights)


def compiled(variant, f):
    return torch.compile(f) if variant.endswith("compile") else f


def moe(variant, x_path, gate_path, tokens, d, hidden, experts, activation, k, p):
    tokens, d, hidden, experts, k = map(int, (tokens, d, hidden, experts, k))
    kind = GroupedMoe if variant.startswith("grouped_mm") else Moe
    layer = kind(d, hidden, experts, activation, k, float(p))
    x = read_floats(x_path, (tokens, d)).requires_grad_()
    with torch.no_grad():
        layer.gate.weight.copy_(read_floats(gate_path, (experts, d)))
        active = len(layer.route(x)[0]) / tokens
    dy = torch.full((tokens, d), 1.0 / (tokens * d))
    forward = compiled(variant, layer)

    def step():
        x.grad = None
        layer.zero_grad()
        forward(x).backward(dy)

    return step, active


class Attention(nn.Module):
    def __init__(self, d, heads, causal, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.heads, self.causal, self.dropout = heads, causal, dropout

    def forward(self, x):
        batch, seq, d = x.shape
        q, k, v = self.qkv(x).view(batch, seq, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(batch, seq, d))


class Transformer(nn.Module):
    """One pre-norm block with a mixture layer."""

    def __init__(self, vocab, d, heads, seq, experts, hidden, k):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(seq, d)
        self.norm1, self.attention = nn.LayerNorm(d), Attention(d, heads, True)
        self.norm2, self.moe = nn.LayerNorm(d), Moe(d, hidden, experts, "gelu_erf", k=k)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, ids):
        batch, seq = ids.shape
        x = self.tokens(ids) + self.positions.weight[:seq]
        x = x + self.attention(self.norm1(x))
        x = x + self.moe(self.norm2(x).flatten(0, 1)).view_as(x)
        return self.head(self.norm(x))


def train(variant, model, loss):
    loss = compiled(variant, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, 0.0


def step(variant, vocab, d, heads, seq, batch, experts, hidden, k):
    vocab, d, heads, seq, batch, experts, hidden, k = map(int, (vocab, d, heads, seq, batch, experts, hidden, k))
    model = Transformer(vocab, d, heads, seq, experts, hidden, k)
    ids = torch.randint(vocab, (batch, seq + 1))

    def loss():
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return train(variant, model, loss)


class BertLayer(nn.Module):
    def __init__(self, d, heads, hidden, rate):
        super().__init__()
        self.attention, self.norm1 = Attention(d, heads, False, rate), nn.LayerNorm(d, eps=1e-12)
        self.fc1, self.fc2, self.norm2 = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.LayerNorm(d, eps=1e-12)
        self.rate = rate

    def forward(self, x):
        drop = lambda y: F.dropout(y, self.rate, self.training)
        x = self.norm1(x + drop(self.attention(x)))
        return self.norm2(x + drop(self.fc2(F.gelu(self.fc1(x)))))


class Bert(nn.Module):
    def __init__(self, vocab, d, heads, layers, hidden, rate=0.1):
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(vocab, d), nn.Embedding(512, d), nn.Embedding(2, d)
        self.norm, self.rate = nn.LayerNorm(d, eps=1e-12), rate
        self.layers = nn.ModuleList(BertLayer(d, heads, hidden, rate) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, ids):
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types(torch.zeros_like(ids))
        x = F.dropout(self.norm(x), self.rate, self.training)
        for layer in self.layers:
            x = layer(x)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return self.classifier(F.dropout(pooled, self.rate, self.training))


def bert(variant, vocab, d, heads, layers, hidden, batch, seq):
    vocab, d, heads, layers, hidden, batch, seq = map(int, (vocab, d, heads, layers, hidden, batch, seq))
    model = Bert(vocab, d, heads, layers, hidden)
    ids, labels = torch.randint(vocab, (batch, seq)), torch.randint(2, (batch,))
    return train(variant, model, lambda: F.cross_entropy(model(ids), labels))


class VitBlock(nn.Module):
    """A pre-norm block with layer scale."""

    def __init__(self, d, heads, hidden):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d, eps=1e-6), Attention(d, heads, False)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(d, eps=1e-6), nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))

    def forward(self, x):
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def vit_blocks(d, heads, hidden, blocks, batch, tokens):
    d, heads, hidden, blocks, batch, tokens = map(int, (d, heads, hidden, blocks, batch, tokens))
    layers = nn.Sequential(*(VitBlock(d, heads, hidden) for _ in range(blocks)))
    return d, layers, torch.randn(batch, tokens, d)


def vit(variant, *sizes):
    d, blocks, x = vit_blocks(*sizes)
    model = nn.ModuleList([blocks, nn.LayerNorm(d, eps=1e-6), nn.Linear(d, 7)])
    labels = torch.randint(7, (len(x),))
    return train(variant, model, lambda: F.cross_entropy(model[2](model[1](blocks(x))[:, 0]), labels))


def trunk(variant, *sizes):
    """The blocks and the patches before them."""
    d, blocks, x = vit_blocks(*sizes)
    patches, pixels = nn.Conv2d(3, d, 14, 14), torch.randn(len(x), 3, 98, 98)
    first = torch.randn(len(x), 1, d)

    forward = compiled(variant, lambda: blocks(torch.cat([first, patches(pixels).flatten(2).transpose(1, 2)], 1)))

    @torch.no_grad()
    def step():
        forward()

    return step, 0.0


TASKS = {"moe": moe, "step": step, "bert": bert, "vit": vit, "trunk": trunk}


def variants(task):
    names = ["eager", "compile"]
    if task == "moe":
        names += ["grouped_mm", "grouped_mm+compile"]
    asked = os.environ.get("MASS_PEER_VARIANTS")
    return [name for name in names if asked is None or name in asked.split(",")]


def compile_all(run):
    """Makes steps until three in a row have compiled nothing, so that no compilation is left for the turns."""
    # Only here, because an eager process, whose memory is measured, does not need it.
    from torch._dynamo.utils import counters

    quiet = 0
    for _ in range(30):
        before = counters["stats"]["unique_graphs"]
        run()
        quiet = quiet + 1 if counters["stats"]["unique_graphs"] == before else 0
        if quiet == 3:
            return


def build(variant, task, sizes):
    torch.manual_seed(0)
    run, active = TASKS[task](variant, *sizes)
    if variant.endswith("compile"):
        compile_all(run)
    else:
        run()
    return run, active


def main():
    torch.set_num_threads(int(sys.argv[1]))
    print(torch.__version__, flush=True)
    task, sizes, built = None, [], {}
    for line in sys.stdin:
        name, *rest = line.split()
        if name == "go":
            run = built[rest[0]]
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)
        elif name == "build":
            # Whatever keeps a variant from running (no C++ compiler, no kernel for this type) is for the table's reader to know.
            try:
                built[rest[0]], active = build(rest[0], task, sizes)
                print("ready", active, flush=True)
            except Exception as error:
                print("missing", type(error).__name__, " ".join(str(error).split())[:160], flush=True)
        elif name == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        else:
            # What was compiled for another task would count against the limit of recompilations.
            if any(variant.endswith("compile") for variant in built):
                torch.compiler.reset()
            task, sizes, built = name, rest, {}
            print(*variants(task), flush=True)


main()
