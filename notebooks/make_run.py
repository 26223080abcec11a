"""Make a small copy of a finished run: weights in half precision, no optimisers, thinned logs.

    python notebooks/make_run.py runs/signs-tiny notebooks/run

The copy is a run like any other. Only the first stage keeps its discriminator.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_folder
from convert import load_first_stage

LINES = 200                                              # of a log, at most


def half(weights):
    """Round the weights to half precision. Counters stay as they are."""
    return {name: value.half() if value.is_floating_point() else value
            for name, value in weights.items()}


def main(source, target):
    source, target, parent = Path(source), Path(target), None
    for stage in ("vqgan", "refit", "decoder", "prior"):
        state = run_folder.latest(source / stage)
        extra = dict(state["extra"])
        discriminator = extra.pop("discriminator", None)
        if stage == "vqgan":
            extra["discriminator"] = half(discriminator)
        state |= {"optimizers": {}, "extra": extra, "parent": parent}
        if state["ema"]:                                 # the prior's average is what is used
            state |= {"ema": state["ema"] | {"weights": half(state["ema"]["weights"])},
                      "model": {}}
        else:
            state["model"] = half(state["model"])
        state["config"] |= {"vqgan": None}
        run_folder.save(target / stage / "last.pt", state)
        if stage in ("vqgan", "refit"):                  # rounded weights have another hash
            parent = load_first_stage(target / stage / "last.pt").parent
        # Keep validations and every so many steps of the log, with five digits.
        lines = (source / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records, every = [json.loads(line) for line in lines], max(1, -(-len(lines) // LINES))
        kept = [{key: float(f"{value:.5g}") if isinstance(value, float) else value
                 for key, value in record.items()} for number, record in enumerate(records)
                if number % every == 0 or any(key.startswith("val_") for key in record)]
        (target / stage / "log.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    for path in sorted(target.rglob("*.*")):
        print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
