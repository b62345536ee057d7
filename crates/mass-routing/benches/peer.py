"""Top-p routing as its authors' PyTorch gate does it: softmax, sort, cumsum, mask, then an argsort by expert.

Called by `cargo run --release --example compare_gate`; prints one JSON object per line.
"""
import json
import sys
import time

import torch


def route(logits, p):
    r = torch.softmax(logits, dim=-1)
    values, index = torch.sort(r, dim=-1, descending=True)
    before = torch.cumsum(values, dim=-1) - values
    keep = before < p
    kept = values * keep
    kept = kept / kept.sum(dim=-1, keepdim=True)
    tokens, rank = keep.nonzero(as_tuple=True)
    experts = index[tokens, rank]
    order = torch.argsort(experts, stable=True)
    offsets = torch.cumsum(torch.bincount(experts, minlength=logits.shape[1]), 0)
    return tokens[order], kept[tokens, rank][order], offsets


def main():
    torch.set_num_threads(int(sys.argv[1]))
    p = float(sys.argv[2])
    for size in sys.argv[3:]:
        n, k = map(int, size.split("x"))
        torch.manual_seed(0)
        logits = torch.randn(n, k)
        with torch.inference_mode():
            route(logits, p)
            times = []
            until = time.perf_counter() + 2.0
            while len(times) < 5 or (time.perf_counter() < until and len(times) < 200):
                start = time.perf_counter()
                tokens, _, _ = route(logits, p)
                times.append(time.perf_counter() - start)
        times.sort()
        spread = [times[len(times) // 4], times[len(times) // 2], times[3 * len(times) // 4]]
        mean_k = len(tokens) / n
        print(json.dumps({"size": size, "quartiles": spread, "mean_k": mean_k, "torch": torch.__version__}), flush=True)


main()
