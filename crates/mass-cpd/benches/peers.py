"""The Python peers, river and ruptures, with their default settings: what `COMPARE.md` says of them.

    pip install river ruptures numpy
    python benches/peers.py                                # speed: least of several runs, ns a sample or ms a series
    python benches/peers.py alarms                         # false alarms and power on simulated AR(1) streams
    MASS_DATA_DIR=... python benches/peers.py annotated    # F1 and covering against human annotators
    MASS_DATA_DIR=... python benches/peers.py annotated 5  # the same with ruptures' penalty five times as large

Compare the first with `cargo bench` on the same machine, the others with the tables of `docs/statistics.md`.
"""

import csv
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import ruptures
from river import drift

DETECTORS = [("PageHinkley", drift.PageHinkley), ("ADWIN", drift.ADWIN), ("KSWIN", lambda: drift.KSWIN(seed=0))]
MARGIN = 5


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


def speed():
    for name, make in DETECTORS:
        n = 512 if name == "KSWIN" else 4096
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


def autoregression(rng, n, phi):
    """AR(1) noise of unit variance."""
    shocks = rng.standard_normal(n) * math.sqrt(1 - phi * phi)
    out = [rng.standard_normal()]
    for shock in shocks[1:]:
        out.append(phi * out[-1] + shock)
    return np.array(out)


def first_alarm(detector, xs, after):
    """Observations from `after` to the first alarm there; None without one."""
    for t, x in enumerate(xs):
        detector.update(float(x))
        if t >= after and detector.drift_detected:
            return t - after
    return None


def alarms(warm_up=200, steps=1000):
    """Share of streams that alarm in `steps` after `warm_up`: without a change, and with one there."""
    print("detector, AR(1) coefficient, standard deviation: without a change; with a step of one standard deviation")
    for name, make in DETECTORS:
        streams = 200 if name == "KSWIN" else 2000
        for phi, scale in [(0.0, 1.0), (0.3, 1.0), (0.6, 1.0), (0.0, 0.1), (0.0, 10.0)]:
            cells = []
            for step in (0, 1):
                delays = []
                for seed in range(streams):
                    xs = autoregression(np.random.default_rng(seed), warm_up + steps, phi)
                    xs[warm_up:] += step
                    delays.append(first_alarm(make(), scale * xs, warm_up))
                found = [d for d in delays if d is not None]
                share = len(found) / streams
                error = math.sqrt(share * (1 - share) / streams)
                delay = f" ({statistics.median(found):.0f})" if found else ""
                cells.append(f"{share:.3f} ± {error:.3f}{delay}")
            print(f"river {name}, {phi}, {scale}: {'; '.join(cells)}", flush=True)


def drifts(name, make):
    """Where the window that is kept begins, after each alarm; PageHinkley keeps none and says when it alarmed."""

    def cut(values):
        detector, found = make(), []
        for t, x in enumerate(values):
            detector.update(float(x))
            if detector.drift_detected:
                kept = {"ADWIN": lambda: detector.width, "KSWIN": lambda: detector.stat_size}.get(name, lambda: 1)()
                found.append(t + 1 - int(kept))
        return found

    return cut


def segmenter(make, factor):
    """A penalty of `factor` log(n) times the variance, which is one here: it has no default, its examples take 1."""
    return lambda values: make().fit(values).predict(pen=factor * math.log(len(values)))[:-1]


def true_positives(marks, predicted):
    free, hits = set(predicted), 0
    for mark in sorted(marks):
        near = min((p for p in sorted(free) if abs(p - mark) <= MARGIN), key=lambda p: abs(p - mark), default=None)
        if near is not None:
            free.remove(near)
            hits += 1
    return hits


def f1(annotators, found):
    predicted, marks = {0, *found}, [{0, *m} for m in annotators]
    precision = true_positives(set().union(*marks), predicted) / len(predicted)
    recall = statistics.mean(true_positives(m, predicted) / len(m) for m in marks)
    return 2 * precision * recall / (precision + recall)


def segments(cuts, n):
    edges = [0, *sorted(c for c in set(cuts) if 0 < c < n), n]
    return list(zip(edges, edges[1:]))


def covering(annotators, found, n):
    def best(a, b):
        return max(max(0, min(b, d) - max(a, c)) / (max(b, d) - min(a, c)) for c, d in segments(found, n))

    return statistics.mean(sum((b - a) * best(a, b) for a, b in segments(m, n)) / n for m in annotators)


def annotated(factor="1"):
    """The scores of van den Burg and Williams, on standardised series; the scorer of `tests/main/real_tcpd.rs`."""
    folder = Path(os.environ["MASS_DATA_DIR"]) / "tcpd"
    methods = [(f"river {name}", drifts(name, make)) for name, make in DETECTORS]
    searches = (ruptures.Pelt, ruptures.Binseg, ruptures.Window)
    methods += [(f"ruptures {c.__name__}", segmenter(c, float(factor))) for c in searches]
    methods.append(("no change points", lambda _: []))
    scores = {name: [] for name, _ in methods}
    for series_name, annotators in json.loads((folder / "annotations.json").read_text()).items():
        with open(folder / "series" / f"{series_name}.csv") as file:
            rows = [row[1] for row in list(csv.reader(file))[1:]]
        places = [t for t, field in enumerate(rows) if field]
        values = np.array([float(rows[t]) for t in places])
        values = (values - values.mean()) / values.std()
        for name, cut in methods:
            try:
                found = [places[i] for i in cut(values)]
            except ruptures.exceptions.BadSegmentationParameters:
                found = []  # shorter than the window
            marks = list(annotators.values())
            scores[name].append((f1(marks, found), covering(marks, found, len(rows)), len(found)))
    for name, rows in scores.items():
        mean = [statistics.mean(column) for column in zip(*rows)]
        print(f"{name}: mean F1 {mean[0]:.3f}, mean covering {mean[1]:.3f}, {mean[2]:.1f} change points a series")


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["speed"]
    {"speed": speed, "alarms": alarms, "annotated": annotated}[what](*rest)
