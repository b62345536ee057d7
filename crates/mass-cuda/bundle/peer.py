#!/usr/bin/env python3
"""The same steps in PyTorch, eager and compiled, single precision, on the same card: peer.py [RUNS].

Its mixture is a loop over experts of index_select, two linear layers and index_add_. TF32 is off, as on the other side.
"""

import sys
import time


def main():
    try:
        import torch
    except ImportError:
        print("python3 has no torch: PyTorch was not measured")
        return
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: PyTorch was not measured")
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    nn, F, device = torch.nn, torch.nn.functional, "cuda"
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name(0)}, f32; medians of {runs}")

    def median(step):
        times = []
        for i in range(runs + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2] * 1e3

    def measure(name, make):
        """Prints the time of the step that `make` gives for a way to prepare a model."""
        for way, prepare in [("eager", lambda m: m), ("compiled", torch.compile)]:
            try:
                ms = f"{median(make(prepare)):9.3f} ms"
            except Exception as e:  # torch.compile needs Triton and a C compiler
                ms = f"not measured: {type(e).__name__}: {(str(e).splitlines() or ['?'])[0][:60]}"
            print(f"{name:<58} {way:<8} {ms}", flush=True)

    class Mixture(nn.Module):
        def __init__(self, dim, hidden, experts, k):
            super().__init__()
            self.k = k
            self.gate = nn.Linear(dim, experts, bias=False)
            self.fc1 = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(experts))
            self.fc2 = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(experts))

        def forward(self, x):
            shape = x.shape
            x = x.reshape(-1, shape[-1])
            weight, chosen = torch.topk(F.softmax(self.gate(x), -1), self.k)
            weight = weight / weight.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for e, (fc1, fc2) in enumerate(zip(self.fc1, self.fc2)):
                token, place = (chosen == e).nonzero(as_tuple=True)
                if token.numel():
                    out = fc2(F.gelu(fc1(x.index_select(0, token))))
                    y = y.index_add(0, token, out * weight[token, place, None])
            return y.reshape(shape)

    class Layer(nn.Module):
        def __init__(self, dim, heads, network, pre):
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads
            self.n1, self.n2, self.network, self.pre = nn.LayerNorm(dim), nn.LayerNorm(dim), network, pre

        def attend(self, x):
            b, s, d = x.shape
            q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.pre)
            return self.out(y.transpose(1, 2).reshape(b, s, d))

        def forward(self, x):
            if self.pre:
                x = x + self.attend(self.n1(x))
                return x + self.network(self.n2(x))
            x = self.n1(x + self.attend(x))
            return self.n2(x + self.network(x))

    def dense(dim, hidden):
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def mixture(prepare):
        layer = Mixture(1024, 4096, 16, 2).to(device)
        x = torch.randn(16384, 1024, device=device, requires_grad=True)
        dy, run = torch.randn_like(x), prepare(layer)

        def step():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            run(x).backward(dy)

        return step

    measure("mixture 16384 tokens, 1024 x 4096 x 16, top 2, gradients", mixture)

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(64, 128), nn.Embedding(64, 128)
            self.layer = Layer(128, 4, Mixture(128, 256, 12, 2), True)
            self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)

        def forward(self, ids):
            x = self.words(ids) + self.places.weight[: ids.shape[1]]
            return self.head(self.norm(self.layer(x)))

    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(28996, 1024), nn.Embedding(512, 1024)
            networks = [Mixture(1024, 4096, 8, 2) if i == 10 else dense(1024, 4096) for i in range(24)]
            self.layers = nn.ModuleList(Layer(1024, 16, n, False) for n in networks)
            self.pooler, self.head = nn.Linear(1024, 1024), nn.Linear(1024, 2)

        def forward(self, ids):
            x = F.dropout(self.words(ids) + self.places.weight[: ids.shape[1]], 0.1)
            for layer in self.layers:
                x = F.dropout(layer(x), 0.1)
            return self.head(torch.tanh(self.pooler(x[:, 0])))

    for name, made, ids, targets in [
        ("language model of one layer, 32 x 64", Language, torch.randint(0, 64, (32, 64)), None),
        ("BERT-large, 32 x 128", Bert, torch.randint(1, 28996, (32, 128)), torch.randint(0, 2, (32,))),
    ]:
        ids = ids.to(device)
        wanted = ids.reshape(-1) if targets is None else targets.to(device)

        def training(prepare):
            model = made().to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            run = prepare(model)

            def step():
                optimizer.zero_grad(set_to_none=True)
                logits = run(ids)
                F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted).backward()
                optimizer.step()

            return step

        measure(name + ", with AdamW", training)


main()
