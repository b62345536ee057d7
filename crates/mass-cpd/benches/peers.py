"""Times the Python peers: river's PageHinkley, ADWIN and KSWIN on one stream, ruptures' PELT on two series.

    pip install river ruptures numpy
    python benches/peers.py

Prints the least of several runs, in ns a sample or ms a series; compare with `cargo bench` on the same machine.
"""

import math
import time

import numpy as np
import ruptures
from river import drift


def stream(n):
    rng = np.random.default_rng(7)
    return [float(x) for x in np.exp(0.2 * rng.standard_normal(n))]


def series(n):
    state, out = 42, []
    for t in range(n):
        noise = -6.0
        for _ in range(12):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            noise += (state >> 11) / 2**53
        out.append(noise + 3.0 * ((t // 500) % 2))
    return np.array(out)


def least(run, times):
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main():
    for name, make, n in [
        ("PageHinkley", drift.PageHinkley, 4096),
        ("ADWIN", drift.ADWIN, 4096),
        ("KSWIN", drift.KSWIN, 512),
    ]:
        xs = stream(n)

        def run(make=make, xs=xs):
            detector = make()
            for x in xs:
                detector.update(x)

        print(f"river {name}: {least(run, 20 if n > 1000 else 3) / n * 1e9:.0f} ns a sample", flush=True)
    for n in (10_000, 100_000):
        y = series(n)
        penalty = 2.0 * math.log(n)

        def run(y=y, penalty=penalty):
            return ruptures.KernelCPD(kernel="linear", min_size=2).fit(y).predict(pen=penalty)

        print(f"ruptures KernelCPD (PELT in C), {n} points: {least(run, 3 if n < 50_000 else 1) * 1e3:.0f} ms", flush=True)
    y = series(10_000)

    def run():
        return ruptures.Pelt(model="l2", min_size=2, jump=1).fit(y).predict(pen=2.0 * math.log(10_000))

    print(f"ruptures Pelt (l2, Python), 10000 points: {least(run, 1) * 1e3:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
