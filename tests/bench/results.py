"""Small made-up results of a benchmark, as fastprompt.bench.records describes them."""

MACHINE = {
    "device": "cpu",
    "name": "Some CPU, 2 cores, AVX2",
    "threads": 2,
    "dtype": "float32",
    "matrix_gflops": 180.2,
    "memory_gbytes": 12.3,
    "versions": {"fastprompt": "0.1.0", "torch": "2.10.0", "peft": "0.20.0", "flash-attn": None},
}


def interval(median, below=0.0, above=None):
    """From `below` of the median under it to `above` of it over it, as JSON has it."""
    return {"median": median, "low": median * (1 - below), "high": median * (1 + (below if above is None else above))}


def record(name="attention/small", ours=2e-3, noise=0.01, rivals=None, **fields):
    """A record whose ways have an interval of `noise`; rivals: way -> seconds."""
    seconds = {"ours": ours, **(rivals or {})}
    ways = {way: {"seconds": interval(value, noise), "turns": 9, "error": 1e-7} for way, value in seconds.items()}
    for way in seconds:
        if way != "ours":
            ways[way]["over_ours"] = interval(seconds[way] / ours, noise)
    return {
        "name": name,
        "group": name.split("/")[0],
        "sizes": {"B": 8, "L": 64},
        "sweep": None,
        "flops": 36 * 10**7,
        "bytes": 10**6,
        "missing": {},
        "wrong": {},
        "ways": ways,
        "sets": 2,
        "matrix_gflops": 240.0,
        "floor_seconds": 1.5e-3,
    } | fields


def wrong(name="attention/small", error=1e-2, **fields):
    return record(name, **fields) | {"ways": {}, "wrong": {"ours": error}}


def job(ours=0.2, peft=0.4, resident=2**30):
    """A record of a whole training, of which peft's misses the target."""
    ways = {
        way: {
            "seconds_per_step": interval(seconds, 0.01),
            "tokens_per_second": 800.0,
            "flops_per_step": 10**10,
            "seconds_to": {"R@1 0.40": 12.5 if way == "ours" else None},
            "resident_bytes": resident,
            "scores": {"before": 0.1, "after": 0.5},
        }
        for way, seconds in (("ours", ours), ("peft", peft))
    }
    return {"name": "end-to-end/retrieval", "group": "end-to-end", "sizes": {"P": 16}, "missing": {}, "ways": ways}


def result(*records, **machine):
    return {
        "format": 1,
        "machine": MACHINE | machine,
        "state": {"before": {"load": 1.5, "clock_mhz": [2400.1, 2500]}, "after": {"load": 2.5, "clock_mhz": None}},
        "settings": {"groups": ["attention", "packing"], "quick": False, "budget": 3.0},
        "cases": list(records),
    }
