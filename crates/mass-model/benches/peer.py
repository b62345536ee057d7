"""The same layers and training steps in PyTorch, one step at a time on request, so that both sides can take turns.

Started by the example `compare`. Reads lines from standard input: a task with its sizes builds it, `go` makes one step and
answers with its seconds, `memory` answers with the peak resident size of this process in KiB.
"""
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
        self.fc1 = nn.ModuleList(nn.Linear(d, hidden) for _ in range(experts))
        self.fc2 = nn.ModuleList(nn.Linear(hidden, d) for _ in range(experts))
        self.act, self.k, self.p = ACTIVATIONS[activation], k, p
        self.active = 0.0

    def forward(self, x):
        r = self.gate(x).softmax(-1)
        if self.k:
            values, index = r.topk(self.k, dim=-1)
            weights = values / values.sum(-1, keepdim=True)
            keep = torch.ones_like(index, dtype=torch.bool)
        else:
            values, index = r.sort(-1, descending=True)
            keep = values.cumsum(-1) - values < self.p
            kept = values * keep
            weights = kept / kept.sum(-1, keepdim=True)
        tokens, slots = keep.nonzero(as_tuple=True)
        self.active = len(tokens) / len(x)
        order = torch.argsort(index[tokens, slots], stable=True)
        tokens, slots = tokens[order], slots[order]
        counts = torch.bincount(index[tokens, slots], minlength=len(self.fc1)).tolist()
        y = torch.zeros_like(x)
        start = 0
        for fc1, fc2, n in zip(self.fc1, self.fc2, counts):
            if n == 0:
                continue
            t, s = tokens[start:start + n], slots[start:start + n]
            out = fc2(self.act(fc1(x.index_select(0, t))))
            y.index_add_(0, t, out * weights[t, s].unsqueeze(1))
            start += n
        return y


def moe(x_path, gate_path, tokens, d, hidden, experts, activation, k, p):
    tokens, d, hidden, experts, k = map(int, (tokens, d, hidden, experts, k))
    layer = Moe(d, hidden, experts, activation, k, float(p))
    x = read_floats(x_path, (tokens, d)).requires_grad_()
    with torch.no_grad():
        layer.gate.weight.copy_(read_floats(gate_path, (experts, d)))
    dy = torch.full((tokens, d), 1.0 / (tokens * d))

    def step():
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return step, lambda: layer.active


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


def train(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def step(vocab, d, heads, seq, batch, experts, hidden, k):
    vocab, d, heads, seq, batch, experts, hidden, k = map(int, (vocab, d, heads, seq, batch, experts, hidden, k))
    model = Transformer(vocab, d, heads, seq, experts, hidden, k)
    ids = torch.randint(vocab, (batch, seq + 1))

    def loss():
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return train(model, loss), lambda: model.moe.active


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


def bert(vocab, d, heads, layers, hidden, batch, seq):
    vocab, d, heads, layers, hidden, batch, seq = map(int, (vocab, d, heads, layers, hidden, batch, seq))
    model = Bert(vocab, d, heads, layers, hidden)
    ids, labels = torch.randint(vocab, (batch, seq)), torch.randint(2, (batch,))
    return train(model, lambda: F.cross_entropy(model(ids), labels)), lambda: 0.0


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


def vit(*sizes):
    d, blocks, x = vit_blocks(*sizes)
    model = nn.ModuleList([blocks, nn.LayerNorm(d, eps=1e-6), nn.Linear(d, 7)])
    labels = torch.randint(7, (len(x),))
    return train(model, lambda: F.cross_entropy(model[2](model[1](blocks(x))[:, 0]), labels)), lambda: 0.0


def trunk(*sizes):
    """The blocks and the patches before them."""
    d, blocks, x = vit_blocks(*sizes)
    patches, pixels = nn.Conv2d(3, d, 14, 14), torch.randn(len(x), 3, 98, 98)
    first = torch.randn(len(x), 1, d)

    @torch.no_grad()
    def step():
        blocks(torch.cat([first, patches(pixels).flatten(2).transpose(1, 2)], 1))

    return step, lambda: 0.0


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    print(torch.__version__, flush=True)
    run, active = None, None
    for line in sys.stdin:
        name, *sizes = line.split()
        if name == "go":
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, active(), flush=True)
        elif name == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        else:
            run = active = None
            run, active = {"moe": moe, "step": step, "bert": bert, "vit": vit, "trunk": trunk}[name](*sizes)
            print("ready", flush=True)


main()
